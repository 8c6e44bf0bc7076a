"Whole commands on a device of its own (see standin.py): what lies where, in which precision, and what has to wait."
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TRAIN = ['--n-freeze', '2', '--seq-len', '128', '--batch-size', '4', '--micro-batch-size', '2', '--n-samples', '1',
         '--max-new-tokens', '4', '--lr', '1e-3', '--max-steps', '6']


def on_device(*argv, double=True, **env):
    "The command on the stand-in device, in a process of its own."
    kind = 'double' if double else 'single'
    return subprocess.run([sys.executable, HERE/'device_run.py', kind, *map(str, argv)], capture_output=True, text=True,
                          env=os.environ | dict(OMP_NUM_THREADS='1') | env)


def losses(out):
    "Losses of a run, training and held-out."
    lines = [json.loads(line) for line in Path(out, 'metrics.jsonl').read_text().splitlines()]
    return [line[k] for line in lines for k in ('loss', 'eval_loss') if k in line]


@pytest.fixture(scope='module')
def on_cpu(tiny, rows, tmp_path_factory):
    "The same run on the CPU."
    from alpaca_ft import RunConfig, train
    out = tmp_path_factory.mktemp('cpu')/'run'
    train(RunConfig(model=str(tiny), data=str(rows), out=str(out), n_freeze=2, seq_len=128, batch_size=4,
                    micro_batch_size=2, n_samples=1, max_new_tokens=4, lr=1e-3, max_steps=6, dtype='fp32'))
    return losses(out)


@pytest.mark.parametrize('options', [
    '--prefix-cache off --dtype fp32', '--prefix-cache memory --dtype fp32',
    '--prefix-cache disk --activation-checkpointing --dtype fp32'])
def test_train(options, here, tiny, rows, on_cpu, tmp_path):
    "In every way to keep states: the losses of the CPU, on a device without float64."
    r = on_device('train', '--model', tiny, '--data', rows, *TRAIN, *options.split(), '--out', 'run', double=False,
                  ALPACA_FT_CACHE=str(tmp_path/'cache'))
    assert r.returncode == 0, r.stderr[-3000:]
    assert losses('run') == pytest.approx(on_cpu, abs=1e-5)
    assert (Path('run')/'model'/'model.safetensors').exists()


def test_bf16(here, tiny, rows, on_cpu):
    r = on_device('train', '--model', tiny, '--data', rows, *TRAIN, '--dtype', 'bf16', '--out', 'run')
    assert r.returncode == 0, r.stderr[-3000:]
    assert losses('run') == pytest.approx(on_cpu, abs=0.02) and losses('run') != pytest.approx(on_cpu, abs=1e-7)


def test_nothing_waits_for_the_device(here, tiny, rows, tmp_path):
    "A step copies its batch to the device, and back only what is logged: the loss and the norm, and the look at both."
    report = tmp_path/'copies.json'
    r = on_device('train', '--model', tiny, '--data', rows, *TRAIN, '--dtype', 'fp32', '--eval-every', 6, '--out', 'run',
                  COPIES=str(report))
    assert r.returncode == 0, r.stderr[-3000:]
    steps = json.loads(report.read_text())
    for step in '1234':
        back = sorted(place for place in steps[step] if place.startswith('to_host'))
        assert back == ['to_host trainer.py:_maybe_log_save_evaluate']*2 + ['to_host trainer.py:on_pre_optimizer_step'], back


def test_killed_and_resumed(here, tiny, rows):
    "SIGTERM: a checkpoint; resumed, the end of the run that was left alone."
    args = ['train', '--model', tiny, '--data', rows, *TRAIN, '--dtype', 'fp32', '--max-steps', 12]
    assert on_device(*args, '--out', 'whole').returncode == 0
    p = subprocess.Popen([sys.executable, HERE/'device_run.py', 'double', *map(str, args), '--out', 'run'],
                         stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                         env=os.environ | dict(OMP_NUM_THREADS='1'))
    log = Path('run/metrics.jsonl')
    while p.poll() is None and not (log.exists() and '"loss"' in log.read_text()):
        time.sleep(0.01)
    p.send_signal(signal.SIGTERM)
    assert p.wait(120) == 75
    r = on_device(*args, '--out', 'run', '--resume')
    assert r.returncode == 0, r.stderr[-3000:]
    assert losses('run') == losses('whole')
    same = [Path(f, 'model/model.safetensors').read_bytes() for f in ('run', 'whole')]
    assert same[0] == same[1]


def test_use(here, tiny, rows):
    "sample, chat, evaluate and export of a run, on a device without float64."
    r = on_device('train', '--model', tiny, '--data', rows, *TRAIN, '--dtype', 'fp32', '--out', 'run', double=False)
    assert r.returncode == 0, r.stderr[-3000:]
    for argv in (['sample', 'run', '--instruction', 'Name a tree.', '--max-new-tokens', 4],
                 ['evaluate', 'run', '--against', 'base', '--n-samples', 2, '--max-new-tokens', 4],
                 ['export', 'run', '--to', 'exported', '--dtype', 'fp32']):
        r = on_device(*argv, double=False)
        assert r.returncode == 0, (argv, r.stderr[-3000:])
    r = subprocess.run([sys.executable, HERE/'device_run.py', 'single', 'chat', 'run', '--max-new-tokens', '4'],
                       input='Name a tree.\n/quit\n', capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-3000:]
    shutil.rmtree('exported')
