"Trackers: what was really written, and what happens when something is in the way."
import json
import os
import subprocess
import sys
import time

import pytest
import several

from alpaca_ft import Refused, RunConfig, load_alpaca, train

sys.path.insert(0, os.path.dirname(__file__))
from wandb_loopback import Receiver, Server  # noqa: E402

ROW = b'{"instruction": "a", "input": "", "output": "b"}\n'
FILES = {'alpaca_gpt4_train.jsonl': ROW*5, 'alpaca_gpt4_eval.jsonl': ROW}


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    "Nothing of the user's W&B or Trackio is read or written."
    for k in ('WANDB_MODE', 'WANDB_API_KEY', 'WANDB_BASE_URL'):
        monkeypatch.delenv(k, raising=False)
    for k in ('WANDB_DIR', 'WANDB_DATA_DIR', 'WANDB_CACHE_DIR', 'WANDB_CONFIG_DIR', 'TRACKIO_DIR', 'ALPACA_FT_CACHE',
              'HOME'):
        (tmp_path/k.lower()).mkdir()
        monkeypatch.setenv(k, str(tmp_path/k.lower()))


def records(folder):
    out = subprocess.run([sys.executable, '-m', 'wandb', 'leet', 'inspect', '--json',
                          str(next(folder.glob('wandb/offline-run-*')))], capture_output=True, text=True).stdout
    return [json.loads(l) for l in out.splitlines() if l.strip()]


def tiny_run(tiny, rows, out, **kw):
    return train(RunConfig(**(dict(model=str(tiny), data=str(rows), out=str(out), n_freeze=2, seq_len=256, n_samples=2,
                                   max_new_tokens=4, max_steps=4, eval_every=2, dtype='fp32') | kw)))


def test_wandb_offline(tiny, rows, tmp_path):
    run = tiny_run(tiny, rows, tmp_path/'run', track='wandb', log_model=True)
    got = records(run.out)
    history = [r['history']['item'] for r in got if r['type'] == 'history']
    assert [h['train/global_step'] for h in history if 'train/loss' in h] == [1, 2, 3, 4]
    assert [(h['train/global_step'], h['sample_predictions.nrows']) for h in history
            if 'sample_predictions.nrows' in h] == [(0, 2), (2, 4), (4, 6)]
    model = [r['artifact'] for r in got if r['type'] == 'artifact' and r['artifact']['type'] == 'model']
    assert len(model) == 1
    assert sorted(e['path'] for e in model[0]['manifest']['contents']) == sorted(p.name
                                                                                 for p in (run.out/'model').iterdir())


def test_wandb_goes_on_in_the_same_run(tiny, rows, tmp_path):
    "A resumed run has the id of the one that it goes on with."
    import shutil
    run = tiny_run(tiny, rows, tmp_path/'run', track='wandb', save_every=2, n_samples=0)
    shutil.rmtree(run.out/'model')
    shutil.rmtree(run.out/'checkpoints'/'step-4')
    tiny_run(tiny, rows, tmp_path/'run', track='wandb', save_every=2, n_samples=0, resume=True)
    ids = [p.name for p in run.out.glob('wandb/offline-run-*/run-*.wandb')]
    assert len(ids) == 2 and len(set(ids)) == 1, ids
    assert ids[0] == f"run-{(run.out/'wandb-id.txt').read_text().strip()}.wandb"


def test_wandb_sync(tiny, rows, tmp_path, monkeypatch, capfd):
    """An offline run and its resumed part, sent by the command that was printed: one run, nothing lost, the model
    with its bytes and its evaluation."""
    import re
    import shutil
    run = tiny_run(tiny, rows, tmp_path/'run', track='wandb', save_every=2, log_model=True)
    shutil.rmtree(run.out/'model')
    shutil.rmtree(run.out/'checkpoints'/'step-4')
    time.sleep(1)  # W&B names what it records by the second
    tiny_run(tiny, rows, tmp_path/'run', track='wandb', save_every=2, log_model=True, resume=True)
    told = re.findall('`wandb (sync .*)` sends it', capfd.readouterr().err)[-1].split()
    assert len(told) == 3
    s = Receiver()
    monkeypatch.setenv('WANDB_API_KEY', 'x'*40)
    monkeypatch.setenv('WANDB_BASE_URL', s.url)
    r = subprocess.run([sys.executable, '-m', 'wandb', *told], capture_output=True, text=True, timeout=120)
    s.shutdown()
    s.server_close()
    assert r.returncode == 0, r.stderr
    assert list(s.runs) == [(run.out/'wandb-id.txt').read_text().strip()]
    history = [json.loads(line) for line in next(iter(s.runs.values()))['wandb-history.jsonl']]
    steps = [h['train/global_step'] for h in history if 'train/loss' in h]
    assert steps == [1, 2, 3, 4, 3, 4]  # 3 and 4 again: they were trained again
    assert [h['_step'] for h in history] == list(range(len(history)))
    losses = {h['train/global_step']: h['train/loss'] for h in history if 'train/loss' in h}
    metrics = [json.loads(line) for line in open(run.out/'metrics.jsonl')]
    assert losses == {m['step']: pytest.approx(m['loss']) for m in metrics if 'loss' in m}
    assert {'model-run'} <= set(s.committed)
    for path in (run.out/'model').iterdir():
        assert s.put[f'model-run/{path.name}'] == path.read_bytes(), path.name
    about = json.loads(s.artifacts['model-run']['metadata'])
    last = [m for m in metrics if 'eval_loss' in m][-1]
    assert (
        about['evaluation']['last'] == {k: last[k] for k in ('step', 'eval_loss', 'eval_response_loss')}
        and about['manifest']['weights']
    )


def test_wandb_after_chdir(tmp_path):
    "W&B's service keeps the directory it was started in; a relative folder means the caller's directory all the same."
    (tmp_path/'first').mkdir()
    (tmp_path/'second').mkdir()
    code = ("import os, wandb; from alpaca_ft.tracking import finish_wandb, start_wandb\n"
            "wandb.setup(); os.chdir('../second'); os.mkdir('run')\n"
            "finish_wandb(start_wandb('run', 'run', 'alpaca_ft', decided=('offline', 'asked for')))")
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path/'first', check=True, capture_output=True)
    assert list((tmp_path/'second'/'run'/'wandb').glob('offline-run-*/run-*.wandb'))
    assert not list((tmp_path/'first').iterdir())


def test_wandb_unreachable(tiny, rows, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv('WANDB_API_KEY', 'x'*40)
    monkeypatch.setenv('WANDB_BASE_URL', 'http://127.0.0.1:9')
    run = tiny_run(tiny, rows, tmp_path/'run', track='wandb', n_samples=0, max_steps=1)
    assert 'W&B: offline (http://127.0.0.1:9 cannot be reached' in capfd.readouterr().err and records(run.out)


def test_wandb_finished_after_an_error(tiny, rows, tmp_path):
    from alpaca_ft import Diverged
    with pytest.raises(Diverged):
        tiny_run(tiny, rows, tmp_path/'run', track='wandb', lr=1e30, warmup=0., log_model=True)
    got = records(tmp_path/'run')
    assert [r['exit'].get('exit_code', r['exit'].get('exitCode')) for r in got if r['type'] == 'exit'] == [1]
    assert not [r for r in got if r['type'] == 'artifact' and r['artifact']['type'] == 'model']


def test_split(tmp_path, rows, command):
    code, out, err = command('split', rows, '--out', tmp_path/'parts', '--n-eval', 5, '--track', 'wandb')
    assert code == 0 and '35 rows to train on, 5 held back' in out
    ds = load_alpaca(tmp_path/'parts')
    assert (len(ds['train']), len(ds['test'])) == (35, 5)
    got = records(tmp_path)
    data = [r['artifact'] for r in got if r['type'] == 'artifact' and r['artifact']['name'] == 'alpaca_gpt4_splitted']
    assert sorted(e['path'] for e in data[0]['manifest']['contents']) == sorted(FILES)
    assert any('train_table.nrows' in r['history']['item']
               and r['history']['item']['train_table.nrows'] == 35 for r in got if r['type'] == 'history')
    code, out, err = command('split', rows, '--out', tmp_path/'parts')
    assert code == 2 and 'exists already' in err
    assert command('split', rows, '--out', tmp_path/'other', '--n-eval', 40)[0] == 2 and not (tmp_path/'other').exists()


def test_split_of_a_source_with_a_test_split(here, rows, command):
    "Rows for evaluation that a source has of its own are not dropped in silence; without training rows it is refused."
    lines = rows.read_text().splitlines(keepends=True)
    (here/'own').mkdir()
    (here/'own'/'test.jsonl').write_text(''.join(lines[:6]))
    code, out, err = command('split', 'own', '--out', 'parts')
    assert code == 2 and 'own: has test, but no train split' in err and len(err.splitlines()) == 1, err
    assert not (here/'parts').exists()
    (here/'own'/'train.jsonl').write_text(''.join(lines[6:]))
    code, out, err = command('split', 'own', '--out', 'parts')
    assert code == 0 and '31 rows to train on, 3 held back, 6 of its own test split left out' in out, out


def test_what_the_user_told_wandb(tmp_path, monkeypatch):
    "The server and the mode of W&B's own files count, and a key for that server is found where W&B finds it."
    import wandb
    from alpaca_ft import wandb_mode
    from alpaca_ft.data import has_key, wandb_told
    settings, keys = tmp_path/'wandb_config_dir'/'settings', tmp_path/'home'/'.netrc'
    assert wandb_told()['base_url'] == wandb.Settings().base_url and not has_key(wandb.Settings().base_url)
    settings.write_text('[default]\nbase_url = http://127.0.0.1:9/\n')  # `wandb login --host`
    keys.write_text(f'machine 127.0.0.1:9 login user password {"x"*40}\n')
    keys.chmod(0o600)
    mode, why = wandb_mode()
    assert mode == 'offline' and why.startswith('http://127.0.0.1:9 cannot be reached'), why
    s = Receiver()
    monkeypatch.setenv('WANDB_BASE_URL', s.url)
    assert wandb_mode() == ('offline', 'no API key; `wandb login` sets one')
    monkeypatch.setenv('WANDB_API_KEY', 'x'*40)
    assert wandb_mode() == ('online', None)
    for mode in ('offline', 'disabled'):
        settings.write_text(f'[default]\nmode = {mode}\n')  # `wandb offline`, `wandb disabled`
        assert wandb_mode() == (mode, "W&B's settings say so; `wandb online` ends it")
    settings.write_text('[default]\nmode = online\n')
    assert wandb_mode() == ('online', None)
    s.shutdown()
    s.server_close()
    monkeypatch.delenv('WANDB_API_KEY')
    for name in ('api.wandb.ai', 'api.forge.coreweave.com'):
        keys.write_text(f'machine {name} login user password {"x"*40}\n')
        assert has_key('https://api.forge.coreweave.com') and not has_key('https://wandb.example')
    monkeypatch.setenv('WANDB_IDENTITY_TOKEN_FILE', 'token')
    assert has_key('https://wandb.example')


def test_an_artifact_without_a_key(tmp_path):
    "On a terminal W&B would ask for an account and wait; it is one line."
    import pty
    ours, theirs = pty.openpty()
    code = ("from alpaca_ft.data import Refused, find_rows\ntry:\n    find_rows('me/proj/data:latest')\n"
            "except Refused as e:\n    print('told:', e)")
    done = subprocess.Popen([sys.executable, '-c', code], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    try:
        code, said = done.wait(30), os.read(ours, 10_000).decode()
    finally:
        done.kill()
        os.close(ours)
    assert code == 0 and said.startswith('told: me/proj/data:latest: no such file or folder, and a W&B artifact needs')
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize('args,why', [
    (['--columns', 'foo'], 'write it as instruction=question'),
    (['--n-eval', '-5'], 'n_eval is -5; give 1 to 39'), (['--n-eval', '0'], 'n_eval is 0; give 1 to 39'),
    (['--seed', '-1'], 'seed is -1; give 0 to 4294967295'), (['--out', 'afile/x'], 'afile/x: cannot be written'),
    (['--out', 'full/x'], 'full/x: cannot be written (No space left on device)')])
def test_split_refused(args, why, here, rows, command, monkeypatch):
    "One line, and nothing is left."
    from alpaca_ft import tracking
    write = tracking.write_jsonl

    def on_a_disk(path, some):
        write(path, some)
        if 'full' in str(path):
            raise OSError(28, 'No space left on device')

    monkeypatch.setattr(tracking, 'write_jsonl', on_a_disk)
    (here/'afile').write_text('')
    (here/'full').mkdir()
    before = sorted(here.rglob('*'))
    code, out, err = command('split', rows, '--out', 'parts', *args)
    assert (code, out, len(err.splitlines())) == (2, '', 1) and why in err, err
    assert sorted(here.rglob('*')) == before


@pytest.fixture
def server(monkeypatch):
    s = Server(FILES)
    monkeypatch.setenv('WANDB_API_KEY', 'x'*40)
    monkeypatch.setenv('WANDB_BASE_URL', s.url)
    yield s
    s.shutdown()
    s.server_close()


def test_download(server):
    ds = load_alpaca('me/proj/data:latest')
    assert (len(ds['train']), len(ds['test'])) == (5, 1)
    assert [op for op, _ in server.seen if op != 'GET'] == ['Viewer', 'GetDefaultEntity', 'ServerFeaturesQuery',
                                                            'ArtifactMembershipByName', 'FetchArtifactManifest',
                                                            'GetArtifactMembershipFileUrls']
    server.seen.clear()
    load_alpaca('me/proj/data:latest')
    assert not [p for op, p in server.seen if op == 'GET' and p.startswith('/files/')]  # from the verified copy


@pytest.mark.parametrize('damage', [lambda b: b[:len(b)//2], lambda b: b.replace(b'"b"', b'"c"'), lambda b: b''],
                         ids=['truncated', 'changed', 'empty'])
def test_damaged_download(server, damage):
    "Refused in one line, and good again when the server is."
    server.served = {k: damage(v) for k, v in FILES.items()}
    with pytest.raises(Refused, match='W&B artifact not available') as e:
        load_alpaca('me/proj/data:latest')
    assert '\n' not in str(e.value)
    server.served = dict(FILES)
    assert len(load_alpaca('me/proj/data:latest')['train']) == 5


def test_two_downloads_at_once(server, tmp_path):
    "Two processes of a run want the same files: one downloads, the other one waits and takes what is there."
    server.delay = 1
    code = ("import wandb\nfrom alpaca_ft import load_alpaca\nprint('ready', flush=True)\ninput()\n"
            "print(len(load_alpaca('me/proj/data:latest')['train']))")
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    both = [subprocess.Popen([sys.executable, '-c', code], **pipes) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == 'ready\n'
    for process in both:
        process.stdin.write('\n')
        process.stdin.flush()
    for process in both:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (0, '5\n'), err
    assert sorted(p for op, p in server.seen if op == 'GET' and p.startswith('/files/')) == sorted(
        f'/files/{name}' for name in FILES)


def test_trackio_with_damaged_samples(tmp_path, monkeypatch, capsys):
    "What cannot be shown is told, and ends no run."
    from types import SimpleNamespace as NS
    from alpaca_ft.tracking import TrackioCB
    monkeypatch.setitem(sys.modules, 'trackio', NS(log=None, Table=None))
    for text in ('{"step": 0, "prom\n', '{"step": 0}\n'):
        (tmp_path/'samples.jsonl').write_text(text)
        TrackioCB(tmp_path/'samples.jsonl').on_evaluate(None, NS(global_step=2, is_world_process_zero=True), None)
        err = capsys.readouterr().err
        assert err.startswith('Trackio: the samples of step 2 were not logged (') and len(err.splitlines()) == 1, err


def test_tables_of_a_long_run(tokenizer, rows, tmp_path, monkeypatch):
    "They hold the first evaluation and the last twenty, so that a run does not send all its rows at each one."
    import wandb
    from types import SimpleNamespace as NS
    from transformers import GenerationConfig
    from alpaca_ft.sampling import LLMSampleCB
    from alpaca_ft.tracking import TrackioCB
    made = [dict(step=step, prompt=f'p{i}', generation=f'{step}', reference='r') for step in range(0, 100, 2)
            for i in range(3)]
    shown = [(r['step'], r['prompt'], r['generation']) for r in made if r['step'] in (0, *range(60, 100, 2))]
    assert len(shown) == 3*21
    cb = LLMSampleCB(NS(model=None, processing_class=tokenizer), load_alpaca(rows)['train'], 3)
    cb.rows, cb.gen_config = list(made), GenerationConfig()
    with wandb.init(mode='offline', dir=str(tmp_path)):
        cb.log_wandb(98)
    table, = tmp_path.glob('wandb/offline-run-*/files/media/table/*.json')
    assert [tuple(row[:3]) for row in json.loads(table.read_text())['data']] == shown
    assert cb.rows == made and cb.sample(2) == []  # what was sampled is known all the same
    sent = []
    monkeypatch.setitem(sys.modules, 'trackio', NS(log=lambda values, step: sent.append(values), Table=dict))
    (tmp_path/'samples.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in made))
    TrackioCB(tmp_path/'samples.jsonl').on_evaluate(None, NS(global_step=98, is_world_process_zero=True), None)
    assert [tuple(row[:3]) for row in sent[0]['sample_predictions']['data']] == shown


def test_model_with_a_damaged_evaluation(tiny, rows, tmp_path, capfd):
    "The training has ended by then: the model stays, and the artifact is not logged."
    from transformers import TrainerCallback

    class Damage(TrainerCallback):
        def on_train_end(self, args, state, control, **kw):
            (tmp_path/'run'/'evaluation.json').write_text('{')
    train(RunConfig(model=str(tiny), data=str(rows), out=str(tmp_path/'run'), n_freeze=2, seq_len=256, n_samples=0,
                    max_steps=2, dtype='fp32', track='wandb', log_model=True), [Damage()])
    assert (tmp_path/'run'/'model').is_dir()
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith('W&B: the artifact')]
    assert len(said) == 1 and 'evaluation.json cannot be read' in said[0], said


def test_trackio(tiny, rows, tmp_path):
    pytest.importorskip('trackio', reason='trackio is not installed; pip install trackio')
    run = tiny_run(tiny, rows, tmp_path/'run', track='trackio')
    def get(metric):
        out = subprocess.run(['trackio', 'get', 'metric', '--project', 'alpaca_ft', '--run', 'run', '--metric', metric,
                              '--json'], capture_output=True, text=True)
        return [(v['step'], v['value']) for v in json.loads(out.stdout)['values']]
    metrics = [json.loads(l) for l in open(run.out/'metrics.jsonl')]
    for key, name in (('loss', 'train/loss'), ('eval_loss', 'eval/loss'), ('eval_response_loss', 'eval/response_loss'),
                      ('tokens_per_second', 'train/tokens_per_second')):
        assert get(name) == [(m['step'], pytest.approx(m[key])) for m in metrics if key in m], name
    assert [(s, len(v['_value'])) for s, v in get('sample_predictions')] == [(0, 2), (2, 4), (4, 6)]


def test_trackio_absent(tiny, rows, here):
    "Refused before anything is written."
    argv = ['train', '--model', str(tiny), '--data', str(rows), '--n-freeze', '2', '--seq-len', '256',
            '--track', 'trackio', '--out', 'run']
    r = several.command(*argv, before=lambda: several.absent('trackio'))
    assert r.returncode == 2 and 'pip install trackio' in r.stderr and len(r.stderr.splitlines()) == 1
    assert not (here/'run').exists()


def test_log_model_needs_wandb(tiny, rows, here):
    with pytest.raises(Refused, match='--track wandb'):
        tiny_run(tiny, rows, 'run', log_model=True)
    assert not (here/'run').exists()


def test_push(tiny, rows, tmp_path, command):
    "To W&B, here offline; to a hub that cannot be reached: one line, and the folder stays."
    run = tiny_run(tiny, rows, tmp_path/'run', n_samples=0, max_steps=1)
    assert command('evaluate', run.out, '--n-samples', 0)[0] == 0
    code, out, err = command('export', run.out, '--to', tmp_path/'handed', '--push', 'wandb:tuned')
    assert code == 0, err
    sent = [r['artifact'] for r in records(tmp_path) if r['type'] == 'artifact' and r['artifact']['name'] == 'tuned']
    assert sorted(e['path'] for e in sent[0]['manifest']['contents']) == sorted(
        p.name for p in (tmp_path / 'handed').iterdir()
    )
    about = json.loads(sent[0]['metadata'])
    assert about['evaluation']['last']['step'] == 1 and about['evaluation']['measured']['rows'] == 4
    r = subprocess.run(
        [sys.executable, '-m', 'alpaca_ft', 'export', run.out, '--to', tmp_path/'other', '--push', 'hub:me/tuned'],
        capture_output=True,
        text=True,
        env=os.environ | dict(HF_ENDPOINT='http://127.0.0.1:9', HF_TOKEN='hf_x'),
    )
    assert r.returncode == 2 and 'not sent to the hub' in r.stderr and (tmp_path/'other'/'README.md').exists()


def test_names_that_wandb_refuses(tiny, rows, here, command):
    "Before any work, and the folder is free for the next try."
    for words, why in ((('--project', 'team/alpaca'), 'project is'), (('--tags', 'a'*65), 'W&B takes up to 64')):
        code, _, err = command('train', '--model', tiny, '--data', rows, '--out', 'w', '--track', 'wandb', *words)
        assert code == 2 and why in err and len(err.splitlines()) == 1, err
        assert not (here/'w').exists()
    code, _, err = command('split', rows, '--out', 's', '--track', 'wandb', '--project', 'team/alpaca')
    assert code == 2 and 'WANDB_ENTITY' in err and not (here/'s').exists()


def test_artifact_of_a_folder_with_any_name(tiny, rows, tmp_path, capfd):
    tiny_run(tiny, rows, tmp_path/'run 4 ü', track='wandb', log_model=True)
    err = capfd.readouterr().err
    assert 'was not logged' not in err and "'" + str(tmp_path) in err.partition('wandb sync ')[2], err
