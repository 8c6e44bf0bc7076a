"What SECURITY.md promises, each tried by somebody who would like it to be otherwise."
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import several

root = Path(__file__).parent.parent
OPTIONS = ['--n-freeze', '2', '--seq-len', '256', '--max-steps', '2', '--eval-every', '2', '--n-samples', '1',
           '--max-new-tokens', '2', '--save-every', '1']


def planted(*args, env=(), cwd=None):
    "The command in a process of its own that was forked, with a home of its own."
    e = {k: None for k in os.environ if k.startswith(('WANDB', 'HF_', 'HUGGING'))}
    return several.Command(*args, env=e | dict(HOME=str(cwd or Path.cwd())) | dict(env), cwd=cwd)


def alpaca_ft(*args, env=(), cwd=None):
    "The command in a process of its own that was started, with a home of its own."
    e = {k: v for k, v in os.environ.items() if not k.startswith(('WANDB', 'HF_', 'HUGGING'))}
    e |= dict(HOME=str(cwd or Path.cwd()), OMP_NUM_THREADS='1',
              PYTHONPATH=os.pathsep.join([str(root), *filter(None, [os.environ.get('PYTHONPATH')])])) | dict(env)
    p = subprocess.Popen([sys.executable, '-c', 'import sys; from alpaca_ft.cli import main; sys.exit(main())',
                          *map(str, args)],
                         stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=e,
                         cwd=cwd)
    out, err = p.communicate(timeout=300)
    return p.returncode, out, err


@pytest.fixture
def untrusted(here, tiny):
    "A model folder whose code leaves a file behind when it is imported."
    for kind in ('known', 'unknown'):
        folder = here/kind
        shutil.copytree(tiny, folder)
        sentinel, known = str(here/'sentinel'), 'llama' if kind == 'known' else 'evil'
        (folder/'evil.py').write_text(f'''open({sentinel!r}, "w").close()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class EvilConfig(LlamaConfig): model_type = {known!r}
class EvilModel(LlamaForCausalLM): config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast): pass
''')
        config = json.loads((folder/'config.json').read_text()) | dict(auto_map=dict(AutoConfig='evil.EvilConfig',
                AutoModelForCausalLM='evil.EvilModel'))
        if kind == 'unknown':
            config['model_type'] = 'evil'
        (folder/'config.json').write_text(json.dumps(config))
        tok = json.loads((folder/'tokenizer_config.json').read_text()) | dict(auto_map=dict(AutoTokenizer=[None,
                'evil.EvilTokenizer']), tokenizer_class='EvilTokenizer')
        (folder/'tokenizer_config.json').write_text(json.dumps(tok))
    return here


def test_no_remote_code(untrusted, rows):
    for kind in ('known', 'unknown'):
        done = several.command('check', '--model', f'./{kind}', '--data', rows, *OPTIONS)
        code, err = done.returncode, done.stderr
        assert not (untrusted/'sentinel').exists() and 'Traceback' not in err, (kind, err)
        assert code == 0 or code == 2 and len(err.splitlines()) == 1, err
    code, out, err = alpaca_ft('check', '--model', './known', '--data', rows, '--trust-remote-code', *OPTIONS,
                               env=dict(HF_HOME=str(untrusted/'hf')))
    assert (untrusted/'sentinel').exists(), 'the sentinel does not work: ' + err


@pytest.mark.parametrize('kind', ['known', 'unknown'])
def test_no_remote_code_of_a_run(kind, untrusted, rows, tiny):
    "A stranger's run folder that says it was trained with the flag: the code in it runs only where the flag is typed."
    import yaml
    (untrusted/'run').mkdir()
    shutil.move(untrusted/kind, untrusted/'run/model')
    config = dict(model=str(tiny), data=str(rows), seq_len=256, trust_remote_code=True, versions=dict(alpaca_ft='0'))
    (untrusted/'run/config.yaml').write_text(yaml.safe_dump(config))
    for argv in (['sample', 'run', '--instruction', 'hi', '--max-new-tokens', 2], ['chat', 'run'],
                 ['evaluate', 'run', '--against', 'none', '--n-samples', 0], ['export', 'run', '--to', 'x'],
                 ['export', 'run', '--to', 'y', '--format', 'gguf']):
        done = several.command(*argv, cwd=untrusted)
        assert not (untrusted/'sentinel').exists() and 'Traceback' not in done.stderr, (argv, done.stderr)
        assert done.returncode == 2 and done.stderr.count('\n') == 1, (argv, done.stderr)
        assert 'gguf' in argv or done.stderr.endswith('type --trust-remote-code if you trust it\n'), done.stderr


@pytest.mark.parametrize('extra', [{}, dict(versions=dict(alpaca_ft='0'))], ids=['options', 'of a run'])
def test_no_file_allows_code(extra, here, command):
    "A file of options, such as a stranger's config.yaml, cannot stand for the flag."
    import yaml
    from alpaca_ft import Refused, read_config
    (here/'c.yaml').write_text(yaml.safe_dump(dict(trust_remote_code=True) | extra))
    for name in ('check', 'train'):
        code, out, err = command(name, '--config', 'c.yaml')
        assert code == 2 and len(err.splitlines()) == 1 and 'type --trust-remote-code' in err, err
    with pytest.raises(Refused):
        read_config('c.yaml')
    assert read_config('c.yaml', trust_remote_code=True).trust_remote_code
    assert not read_config('c.yaml', trust_remote_code=False).trust_remote_code


def test_nothing_that_runs_code():
    "No pickles, no evaluation of text, no shell, no remote code by default in the package."
    for p in sorted((root/'alpaca_ft').glob('*.py')):
        found = re.findall(r'torch\.(?:load|save)\(|\bpickle\b|allow_pickle|\b(?:eval|exec)\(|shell=True'
                           r'|yaml\.(?:load|unsafe_load)\(|trust_remote_code=True|weights_only=False',
                           p.read_text(encoding='utf-8'))
        assert [f for f in found
                if f != 'eval('] == [] and len(re.findall(r'(?<!\.)\beval\(',
                                                          p.read_text(encoding='utf-8'))) == 0, (p.name, found)
    from alpaca_ft import RunConfig
    assert RunConfig().trust_remote_code is False


def test_config_is_data(here):
    "A YAML file cannot make objects."
    from alpaca_ft import read_config, Refused
    (here/'evil.yaml').write_text(f'model: !!python/object/apply:os.mkdir [{here}/made]\n')
    with pytest.raises(Refused):
        read_config('evil.yaml')
    assert not (here/'made').exists()


def test_pickled_checkpoint(here, tiny, rows, command):
    "A checkpoint whose weights were replaced by a pickle, manifest and all, is not unpickled."
    import hashlib, pickle
    args = ['train', '--model', tiny, '--data', rows, *OPTIONS, '--out', 'run']
    assert command(*args)[0] == 0
    shutil.rmtree(here/'run'/'model')
    class Evil:
        def __reduce__(self): return os.mkdir, (str(here/'made'),)
    step = here/'run'/'checkpoints'/'step-2'
    data = pickle.dumps(Evil())
    (step/'weights.safetensors').write_bytes(data)
    manifest = json.loads((step/'manifest.json').read_text()) | {'weights.safetensors': dict(bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest())}
    (step/'manifest.json').write_text(json.dumps(manifest))
    with pytest.raises(Exception, match='header'):
        command(*args, '--resume')
    assert not (here/'made').exists() and not (here/'run'/'model').exists()


@pytest.mark.parametrize('name', ['../../../etc/x:v0', 'a/b/..:..', 'a/b/c:latest'])
def test_artifact_stays_in_its_folder(name, here, monkeypatch):
    """An artifact's name does not lead out of the cache; the names of its files are checked by W&B, which this holds
    it to."""
    import wandb
    from types import SimpleNamespace as NS
    from wandb.sdk.artifacts._validators import validate_fspath
    from alpaca_ft import fetch_artifact
    monkeypatch.setenv('ALPACA_FT_CACHE', str(here/'cache'))
    monkeypatch.setenv('WANDB_API_KEY', 'x'*40)
    asked = []
    class Artifact:
        digest = 'd1'
        def download(self, root, skip_cache):
            asked.append(Path(root))
            Path(root).mkdir(parents=True)
            return root
        def verify(self, root):
            if not Path(root).exists():
                raise ValueError('no copy yet')
    monkeypatch.setattr(wandb, 'Api', lambda **kw: NS(artifact=lambda name, type: Artifact()))
    fetch_artifact(name)
    assert asked[0].resolve().parent == (here/'cache'/'artifacts').resolve()
    for path in ('../outside', '/etc/passwd', 'a/../../outside'):
        with pytest.raises(ValueError):
            validate_fspath(str(here), path)


RECORDER = '''
import os, socket
def record(what, address):
    with open(os.environ['CONTACTS'], 'a') as f: f.write(f'{what} {address}\\n')
    raise OSError(101, 'refused by the test')
class Socket(socket.socket):
    def connect(self, a): return super().connect(a) if self.family == socket.AF_UNIX else record('connect', a)
    def connect_ex(self, a): return super().connect_ex(a) if self.family == socket.AF_UNIX else record('connect', a)
    def sendto(self, *a): return super().sendto(*a) if self.family == socket.AF_UNIX else record('sendto', a[-1])
socket.socket = socket.SocketType = Socket
def getaddrinfo(host, *a, **kw): return record('look up', host)
socket.getaddrinfo = socket.gethostbyname = getaddrinfo
'''


def serve(handler):
    import http.server, threading
    s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    s.daemon_threads = True
    threading.Thread(target=s.serve_forever, daemon=True).start()
    return f'http://127.0.0.1:{s.server_port}'


@pytest.fixture(scope='module')
def tracked(tmp_path_factory, tiny, rows):
    """Four runs with --track wandb: no key; a key and no network; a server that answers 500; one that hangs. {name:
    (folder, code, out, err)}"""
    import http.server, time
    class Broken(http.server.BaseHTTPRequestHandler):
        def do_GET(self): self.send_error(500)
        do_POST = do_GET
        def log_message(self, *args): pass
    class Silent(Broken):
        def do_GET(self): time.sleep(60)
        do_POST = do_GET
    key = dict(WANDB_API_KEY='planted'*5 + 'wandb', HF_TOKEN='hf_planted_hub', HUGGING_FACE_HUB_TOKEN='hf_planted_hub')
    hooks = tmp_path_factory.mktemp('hooks')
    (hooks/'sitecustomize.py').write_text(RECORDER)
    recorded = dict(CONTACTS=str(hooks/'contacts'),
                    PYTHONPATH=os.pathsep.join([str(hooks), str(root), *filter(None, [os.environ.get('PYTHONPATH')])]))
    cases = {'no network': key | dict(WANDB_BASE_URL='http://127.0.0.1:9'),
             'answers 500': key | dict(WANDB_BASE_URL=serve(Broken)), 'hangs': key | dict(WANDB_BASE_URL=serve(Silent))}
    done, args = {}, [*OPTIONS, '--track', 'wandb', '--out', 'run']
    folder = tmp_path_factory.mktemp('tracked')
    done['no key'] = folder, *alpaca_ft('train', '--model', tiny, '--data', 'builtin', *args, env=recorded, cwd=folder)
    for name, env in cases.items():
        folder = tmp_path_factory.mktemp('tracked')
        p = planted('train', '--model', tiny, '--data', rows, *args, env=env, cwd=folder)
        done[name] = folder, p.wait(), p.stdout, p.stderr
    seen = (hooks/'contacts').exists() and (hooks/'contacts').read_text()
    subprocess.run([sys.executable, '-c', 'import urllib.request; urllib.request.urlopen("http://127.0.0.1:9")'],
                   env=os.environ | recorded, capture_output=True)
    assert (hooks/'contacts').exists(), 'the recorder does not work'
    return done | dict(contacts=seen)


@pytest.mark.parametrize('name', ['no key', 'no network', 'answers 500', 'hangs'])
def test_tracker_never_ends_a_run(name, tracked):
    folder, code, out, err = tracked[name]
    assert code == 0 and (folder/'run'/'model').exists() and 'W&B: offline' in err and 'Traceback' not in err, err
    assert list((folder/'run'/'wandb').glob('offline-run-*/run-*.wandb'))


def test_nothing_is_contacted(tracked):
    """A run on the built-in rows, recorded by W&B without a key, with every outgoing connection refused and
    recorded: none is tried."""
    assert tracked['contacts'] is False and tracked['no key'][1] == 0, tracked['contacts']


def test_no_secret_is_written(tracked):
    "Planted keys are in no file of the run folder and in no output."
    for name, folder, code, out, err in ((k, *v) for k, v in tracked.items() if k != 'contacts'):
        files = [p for p in (folder/'run').rglob('*') if p.is_file()]
        assert len(files) > 10
        for what, data in [*((p, p.read_bytes()) for p in files), ('output', (out + err).encode())]:
            assert b'planted' not in data, (name, what)


def test_terminal_is_not_obeyed(here, tiny, command):
    "Escape sequences in names and options are shown, not sent."
    for args in (['--data', 'a\x1b]0;title\x07.jsonl'], ['--model', './\x1b[31m'], ['--loss-on', 'x\x1b[2J\ny']):
        code, out, err = command('train', '--model', tiny, *args)
        assert code == 2 and '\x1b' not in out + err and len(err.splitlines()) == 1, err


def test_rows_are_inert_in_names(tracked):
    "A run folder's file names do not come from rows or answers."
    assert {p.name for p in (tracked['no key'][0]/'run').iterdir()} == {'config.yaml', 'preflight.json',
            'metrics.jsonl', 'samples.jsonl', 'checkpoints', 'model', 'report.html', 'wandb-id.txt', 'wandb'}
