"Each fault that was found in the engine, as it was found: see what would happen again if the mend were undone."
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import several
import torch

from alpaca_ft import RunConfig, Refused, train

OPTIONS = ['--n-freeze', '2', '--seq-len', '256', '--batch-size', '2', '--n-samples', '0', '--dtype', 'fp32']


def losses(out):
    "Training losses of a run."
    lines = [json.loads(line) for line in Path(out, 'metrics.jsonl').read_text().splitlines()]
    return [line['loss'] for line in lines if 'loss' in line]


def run_config(tiny, rows, out, **kw):
    "A short run."
    common = dict(model=str(tiny), data=str(rows), out=str(out), n_freeze=2, seq_len=256, batch_size=2, n_samples=0,
                  dtype='fp32', max_steps=4, lr=1e-3)
    return RunConfig(**common | kw)




def copy_model(tiny, to):
    "A copy of a model folder, to be changed."
    shutil.copytree(tiny, to)
    return Path(to)


# saving

def test_old_generation_config(here, tiny, rows):
    "Old Llama-2 copies set a temperature and no sampling, which transformers refuses to save: after the last step."
    folder = copy_model(tiny, 'old')
    about = json.loads((folder/'generation_config.json').read_text())
    (folder/'generation_config.json').write_text(json.dumps(about | dict(temperature=0.9, top_p=0.6)))
    run = train(run_config(folder, rows, 'run'))
    saved = json.loads((run.out/'model'/'generation_config.json').read_text())
    assert saved['temperature'] == 0.9 and saved['do_sample'] is True


def test_saving_is_tried_at_the_start(here, tiny, rows, monkeypatch):
    from transformers import LlamaForCausalLM

    def broken(self, *args, **kw):
        raise ValueError('this kind cannot be written')
    monkeypatch.setattr(LlamaForCausalLM, 'save_pretrained', broken)
    with pytest.raises(Refused, match='could not be saved .this kind cannot be written'):
        train(run_config(tiny, rows, 'run'))
    assert not Path('run').exists()


def test_finished_training_is_not_lost(here, tiny, rows, monkeypatch):
    "Where the model folder cannot be written at the end, the trained weights are, by their names."
    from safetensors.torch import load_file
    from alpaca_ft import Failed
    import alpaca_ft.run
    monkeypatch.setattr(alpaca_ft.run, 'save_model', lambda *args: (_ for _ in ()).throw(OSError('no way')))
    with pytest.raises(Failed,
                       match='could not be written .no way.; the trained weights are in run/trained.safetensors'):
        train(run_config(tiny, rows, 'run'))
    weights = load_file('run/trained.safetensors')
    assert 'lm_head.weight' in weights and 'model.layers.3.mlp.up_proj.weight' in weights
    assert 'model.layers.1.mlp.up_proj.weight' not in weights


def test_no_room_for_the_result(here, tiny, rows, monkeypatch):
    usage = shutil.disk_usage('.')
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=1000))
    with pytest.raises(Refused, match='the result takes .* are free there'):
        train(run_config(tiny, rows, 'run', prefix_cache='off'))
    assert not Path('run').exists()


def test_room_that_a_resumed_run_has_already(begun, rows, tmp_path, monkeypatch):
    "The checkpoints that are there are part of what a run takes, not more."
    shutil.copytree(begun, tmp_path/'w')
    monkeypatch.chdir(tmp_path/'w')
    about = json.loads(Path('run/preflight.json').read_text())
    there = sum(p.stat().st_size for p in Path('run/checkpoints').rglob('*') if p.is_file())
    kw = dict(save_every=2, keep=2, resume=True)
    need = about['model_bytes'] + 3*(3*4*about['trainable'])
    usage = shutil.disk_usage('.')
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=need - there - 1000))
    with pytest.raises(Refused, match='the result takes .* are free there'):
        train(run_config('./model', rows, 'run', **kw))
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=need - there + 1000))
    train(run_config('./model', rows, 'run', **kw))
    assert Path('run/model/model.safetensors').exists()


def test_model_changed_while_it_was_trained(here, tiny, rows, capfd):
    "The frozen layers come back from the model's files; if these changed, nobody trains on: the weights are kept."
    from transformers import TrainerCallback
    from alpaca_ft import Failed

    class Change(TrainerCallback):
        def on_step_end(self, args, state, control, **kw):
            if state.global_step == 3:
                os.utime('model/model.safetensors', (1, 1))
    copy_model(tiny, 'model')
    with pytest.raises(Failed, match='was changed or removed.*trained weights are in'):
        train(run_config('./model', rows, 'run', prefix_cache='memory', n_samples=1, max_new_tokens=2), [Change()])
    assert Path('run/trained.safetensors').exists() and len(losses('run')) == 4
    assert 'samples of step 4 are left out' in capfd.readouterr().err


def test_signal_while_the_model_is_saved(here, tiny, rows, monkeypatch):
    "The training is over and its result is being written: it is written."
    import alpaca_ft.run
    save = alpaca_ft.run.save_model

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        save(*args)
    monkeypatch.setattr(alpaca_ft.run, 'save_model', interrupted)
    run = train(run_config(tiny, rows, 'run'))
    assert (run.out/'model'/'model.safetensors').exists()


# two runs

def test_two_runs_started_together(here, tiny, rows):
    "They get two folders, each with its own run."
    begin = [several.Command('train', '--model', tiny, '--data', rows, *OPTIONS, '--max-steps', 3, '--seed', seed)
             for seed in (1, 2)]
    for p in begin:
        assert p.wait() == 0, p.stderr
    found = sorted(Path('runs').iterdir())
    import yaml
    seeds = {yaml.safe_load((f/'config.yaml').read_text())['seed'] for f in found}
    assert len(found) == 2 and seeds == {1, 2} and all(len(losses(f)) == 3 for f in found)


def test_folder_in_use(here, tiny, rows):
    from filelock import FileLock
    Path('run').mkdir()
    with FileLock('run/.lock'):
        with pytest.raises(Refused, match='another run is at work there'):
            train(run_config(tiny, rows, 'run'))


# another run

@pytest.fixture(scope='module')
def begun(tiny, rows, tmp_path_factory):
    "A run that was stopped after two of four steps."
    out = tmp_path_factory.mktemp('begun')
    copy_model(tiny, out/'model')
    here = os.getcwd()
    os.chdir(out)
    try:
        train(run_config('./model', rows, 'run', save_every=2))
        shutil.rmtree('run/model')
        shutil.rmtree('run/checkpoints/step-4')
    finally:
        os.chdir(here)
    return out


def change_config(**kw):
    "Change entries of the model's config.json."
    path = Path('model/config.json')
    path.write_text(json.dumps(json.loads(path.read_text()) | kw))


def change_merges():
    "Take the last merge away: other tokens, the same text."
    path = Path('model/tokenizer.json')
    about = json.loads(path.read_text())
    about['model']['merges'] = about['model']['merges'][:-20]
    path.write_text(json.dumps(about))


CHANGES = {
    'rope theta': (lambda: change_config(rope_parameters=dict(rope_theta=500., rope_type='default')), [],
                   "model's config"),
    'activation': (lambda: change_config(hidden_act='gelu'), [], "model's config"),
    'merges': (change_merges, [], 'tokenizer is not the same'),
    'precision': (lambda: None, ['--dtype', 'bf16'], 'dtype was fp32 and is bf16'),
}


@pytest.mark.parametrize('name', CHANGES)
def test_resume_of_another_run(name, begun, rows, tmp_path, monkeypatch, command):
    shutil.copytree(begun, tmp_path/'w')
    monkeypatch.chdir(tmp_path/'w')
    change, options, part = CHANGES[name]
    change()
    code, out, err = command('train', '--model', './model', '--data', rows, *OPTIONS, '--max-steps', 4, '--lr', '1e-3',
                             '--out', 'run', '--resume', *options)
    assert code == 2 and part in err and len(err.splitlines()) == 1, err


def test_processor_is_named(begun, rows, tmp_path, monkeypatch, command):
    "Another processor rounds otherwise: the run goes on, and says so."
    import yaml
    shutil.copytree(begun, tmp_path/'w')
    monkeypatch.chdir(tmp_path/'w')
    about = yaml.safe_load(Path('run/config.yaml').read_text())
    about['manifest']['processor'] = 'x86_64 OTHER'
    Path('run/config.yaml').write_text(yaml.safe_dump(about))
    code, out, err = command('train', '--model', './model', '--data', rows, *OPTIONS, '--max-steps', 4, '--lr', '1e-3',
                             '--out', 'run', '--resume')
    assert code == 0 and 'processor was x86_64 OTHER' in err, err


def test_run_ends_like_the_one_left_alone(begun, rows, tmp_path, monkeypatch, command):
    shutil.copytree(begun, tmp_path/'w')
    monkeypatch.chdir(tmp_path/'w')
    whole = losses('run')
    code, out, err = command('train', '--model', './model', '--data', rows, *OPTIONS, '--max-steps', 4, '--lr', '1e-3',
                             '--save-every', 2, '--out', 'run', '--resume')
    assert code == 0 and losses('run') == whole, err


def test_stopped_at_the_last_step(begun, rows, tmp_path, monkeypatch, command):
    "A checkpoint of the last step leaves nothing to train, and the model to be saved."
    shutil.copytree(begun, tmp_path/'w')
    monkeypatch.chdir(tmp_path/'w')
    args = ['train', '--model', './model', '--data', rows, *OPTIONS, '--max-steps', 4, '--lr', '1e-3', '--save-every',
            2,
            '--out', 'run', '--resume']
    assert command(*args)[0] == 0
    weights = Path('run/model/model.safetensors').read_bytes()
    shutil.rmtree('run/model')
    assert command(*args)[0] == 0 and Path('run/model/model.safetensors').read_bytes() == weights


# isolation

def test_isolation_is_looked_for_where_documents_are(here, tiny, rows):
    "Eighty rows of one document come first, and hide two hundred short ones from who looks at the first fifty."
    from alpaca_ft.run import fullest_row, prepare
    lines = [dict(instruction=f'Say something number {i}', input='', output=f'word{i} '*400) for i in range(80)]
    lines += [dict(instruction=f'Hi {i}', input='', output=f'Hello there {i}') for i in range(200)]
    Path('rows.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in lines))
    run = prepare(run_config(tiny, 'rows.jsonl', None))
    assert max(map(len, run.train['seq_lengths'][:50])) == 1 < len(fullest_row(run.train)['seq_lengths'])


def test_model_that_reads_what_follows(here, rows, tokenizer, command):
    "BERT's attention looks ahead as well, so it sees the token that it is to guess: refused before any work."
    from transformers import BertConfig, BertLMHeadModel
    torch.manual_seed(0)
    BertLMHeadModel(BertConfig(vocab_size=640, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
                               num_attention_heads=4, bos_token_id=0, eos_token_id=1, pad_token_id=1)
                    ).save_pretrained('bert')
    tokenizer.save_pretrained('bert')
    code, out, err = command('train', '--model', './bert', '--data', rows, *OPTIONS, '--out', 'run')
    assert code == 2 and 'documents in one row read each other' in err.splitlines()[-1] and not Path('run').exists()


def test_documents_that_cannot_share_a_row(here, rows, tokenizer):
    "Bloom's own attention knows nothing of documents, and Mamba's state runs on: each document gets a row of its own."
    from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM
    common = dict(vocab_size=640, hidden_size=32, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    torch.manual_seed(0)
    models = dict(bloom=BloomForCausalLM(BloomConfig(n_layer=4, n_head=4, **common)),
                  mamba=MambaForCausalLM(MambaConfig(num_hidden_layers=4, state_size=8, **common)))
    for name, model in models.items():
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
        run = train(run_config(f'./{name}', rows, f'run-{name}', max_steps=2))
        assert 'each document is computed in a row of its own' in run.step.says and run.report['isolated']


# kept states

@pytest.fixture
def cache(tmp_path, monkeypatch):
    "An empty cache."
    monkeypatch.setenv('ALPACA_FT_CACHE', str(tmp_path/'cache'))
    return tmp_path/'cache'


def test_damaged_states_are_made_anew(here, tiny, rows, cache, capfd):
    first = train(run_config(tiny, rows, 'a', prefix_cache='disk'))
    path = next(cache.rglob('*.bin'))
    data = path.read_bytes()
    path.write_bytes(data[:len(data)//2] + bytes(len(data) - len(data)//2))
    train(run_config(tiny, rows, 'b', prefix_cache='disk'))
    assert 'is damaged, so it is made anew' in capfd.readouterr().err
    assert losses('a') == losses('b') and path.read_bytes() == data
    train(run_config(tiny, rows, 'c', prefix_cache='disk'))
    assert 'is there from an earlier run' in capfd.readouterr().err and losses('a') == losses('c')
    assert not list(cache.rglob('*.part')) and first.report['prefix_cache'] == 'disk'


def test_full_disk_while_states_are_written(here, tiny, rows, cache):
    "No file may grow beyond 300 kB: one line, not SIGBUS."
    args = ['train', '--model', tiny, '--data', rows, *OPTIONS, '--epochs', '3', '--prefix-cache', 'disk', '--out',
            'run']
    r = several.command(*args, before=lambda: several.file_limit(300_000))
    assert r.returncode == 2 and 'cannot be written' in r.stderr.splitlines()[-1], r.stderr
    assert not list(cache.rglob('*.part')) and not list(cache.rglob('*.bin')) and not Path('run').exists()


def test_killed_while_states_are_written(here, tiny, rows, cache):
    def killed_at_the_tenth():
        from alpaca_ft.prefix import Trunk
        plain, calls = Trunk.forward, []
        def forward(*args):
            calls.append(args)
            if len(calls) == 10:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*args)
        Trunk.forward = forward
    args = ['train', '--model', tiny, '--data', rows, *OPTIONS, '--epochs', '3', '--prefix-cache', 'disk']
    r = several.command(*args, '--out', 'killed', before=killed_at_the_tenth)
    assert r.returncode == -signal.SIGKILL and list(cache.rglob('*.part'))
    r = several.command(*args, '--out', 'killed', '--resume')
    assert r.returncode == 0 and not list(cache.rglob('*.part')) and len(list(cache.rglob('*.bin'))) == 1, r.stderr


def test_auto_turns_off(here, rows, tokenizer, capfd):
    "A model that passes no arguments on to its layers cannot take kept states: `auto` says so, a wish is refused."
    from transformers import GPTNeoConfig, GPTNeoForCausalLM
    torch.manual_seed(0)
    GPTNeoForCausalLM(GPTNeoConfig(vocab_size=640, hidden_size=32, num_layers=4, num_heads=4, intermediate_size=64,
                                   attention_types=[[['global'], 4]], max_position_embeddings=512, resid_dropout=0,
                                   embed_dropout=0, attention_dropout=0, bos_token_id=0, eos_token_id=1)
                      ).save_pretrained('neo')
    tokenizer.save_pretrained('neo')
    train(run_config('./neo', rows, 'run', max_steps=None, epochs=3, prefix_cache='auto'))
    assert 'frozen layers: computed each time (GPTNeoForCausalLM does not pass arguments on' in capfd.readouterr().err
    with pytest.raises(Refused, match='does not pass arguments on to its layers'):
        train(run_config('./neo', rows, 'other', prefix_cache='memory'))


def test_states_that_are_kept_no_more(here, tiny, rows, cache, monkeypatch, capfd):
    "Where `auto` decides otherwise when a run goes on, the user is told; rounding may differ."
    kw = dict(n_freeze=3, max_steps=None, epochs=3, prefix_cache='auto', save_every=20, keep=9)
    assert train(run_config(tiny, rows, 'whole', **kw)).report['prefix_cache'] == 'memory'
    shutil.rmtree('whole/model')
    shutil.copytree('whole', 'run')
    train(run_config(tiny, rows, 'whole', resume=True, **kw))
    err = capfd.readouterr().err
    assert 'going on from whole' in err and 'may differ' not in err
    monkeypatch.setattr('alpaca_ft.prefix.room_for_states', lambda: dict(memory=0, disk=0))
    train(run_config(tiny, rows, 'run', resume=True, **kw))
    err = capfd.readouterr().err
    assert 'kept states were in memory and are off: the end may differ from that of a run without inter' in err, err


# what a head and an attention do

def test_fast_ways_that_do_not_work(tmp_path, tiny, monkeypatch):
    "Packages that are installed and cannot be imported: the next best way is taken, and the line says why."
    from importlib.util import find_spec
    from alpaca_ft import freeze, load_model
    from alpaca_ft import speed
    if find_spec('flash_attn') or find_spec('kernels'):
        pytest.skip('transformers finds other ways to flash attention here')
    (tmp_path/'liger_kernel').mkdir()
    (tmp_path/'liger_kernel'/'__init__.py').write_text("raise ImportError('undefined symbol: of another version')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split('.')[0] == 'liger_kernel']:
        monkeypatch.delitem(sys.modules, name)
    model = freeze(load_model(str(tiny)), 2, frozen_dtype=torch.float32, verbose=False)
    row = dict(input_ids=torch.randint(3, 97, (192,)).tolist(), completion_mask=[1]*192, seq_lengths=[120, 72])
    found = {}
    for best in (speed.Step(speed.FLASH, speed.linear_loss), speed.Step(speed.MASKED, speed.liger_linear_loss)):
        monkeypatch.setattr(speed, 'candidates', lambda device, logits: best)  # as a GPU's, on this processor
        step = speed.choose_step(model, [row], 1, 120)
        found[step.attention.name, step.head.__name__] = step.says
    assert list(found) == [('sdpa', 'linear_loss'), ('sdpa', 'torch_linear_loss')]
    assert 'FlashAttention2' in found['sdpa', 'linear_loss'], found
    assert 'undefined symbol: of another version' in found['sdpa', 'torch_linear_loss'], found


def test_limits_in_bf16():
    "The demo was refused for one gradient that bf16 rounds by 16 %; a single token that leaks is still seen."
    from dataclasses import replace
    from alpaca_ft import freeze, load_alpaca, load_model, load_tokenizer, pack, tokenize
    from alpaca_ft import speed
    from alpaca_ft.model import Tail, settle
    from alpaca_ft.trainer import PackedLoss
    if settle('auto').dtype != torch.bfloat16:
        pytest.skip('bf16 takes minutes here')
    tokenizer = load_tokenizer('demo')
    model = freeze(load_model('demo', dtype=torch.float32), 24, frozen_dtype=torch.bfloat16, verbose=False)
    train, _ = pack(tokenize(load_alpaca('demo')['train'].select(range(200)), tokenizer), 512)

    def leaks(document_lengths, width, device):
        "The second document begins a token too early."
        lengths = [[first - 1, second + 1] for first, second in document_lengths]
        return speed.BY_DOCUMENT.arguments(lengths, width, device)

    leaking = speed.Step(replace(speed.BY_DOCUMENT, arguments=leaks), speed.linear_loss)
    fast = speed.Step(speed.BY_DOCUMENT, speed.linear_loss)
    for i in (0, 4):
        both, alone = speed.piece_of(train[i])
        right = speed.documents_alone(model, alone, tokenizer.pad_token_id)
        found = []
        for step in (fast, leaking):
            way = PackedLoss(Tail(model, 0, step.attention), step.head)
            found.append(speed.apart(right, speed.loss_and_gradients(way, [both], tokenizer.pad_token_id)))
        (_, largest, median), (_, _, of_leak) = found
        assert median < .04 and largest < .2 and of_leak > .17, found
        assert speed.why_wrong(model, fast, both, right, tokenizer.pad_token_id) is None
        assert 'read each other' in speed.why_wrong(model, leaking, both, right, tokenizer.pad_token_id)


def test_memory_that_ran_out_is_no_reason(tiny, monkeypatch):
    "A way for which there is no memory is not one that a model cannot be computed in."
    from alpaca_ft import freeze, load_model
    from alpaca_ft import speed

    def no_room(*args):
        raise MemoryError
    model = freeze(load_model(str(tiny)), 2, frozen_dtype=torch.float32, verbose=False)
    row = dict(input_ids=torch.randint(3, 97, (192,)).tolist(), completion_mask=[1]*192, seq_lengths=[120, 72])
    monkeypatch.setattr(speed, 'candidates', lambda device, logits: speed.Step(speed.BY_DOCUMENT, no_room))
    with pytest.raises(MemoryError):
        speed.choose_step(model, [row], 1, 120)



@pytest.mark.parametrize('dtype', ['fp32', 'bf16'])
def test_softcap_keeps_the_plain_head(dtype, here, rows, tokenizer):
    "With a softcap of the logits, the head's product alone is not the model's."
    from transformers import Gemma2Config, Gemma2ForCausalLM
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(
        vocab_size=640, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, max_position_embeddings=512, query_pre_attn_scalar=8, sliding_window=64, bos_token_id=0,
        eos_token_id=1, pad_token_id=1))
    for p in model.parameters():
        if p.dim() == 2:
            p.data *= 5
    model.save_pretrained('gemma')
    tokenizer.save_pretrained('gemma')
    run = train(run_config('./gemma', rows, 'run', dtype=dtype, max_steps=1))
    assert run.step.head is None and run.step.attention is None
    assert 'softcap of 30' in run.step.says and '64 tokens back' in run.step.says


def test_window_longer_than_documents_is_no_hindrance(tiny):
    from alpaca_ft import load_model
    from alpaca_ft.speed import attention_is_plain
    model = load_model(str(tiny))
    model.config.sliding_window = 100
    assert attention_is_plain(model, 100) is None and 'reaches 100 tokens back' in attention_is_plain(model, 101)


# evaluation

def test_rows_appended_after_the_run(here, tiny, rows, command):
    "The split would fall elsewhere, and rows that were trained on would be among those held back."
    shutil.copy(rows, 'rows.jsonl')
    train(run_config(tiny, 'rows.jsonl', 'run'))
    args = ['evaluate', 'run', '--n-samples', 0]
    assert command(*args)[0] == 0
    with open('rows.jsonl', 'a') as f:
        for i in range(20):
            f.write(json.dumps(dict(instruction=f'Say {i}.', input='', output=f'It is {i}.')) + '\n')
    code, out, err = command(*args)
    assert code == 2 and 'the rows are not those of the run any more' in err, err


@pytest.mark.filterwarnings('ignore')
def test_judge_is_not_followed_elsewhere(monkeypatch):
    "A redirect would carry the key to another host."
    import http.server
    from alpaca_ft.evaluate import ask_judge
    seen = []

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.headers.get('Authorization'))
            self.send_response(200)
            self.end_headers()
        do_POST = do_GET

        def log_message(self, *args):
            pass
    other = http.server.HTTPServer(('127.0.0.1', 0), Other)

    class Judge(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers['Content-Length']))
            self.send_response(302)
            self.send_header('Location', f'http://localhost:{other.server_port}/x')
            self.end_headers()

        def log_message(self, *args):
            pass
    judge = http.server.HTTPServer(('127.0.0.1', 0), Judge)
    for server in (other, judge):
        threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('OPENAI_API_KEY', 'sk-secret')
    with pytest.raises(Refused, match='302'):
        ask_judge(f'http://127.0.0.1:{judge.server_port}/v1', 'm', 'q')
    assert not seen


# the machine

def test_memory_of_a_container(tmp_path):
    "What is left in a container, not what the host has; files that were read are dropped where room is needed."
    import psutil
    from alpaca_ft.prefix import available_memory
    (tmp_path/'own').write_text('0::/\n')
    def told(**files):
        for name, text in files.items():
            (tmp_path/f'memory.{name}').write_text(f'{text}\n')
        return available_memory(tmp_path, tmp_path/'own')
    assert told() > 3_000_000  # no container
    assert told(max=3_000_000, current=1_000_000, stat='anon 1000000\nactive_file 0\ninactive_file 0') == 2_000_000
    stat = 'anon 300000\nfile 2700000\nshmem 500000\ninactive_file 1500000\nactive_file 700000'
    assert told(current=3_000_000, stat=stat) == 2_200_000
    assert told(current=9_000_000) == 0
    assert told(max='max') > psutil.virtual_memory().total//100


@pytest.mark.parametrize('version', [1, 2])
def test_memory_of_a_group(version, tmp_path):
    "A job of Slurm or a service of systemd: its own group has a limit, or one that it lies in."
    import psutil
    from alpaca_ft.prefix import available_memory
    job = '/slurm/uid_0/job_7'
    (tmp_path/'own').write_text(f'4:cpu,memory:{job}/step_0\n3:cpu:/elsewhere\n0::/\n' if version == 1 else
                                f'4:cpuset:/elsewhere\n0::{job}/step_0\n')
    limit, used, total = ('limit_in_bytes', 'usage_in_bytes', 'total_') if version == 1 else ('max', 'current', '')
    root = tmp_path/'memory' if version == 1 else tmp_path
    def told(group, most, n, active, inactive):
        folder = root/group.strip('/')
        folder.mkdir(parents=True, exist_ok=True)
        (folder/f'memory.{limit}').write_text(f'{most}\n')
        (folder/f'memory.{used}').write_text(f'{n}\n')
        stat = f'anon 5\n{total}active_file {active}\n{total}inactive_file {inactive}\n'
        (folder/'memory.stat').write_text(stat)
        return available_memory(tmp_path, tmp_path/'own')
    none = 2**63 - 4096 if version == 1 else 'max'
    assert told(f'{job}/step_0', none, 9_000_000, 0, 0) > psutil.virtual_memory().total//100
    assert told('/elsewhere', 1000, 0, 0, 0) > 3_000_000
    assert told(job, 3_000_000, 2_000_000, 200_000, 300_000) == 1_500_000
    assert told('/slurm', 9_000_000, 8_000_000, 0, 0) == 1_000_000
    assert told(f'{job}/step_0', 2_000_000, 1_900_000, 0, 0) == 100_000
    assert told('/slurm', 9_000_000, 9_500_000, 0, 0) == 0


def test_several_gpus_are_refused(monkeypatch):
    import accelerate
    from types import SimpleNamespace
    from alpaca_ft.model import settle
    monkeypatch.setattr(accelerate, 'PartialState', lambda: SimpleNamespace(device=torch.device('cuda', 0)))
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(Refused, match='2 GPUs are visible and one process uses one; .* or set CUDA_VISIBLE_DEVICES=0'):
        settle('bf16')


# tokenizers

def test_tokenizer_that_appends_eos(tokenizer):
    "In training and in generation a prompt ends alike: without an EOS."
    import copy
    from datasets import Dataset
    from tokenizers.processors import TemplateProcessing
    from alpaca_ft import create_prompt_no_answer, fit_prompt, tokenize
    from alpaca_ft.prompts import prompt_ids
    from alpaca_ft.use import turn_ids
    tok = copy.deepcopy(tokenizer)
    tok.backend_tokenizer.post_processor = TemplateProcessing(
        single='<s> $A </s>', special_tokens=[('<s>', 0), ('</s>', 1)])
    row = dict(instruction='Name a tree.', input='', output='Oak')
    trained = tokenize(Dataset.from_list([row]), tok)[0]['input_ids']
    prompt = prompt_ids(create_prompt_no_answer(row)['text'], tok)
    assert trained[:len(prompt)] == prompt and prompt[-1] != tok.eos_token_id and trained.count(tok.eos_token_id) == 1
    assert turn_ids('Name a tree.', tok, True) == prompt and fit_prompt(row, tok).endswith('### Response:\n')


def test_ids_with_a_gap(tmp_path, tokenizer):
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from alpaca_ft import tokenize
    about = json.loads(tokenizer.backend_tokenizer.to_str())
    last = max(about['model']['vocab'], key=about['model']['vocab'].get)
    about['model']['vocab'][last] = 650
    (tmp_path/'tokenizer.json').write_text(json.dumps(about))
    tok = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path/'tokenizer.json'), eos_token='</s>', pad_token='</s>')
    row = tokenize(Dataset.from_list([dict(instruction='Name a tree.', input='', output='Oak')]), tok)[0]
    said = [i for i, m in zip(row['input_ids'], row['completion_mask']) if m]
    assert tok.decode(said) == 'Oak</s>'


def test_slow_tokenizer():
    from datasets import Dataset
    from alpaca_ft import tokenize

    class Slow:
        eos_token_id = 1
    with pytest.raises(Refused, match='does not say where a response begins'):
        tokenize(Dataset.from_list([dict(instruction='a', input='', output='b')]), Slow())


# commands

def test_check_refuses_what_train_refuses(here, tiny, rows, command):
    common = ['--model', tiny, '--data', rows, *OPTIONS]
    for more, part in ((['--log-model'], 'needs --track wandb'), (['--out', 'full'], 'exists already')):
        Path('full').mkdir(exist_ok=True)
        Path('full/notes.txt').write_text('mine')
        for name in ('check', 'train'):
            code, out, err = command(name, *common, *more)
            assert code == 2 and part in err and len(err.splitlines()) == 1, (name, err)


def test_config_of_a_run(here, tiny, rows, command):
    "A run's own config.yaml is a file of options; its folder is not taken along."
    common = ['--model', tiny, '--data', rows, *OPTIONS, '--max-steps', 2]
    assert command('train', *common, '--out', 'one')[0] == 0
    code, out, err = command('train', '--config', 'one/config.yaml', '--out', 'two')
    assert code == 0 and losses('one') == losses('two'), err


def test_none_and_epochs(command, tiny, rows, here):
    from alpaca_ft.options import plan, read_config
    assert read_config(max_steps='none').max_steps is None
    assert plan(30, RunConfig(epochs=1, max_steps=1000))['steps'] == 30
    assert plan(30, RunConfig(max_steps=1000))['steps'] == 1000 and plan(30, RunConfig(epochs=2))['steps'] == 60


def test_head_alone_is_said(here, tiny, rows, command):
    code, out, err = command('check', '--model', tiny, '--data', rows, '--n-freeze', 4, '--seq-len', 256, '--dtype',
                             'fp32')
    assert code == 0 and 'warning   all 4 layers are frozen, so the head alone is trained' in out, out


def test_processes_that_cannot_meet(here, tiny, rows):
    "Started without a launcher's words: refused in one line, before anything is loaded."
    begin = time.time()
    r = several.command('train', '--model', tiny, '--data', rows, *OPTIONS, env=dict(WORLD_SIZE='2', RANK='0'))
    said = 'alpaca_ft: 2 processes (WORLD_SIZE), but LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set'
    assert r.returncode == 2 and r.stderr.startswith(said), r.stderr
    assert len(r.stderr.splitlines()) == 1 and not Path('runs').exists() and time.time() - begin < 60


def test_module_is_the_command():
    r = subprocess.run([sys.executable, '-m', 'alpaca_ft', '--help'], capture_output=True, text=True)
    assert r.returncode == 0 and 'alpaca_ft' in r.stdout
    r = subprocess.run([sys.executable, '-m', 'alpaca_ft.cli', '--help'], capture_output=True, text=True)
    assert r.returncode == 0 and 'train' in r.stdout


def test_peak_memory_units(monkeypatch):
    import resource
    from alpaca_ft import cli
    usage = type('Usage', (), dict(ru_maxrss=2**30))
    monkeypatch.setattr(resource, 'getrusage', lambda who: usage)
    monkeypatch.setattr(sys, 'platform', 'darwin')
    assert cli.peak_memory() == '; peak memory 1.0 GiB'
    monkeypatch.setattr(sys, 'platform', 'linux')
    assert cli.peak_memory() == '; peak memory 1024.0 GiB'


def test_no_resource_module(monkeypatch):
    "Windows has none."
    from alpaca_ft import cli
    monkeypatch.setitem(sys.modules, 'resource', None)
    assert cli.peak_memory() == ''


@pytest.mark.parametrize('typed', [True, False])
def test_remote_code_is_asked_for(typed, monkeypatch):
    "What a run says of it does not count, only what is typed now."
    import alpaca_ft.use as use
    seen = []
    monkeypatch.setattr(use, 'find_model', lambda run: ('folder', dict(trust_remote_code=True)))
    monkeypatch.setattr(use, 'load_model', lambda name, dtype=None,
                        trust_remote_code=False: seen.append(trust_remote_code))
    monkeypatch.setattr(use, 'load_tokenizer', lambda name, trust: seen.append(trust))
    monkeypatch.setattr(use, 'check_tokens', lambda name, model, tokenizer: None)
    use.load_both('run', trust_remote_code=typed)
    assert seen == [typed, typed]


# multimodal models

def test_layers_are_those_of_the_text(tokenizer):
    "A vision tower may have as many layers as the text model; they are not the ones to freeze."
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig
    from alpaca_ft import decoder_layers
    text = Gemma3TextConfig(vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
                            num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512)
    vision = SiglipVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
                                image_size=28, patch_size=14)
    with torch.device('meta'):
        model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text.to_dict(), vision_config=vision.to_dict()))
    assert 'Gemma3DecoderLayer' in type(decoder_layers(model)[0]).__name__


# structure

def test_one_mechanism():
    "No registry, no classes made by type(), no state of a forward pass in a module."
    import ast
    for path in (Path(__file__).parent.parent/'alpaca_ft').glob('*.py'):
        tree = ast.parse(path.read_text(encoding='utf-8'))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'type':
                assert len(node.args) == 1, f'{path.name}:{node.lineno}: type() with three arguments'
            assert not isinstance(node, ast.Global), f'{path.name}:{node.lineno}: global'
        assert 'PLUGINS' not in path.read_text(encoding='utf-8'), path.name



def test_routers_have_their_loss(here, rows, tokenizer):
    "A model whose config asks for the routers' loss gets it, as transformers computes it; nothing is kept then."
    from transformers import MixtralConfig, MixtralForCausalLM
    from alpaca_ft import PackedLoss, Tail, freeze
    from alpaca_ft.trainer import StepCollator
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(
        vocab_size=640, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, num_local_experts=4, num_experts_per_tok=2,
        output_router_logits=True, router_aux_loss_coef=0.5, bos_token_id=0, eos_token_id=1, pad_token_id=1))
    freeze(model, 2, frozen_dtype=torch.float32, verbose=False)
    ids = list(range(5, 69))
    batch = StepCollator(1, 'all')([dict(input_ids=ids, completion_mask=[1]*64, seq_lengths=[64])])
    theirs = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
    ours = PackedLoss(Tail(model)).eval()(**batch)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    model.save_pretrained('mixtral')
    tokenizer.save_pretrained('mixtral')
    run = train(run_config('./mixtral', rows, 'run', max_steps=2))
    assert run.trainer.model.router_loss and run.trainer.model.router_weight == 0.5  # TRL writes 0 to the config
    assert run.report['prefix_cache'] == 'off' and run.step.head is None and len(losses('run')) == 2


def with_router_loss(folder, tokenizer, **kw):
    "A small Mixtral that is trained on its routers' loss."
    from transformers import MixtralConfig, MixtralForCausalLM
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(
        vocab_size=640, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, num_local_experts=4, num_experts_per_tok=2,
        output_router_logits=True, router_aux_loss_coef=0.5, bos_token_id=0, eos_token_id=1, pad_token_id=1, **kw))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def test_loss_of_routers_in_a_step(here, rows, tokenizer):
    "A mean over the step's labels of what each row has alone, without padding, whatever the batch and its parts."
    import matrix
    from alpaca_ft import load_alpaca, pack, split_alpaca, tokenize
    model = with_router_loss('mixtral', tokenizer)
    common = dict(seq_len=200, prefix_cache='off', n_samples=0)
    one, four, parts = (run_config('./mixtral', rows, name, max_steps=1, **common, **more) for name, more in (
        ('one', dict(batch_size=1)), ('four', dict(batch_size=4)), ('parts', dict(batch_size=4, micro_batch_size=2))))
    runs = [train(cfg) for cfg in (one, four, parts)]
    packed = pack(tokenize(split_alpaca(load_alpaca(str(rows))['train'], 42)['train'], tokenizer), 200)[0]
    order = torch.randperm(len(packed), generator=torch.Generator().manual_seed(42)).tolist()
    for run, n in zip(runs, (1, 4, 4)):
        total, labels = 0, 0
        for i in order[:n]:
            row = packed[i]
            ids = torch.tensor([row['input_ids']])
            position_ids = torch.cat([torch.arange(length) for length in row['seq_lengths']])[None]
            with torch.no_grad():
                out = model(input_ids=ids, position_ids=position_ids, use_cache=False, output_router_logits=True)
            loss, own = matrix.loss_and_tokens(model, row, 'all', 'fp32')
            total, labels = total + loss.item() + 0.5*out.aux_loss.item()*own, labels + own
        assert losses(run.out)[0] == pytest.approx(total/labels, abs=2e-5), (run.out, n)
    assert losses('four') == losses('parts') and runs[2].cfg.micro_batch_size == 1


def test_class_without_a_loss_of_routers(here, rows, tokenizer):
    "Llama 4's config has the options, and its class computes no such loss."
    from transformers import Llama4ForCausalLM, Llama4TextConfig
    torch.manual_seed(0)
    Llama4ForCausalLM(Llama4TextConfig(
        vocab_size=640, hidden_size=32, intermediate_size=64, intermediate_size_mlp=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512, num_local_experts=4,
        num_experts_per_tok=1, output_router_logits=True, router_aux_loss_coef=0.1, bos_token_id=0, eos_token_id=1,
        pad_token_id=1)).save_pretrained('llama4')
    tokenizer.save_pretrained('llama4')
    train(run_config('./llama4', rows, 'run', max_steps=2))
    assert len(losses('run')) == 2


def test_long_rope(here, rows, tokenizer):
    "Beyond the length where its rotations change, all documents of a step would be read as if they were long."
    from transformers import Phi3Config, Phi3ForCausalLM
    torch.manual_seed(0)
    rope = dict(rope_type='longrope', rope_theta=1e4, short_factor=[1.]*4, long_factor=[4., 8., 16., 32.],
                original_max_position_embeddings=150)
    Phi3ForCausalLM(Phi3Config(
        vocab_size=640, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, original_max_position_embeddings=150, rope_parameters=rope,
        bos_token_id=0, eos_token_id=1, pad_token_id=1)).save_pretrained('phi')
    tokenizer.save_pretrained('phi')
    with pytest.raises(Refused, match='give --seq-len 150 at most'):
        train(run_config('./phi', rows, 'run', max_steps=2, seq_len=256))
    assert not Path('run').exists()
    train(run_config('./phi', rows, 'run', max_steps=2, seq_len=150))


def test_positions_of_mpt(here, rows, tokenizer):
    from transformers import MptConfig, MptForCausalLM
    MptForCausalLM(MptConfig(vocab_size=640, d_model=32, n_layers=4, n_heads=4, max_seq_len=192)).save_pretrained('mpt')
    tokenizer.save_pretrained('mpt')
    with pytest.raises(Refused, match='has 192 positions; give at most that'):
        train(run_config('./mpt', rows, 'run', max_steps=2, seq_len=256))


def test_states_are_read_ahead(tmp_path):
    from alpaca_ft.prefix import map_states, write_states
    rows = [torch.randn(n, 8).to(torch.bfloat16) for n in (700, 1, 900)]
    path = tmp_path/'states.bin'
    write_states(path, iter(rows), sum(r.numel()*2 for r in rows))
    states = map_states(path, [700, 1, 900], torch.bfloat16, 8)
    states.read_ahead([2, 0])
    assert all(torch.equal(a, b) for a, b in zip(rows, states, strict=True))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_heads_agree(dtype):
    "Our own head loss and PyTorch's, against logits and cross entropy in fp32: losses and gradients."
    from torch.nn.functional import cross_entropy
    from alpaca_ft.speed import linear_loss, torch_linear_loss
    torch.manual_seed(0)
    h = torch.randn(1000, 64).to(dtype)
    weight, targets = (torch.randn(2000, 64)*0.05).to(dtype).float(), torch.randint(0, 2000, (1000,))

    def measured(head):
        x, w = h.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = head(x, w, targets, 1/1000)
        loss.backward()
        return loss.item(), x.grad.float(), w.grad
    plain = measured(lambda x, w, t, scale: cross_entropy(x.float() @ w.T, t))
    for head in (linear_loss, torch_linear_loss):
        loss, dx, dw = measured(head)
        loss_limit, limit = (1e-5, 1e-5) if dtype == torch.float32 else (4e-3, 1e-2)
        assert abs(loss - plain[0]) < loss_limit
        assert (dx - plain[1]).norm() < limit*plain[1].norm() and (dw - plain[2]).norm() < limit*plain[2].norm()


def test_line_separators_in_answers(tmp_path):
    "Unicode knows more ends of a line than JSON lines do."
    from alpaca_ft import append_jsonl, read_jsonl
    rows = [dict(generation='one\u2028two\u2029three\x85four'), dict(generation='next')]
    append_jsonl(tmp_path/'samples.jsonl', rows)
    assert read_jsonl(tmp_path/'samples.jsonl') == rows


def test_killed_while_saving_is_tried(here, tiny, rows, command):
    "The folder holds nothing of a run yet: it can be started there, with --resume and without."
    args = ['train', '--model', tiny, '--data', rows, *OPTIONS, '--max-steps', 1, '--out', 'run']
    for more in (['--resume'], []):
        Path('run/saving.part/model.part').mkdir(parents=True)
        code, out, err = command(*args, *more)
        assert code == 0 and not Path('run/saving.part').exists(), err
        shutil.rmtree('run')


def test_places_of_documents():
    "Which tokens see each other, and where documents go that have rows of their own, token by token."
    from alpaca_ft.model import Apart
    from alpaca_ft.speed import MASKED
    lengths, width = [[3, 5, 2], [7, 1]], 12
    mask = MASKED.arguments(lengths, width, torch.device('cpu'))['attention_mask'][:, 0]
    where = Apart(lengths, width, torch.device('cpu'))
    documents = [[0]*3 + [1]*5 + [2]*2 + [None]*2, [0]*7 + [1] + [None]*4]
    for row, numbers in enumerate(documents):
        for i, j in itertools.product(range(width), repeat=2):
            assert mask[row, i, j] == (numbers[i] == numbers[j] and j <= i)
    x = torch.arange(1, 1 + 2*width).view(2, width)
    assert where.split(x).tolist() == [[1, 2, 3, 1, 1, 1, 1], [4, 5, 6, 7, 8, 1, 1], [9, 10, 1, 1, 1, 1, 1],
                                       [13, 14, 15, 16, 17, 18, 19], [20, 1, 1, 1, 1, 1, 1]]
    back = where.join(where.split(x))
    assert torch.equal(back[0, :10], x[0, :10]) and torch.equal(back[1, :8], x[1, :8])
    assert where.positions.tolist() == [list(range(7))]*5


def test_fused_head_in_bf16():
    "Where the embedding trains, in fp32, what reaches the head is fp32; its products are bf16 all the same."
    from conftest import tiny_model

    from alpaca_ft.model import Tail, apply_choice, resolve_choice
    from alpaca_ft.speed import linear_loss
    from alpaca_ft.trainer import PackedLoss, StepCollator
    kinds = []

    def head(hidden, *more):
        kinds.append(hidden.dtype)
        return linear_loss(hidden, *more)
    row = dict(input_ids=list(range(2, 98)), completion_mask=[1]*96, seq_lengths=[96])
    batch = StepCollator(1, 'all')([row])
    for kw, dtype in ((dict(method='full'), torch.bfloat16), (dict(n_freeze=2, freeze_embed=False), torch.bfloat16),
                      (dict(n_freeze=2), torch.bfloat16), (dict(method='full'), torch.float32)):
        model = tiny_model()
        apply_choice(model, resolve_choice(RunConfig(**kw), model), dtype)
        own, fused = (PackedLoss(Tail(model), way)(**batch).item() for way in (None, head))
        assert kinds.pop() == dtype and abs(own - fused) < 1e-5
