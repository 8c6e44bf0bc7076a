"""Runs that are killed, resumed, stopped by signals, out of disk or memory, or diverge. `make faults` runs the long
form of the first."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import several
import torch

from alpaca_ft import RunConfig
from alpaca_ft.checkpoints import Checkpoints, Failed, checkpoints, damage

here_ = Path(__file__).parent
OPTIONS = ['--n-freeze', 2, '--seq-len', 256, '--batch-size', 2, '--n-samples', 0, '--dtype', 'fp32']


def test_killed_and_resumed():
    """Five kills, spread over training, evaluation, sampling and a save (`make faults` tries fifty): the same end,
    bitwise."""
    r = subprocess.run([sys.executable, here_/'faults.py', '5', '2'], capture_output=True, text=True, timeout=600)
    assert r.returncode == 0 and '5 of 5 killed runs ended like the one left alone' in r.stdout, r.stdout + r.stderr


@pytest.mark.parametrize('when', ['loss', 'eval_loss'])
def test_signal(when, here, tiny, rows):
    """SIGTERM in a step or an evaluation: exit 75, a checkpoint of the last step that was logged, and a command that
    ends the run."""
    args = ['--model', tiny, '--data', rows, *OPTIONS, '--epochs', 20, '--eval-every', 5, '--out', 'run']
    p = several.Command('train', *args)
    log = Path('run/metrics.jsonl')
    while p.poll() is None and not (log.exists()
                                    and any(f'"{when}"' in l
                                            and '"step": 0' not in l for l in log.read_text().splitlines())):
        time.sleep(0.01)
    p.send_signal(signal.SIGTERM)
    p.wait()
    err = p.stderr
    assert p.returncode == 75 and not Path('run/model').exists(), err
    last = max(json.loads(l)['step'] for l in log.read_text().splitlines())
    assert [c.name for c in checkpoints(Path('run'))] == [f'step-{last}']
    assert damage(Path(f'run/checkpoints/step-{last}')) is None
    line = err.splitlines()[-1]
    said = rf'alpaca_ft: stopped by SIGTERM after step {last}; go on with: alpaca_ft train .*--out=run --resume$'
    assert re.match(said, line), line


def trained(here, tiny, rows, **kw):
    "A run in this process with a callback that acts at a moment."
    from alpaca_ft import train
    return train(RunConfig(**dict(model=str(tiny), data=str(rows), out=str(here/'run'), n_freeze=2, seq_len=256,
                                  batch_size=2, n_samples=0, dtype='fp32') | kw))


def test_second_signal_stops_at_once(tmp_path):
    saver, seen = Checkpoints(tmp_path, RunConfig()), []
    old = signal.signal(signal.SIGTERM, lambda *a: seen.append(a[0]))
    try:
        with saver.watch_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            assert saver.signal == 'SIGTERM' and not seen
            os.kill(os.getpid(), signal.SIGTERM)
            assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, old)


def test_keep(here, tiny, rows):
    trained(here, tiny, rows, save_every=1, keep=3, max_steps=6)
    assert [c.name for c in checkpoints(here/'run')] == ['step-4', 'step-5', 'step-6']


def test_only_what_trains(here, tiny, rows):
    from safetensors import safe_open
    run = trained(here, tiny, rows, save_every=2, max_steps=2)
    with safe_open(here/'run'/'checkpoints'/'step-2'/'weights.safetensors', 'pt') as f:
        names = set(f.keys())
    assert names == {k for k, p in run.model.named_parameters() if p.requires_grad}
    assert not any('layers.0.' in n or 'layers.1.' in n for n in names)
    assert {p.suffix for p in (here/'run'/'checkpoints').rglob('*') if p.is_file()} == {'.safetensors', '.json'}


def test_full_disk(here, tiny, rows):
    """No file may grow beyond 250 kB, so the optimizer's part of a checkpoint fails: one line, exit 1, no half
    checkpoint."""
    args = ['train', '--model', tiny, '--data', rows, *OPTIONS, '--save-every', 2, '--out', 'run']
    r = several.command(*args, before=lambda: several.file_limit(250_000))
    assert r.returncode == 1 and 'Traceback' not in r.stderr, r.stderr
    assert re.match(r'alpaca_ft: run: .*(File too large|os error 27).*a checkpoint takes .*no checkpoint was saved',
                    r.stderr.splitlines()[-1]), r.stderr
    assert not list(Path('run/checkpoints').iterdir())


def test_full_disk_keeps_the_older(here, tiny, rows, monkeypatch):
    import alpaca_ft.checkpoints
    save, n = alpaca_ft.checkpoints.save_file, []
    def full(tensors, path, *args, **kw):
        n.append(path)
        if len(n) > 4:
            Path(path).write_bytes(b'x')
            raise OSError(28, 'No space left on device', str(path))
        save(tensors, path, *args, **kw)
    monkeypatch.setattr(alpaca_ft.checkpoints, 'save_file', full)
    with pytest.raises(Failed,
                       match='No space left.*the last checkpoint is .*step-2; go on with: alpaca_ft train .*--resume'):
        trained(here, tiny, rows, save_every=2)
    assert [p.name for p in (here/'run'/'checkpoints').iterdir()] == ['step-2']
    assert damage(here/'run'/'checkpoints'/'step-2') is None


def test_diverged_names_the_batch(here, tiny, rows):
    "A weight becomes infinite after step 3; step 4 stops, names its rows, and the checkpoint of step 2 is sound."
    from transformers import TrainerCallback
    from alpaca_ft import Diverged, train

    class Break(TrainerCallback):
        def on_train_begin(self, args, state, control, train_dataloader=None, **kw):
            self.n = len(train_dataloader.dataset)

        def on_step_begin(self, args, state, control, model=None, **kw):
            if state.global_step == 3:
                model.tail.head.weight.data[0] = float('inf')

    broken = Break()
    with pytest.raises(Diverged) as e:
        train(RunConfig(model=str(tiny), data=str(rows), out='run', n_freeze=2, seq_len=256, batch_size=2, n_samples=0,
                        save_every=2, dtype='fp32', epochs=2), [broken])
    named = [int(n) for n in re.search(r'packed rows ([\d, ]+);', str(e.value))[1].split(', ')]
    order = list(torch.randperm(broken.n, generator=torch.Generator().manual_seed(42)))
    assert named == [int(i) for i in order[6:8]] and 'step 4' in str(e.value)
    assert 'the last checkpoint is run/checkpoints/step-2' in str(e.value)
    assert damage(Path('run/checkpoints/step-2')) is None
    losses = [json.loads(l)['loss'] for l in Path('run/metrics.jsonl').read_text().splitlines() if '"loss"' in l]
    assert len(losses) == 3 and all(losses)


def test_loss_spike(here, tiny, rows, command):
    code, out, err = command('train', '--model', tiny, '--data', rows, *OPTIONS, '--loss-spike-stop', '1.0', '--lr',
                             '0', '--epochs', 3, '--out', 'run')
    assert code == 3 and 'times its running mean' in err.splitlines()[-1], err


def test_out_of_memory(here, tiny, rows, command, monkeypatch):
    "An allocation that no machine has room for, made by the model: one line with three settings."
    from transformers import LlamaForCausalLM
    forward = LlamaForCausalLM.forward
    def hungry(self, *args, **kw):
        counted = type(next(self.parameters()).data) is not torch.Tensor  # on tensors without contents, for the advice
        if Path('run/config.yaml').exists() and not counted:
            torch.empty(1 << 50)
        return forward(self, *args, **kw)
    monkeypatch.setattr(LlamaForCausalLM, 'forward', hungry)
    code, out, err = command('train', '--model', tiny, '--data', rows, *OPTIONS, '--batch-size', 4,
                             '--micro-batch-size', 4, '--out', 'run')
    line = err.splitlines()[-1]
    assert code == 1 and line.startswith('alpaca_ft: out of memory: this run takes about'), err
    assert line.count(' less; ') == 3 and 'Traceback' not in err, err
    assert '--micro-batch-size 2' in line and 'no result changes; more and smaller passes' in line


def test_half_the_micro_batch_is_the_same_batch(here, tiny, rows):
    a = trained(here, tiny, rows, out=str(here/'a'), batch_size=4, micro_batch_size=4, max_steps=3)
    b = trained(here, tiny, rows, out=str(here/'b'), batch_size=4, micro_batch_size=2, max_steps=3)
    for (k, p), q in zip(a.model.named_parameters(), b.model.parameters()):
        assert torch.allclose(p, q, atol=1e-6), k


@pytest.fixture(scope='module')
def begun(tiny, rows, tmp_path_factory):
    "A run of four steps that was killed before its model was saved, with checkpoints of steps 2 and 4."
    import shutil
    from alpaca_ft import train
    out = tmp_path_factory.mktemp('begun')/'run'
    train(RunConfig(model=str(tiny), data=str(rows), out=str(out), n_freeze=2, seq_len=256, batch_size=2, n_samples=1,
                    max_new_tokens=2, dtype='fp32', max_steps=4, save_every=2))
    shutil.rmtree(out/'model')
    return out


CHANGES = {  # name: (arguments, what is done to the folder first, a part of the message)
    'layers': (['--n-freeze', 3], None, 'n_freeze was 2 and is 3'),
    'batch and seed': (['--batch-size', 4, '--seed', 1], None, 'batch_size was 2 and is 4; seed was 42 and is 1'),
    'never, whatever is said': (['--lr', 1, '--resume-anyway'], None, 'lr was 0.0002 and is 1.0'),
    'samples': (['--n-samples', 2], None, 'or --resume-anyway'),
    'data': (['--data', 'other.jsonl'], None, 'the data is not the same'),
    'model': (['--model', './other'], None, 'the model is not the same'),
    'ended': ([], lambda d: (d/'model').mkdir(), 'this run has ended'),
    'config.yaml': ([], lambda d: (d/'config.yaml').write_text('a: ['), 'config.yaml: cannot be read'),
    'a shorter log': ([], lambda d: (d/'metrics.jsonl').write_text(''), 'shorter than when step-4 was saved'),
    'no folder': (['--out', 'nowhere'], None, 'no run to resume'),
    'a folder of something else': (['--out', 'other'], None, 'no run to resume'),
}


@pytest.mark.parametrize('name', CHANGES)
def test_resume_refused(name, here, tiny, rows, begun, command):
    import shutil
    from conftest import tiny_model
    args, change, part = CHANGES[name]
    shutil.copytree(begun, 'run')
    shutil.copytree(tiny, 'other')
    m = tiny_model()
    m.lm_head.weight.data += 1
    m.save_pretrained('other')
    Path('other.jsonl').write_bytes(rows.read_bytes().replace(b'the', b'teh', 1))
    if change:
        change(Path('run'))
    files = {p: p.read_bytes() for p in Path('.').rglob('*') if p.is_file()}
    code, out, err = command('train', '--model', tiny, '--data', rows, *OPTIONS, '--n-samples', 1, '--max-new-tokens',
                             2, '--max-steps', 4, '--out', 'run', '--resume', *args)
    assert code == 2 and len(err.splitlines()) == 1 and part in err, err
    assert {p: p.read_bytes() for p in Path('.').rglob('*') if p.is_file()} == files


def test_resume_anyway(here, tiny, rows, begun, command):
    import shutil
    shutil.copytree(begun, 'run')
    with open('run/metrics.jsonl', 'a') as f:
        f.write('{"step": 5, "lo')
    weights = Path('run/checkpoints/step-4/weights.safetensors')
    weights.write_bytes(weights.read_bytes()[:-1] + b'x')
    code, out, err = command('train', '--model', tiny, '--data', rows, *OPTIONS, '--n-samples', 1, '--max-new-tokens',
                             3, '--max-steps', 4, '--out', 'run', '--resume', '--resume-anyway')
    assert code == 0 and 'step-4: damaged (weights.safetensors has another checksum)' in err, err
    assert 'going on from run/checkpoints/step-2' in err, err
    assert [json.loads(l)['step'] for l in Path('run/metrics.jsonl').read_text().splitlines() if '"loss"' in l] == [1,
            2, 3, 4]
