"""Whole commands on a device of its own (see standin.py): what lies where, in which precision, and what has to wait.

Where there is a GPU, the same commands run on that instead, and only the count of copies is left out.
"""
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import several
import torch

HERE = Path(__file__).parent
REAL = torch.cuda.is_available()
TRAIN = ['--n-freeze', '2', '--seq-len', '128', '--batch-size', '4', '--micro-batch-size', '2', '--n-samples', '1',
         '--max-new-tokens', '4', '--lr', '1e-3', '--max-steps', '6']


class Device:
    "Commands on the stand-in device, each in a forked child of a process that has imported everything once."
    def __init__(self, kind):
        self.server = subprocess.Popen([sys.executable, HERE/'device_run.py', kind, 'serve'], stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                                       env=os.environ | dict(OMP_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false'))

    def start(self, *argv, text='', env=None):
        "Begin a command in this directory; its process id."
        self.folder = Path(tempfile.mkdtemp())
        (self.folder/'in').write_text(text)
        order = dict(argv=[*map(str, argv)], cwd=os.getcwd(), env=env or {}, input=str(self.folder/'in'),
                     out=str(self.folder/'out'), err=str(self.folder/'err'))
        self.server.stdin.write(json.dumps(order) + '\n')
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def wait(self):
        "(exit code, stderr) of the command that was begun."
        code = int(self.server.stdout.readline())
        err = (self.folder/'err').read_text()
        shutil.rmtree(self.folder)
        return code, err

    def run(self, *argv, text='', **env):
        "A whole command."
        self.start(*argv, text=text, env=env)
        return self.wait()

    def close(self):
        self.server.stdin.close()
        self.server.wait()


@pytest.fixture(scope='module')
def single():
    "The device without float64."
    device = Device('real' if REAL else 'single')
    yield device
    device.close()


@pytest.fixture(scope='module')
def double():
    "The device with float64."
    device = Device('real' if REAL else 'double')
    yield device
    device.close()


def losses(out):
    "Losses of a run, training and held-out."
    lines = [json.loads(line) for line in Path(out, 'metrics.jsonl').read_text().splitlines()]
    return [line[k] for line in lines for k in ('loss', 'eval_loss') if k in line]


@pytest.fixture(scope='module')
def on_cpu(tiny, rows, tmp_path_factory):
    "The same run on the CPU."
    out = tmp_path_factory.mktemp('cpu')/'run'
    argv = ['train', '--model', tiny, '--data', rows, *TRAIN, '--dtype', 'fp32', '--out', out]
    done = several.command(*argv, env=dict(CUDA_VISIBLE_DEVICES=''))
    assert done.returncode == 0, done.stderr
    return losses(out)


@pytest.mark.parametrize('options', [
    '--prefix-cache off --dtype fp32', '--prefix-cache memory --dtype fp32',
    '--prefix-cache disk --activation-checkpointing --dtype fp32'])
def test_train(options, here, tiny, rows, on_cpu, tmp_path, single):
    "In every way to keep states: the losses of the CPU, on a device without float64."
    code, err = single.run('train', '--model', tiny, '--data', rows, *TRAIN, *options.split(), '--out', 'run',
                           ALPACA_FT_CACHE=str(tmp_path/'cache'))
    assert code == 0, err[-3000:]
    assert losses('run') == pytest.approx(on_cpu, abs=1e-5)
    assert (Path('run')/'model'/'model.safetensors').exists()


def test_bf16(here, tiny, rows, on_cpu, double):
    code, err = double.run('train', '--model', tiny, '--data', rows, *TRAIN, '--dtype', 'bf16', '--out', 'run')
    assert code == 0, err[-3000:]
    assert losses('run') == pytest.approx(on_cpu, abs=0.02) and losses('run') != pytest.approx(on_cpu, abs=1e-7)


@pytest.mark.skipif(REAL, reason='copies are counted on the stand-in only')
def test_nothing_waits_for_the_device(here, tiny, rows, tmp_path, double):
    "A step copies its batch to the device, and back only what is logged: the loss and the norm, and the look at both."
    report = tmp_path/'copies.json'
    code, err = double.run('train', '--model', tiny, '--data', rows, *TRAIN, '--dtype', 'fp32', '--eval-every', 6,
                           '--out', 'run', COPIES=str(report))
    assert code == 0, err[-3000:]
    steps = json.loads(report.read_text())
    for step in '1234':
        back = sorted(place for place in steps[step] if place.startswith('to_host'))
        logged = ['to_host trainer.py:_maybe_log_save_evaluate']*2
        assert back == [*logged, 'to_host trainer.py:on_pre_optimizer_step'], back


def test_killed_and_resumed(here, tiny, rows, double):
    "SIGTERM: a checkpoint; resumed, the end of the run that was left alone."
    args = ['train', '--model', tiny, '--data', rows, *TRAIN, '--dtype', 'fp32', '--max-steps', 12]
    assert double.run(*args, '--out', 'whole')[0] == 0
    pid = double.start(*args, '--out', 'run')
    log = Path('run/metrics.jsonl')
    end = time.time() + 120
    while time.time() < end and not (log.exists() and '"loss"' in log.read_text()):
        time.sleep(0.01)
    os.kill(pid, signal.SIGTERM)
    assert double.wait()[0] == 75
    code, err = double.run(*args, '--out', 'run', '--resume')
    assert code == 0, err[-3000:]
    assert losses('run') == losses('whole')
    same = [Path(f, 'model/model.safetensors').read_bytes() for f in ('run', 'whole')]
    assert same[0] == same[1]


def test_use(here, tiny, rows, single):
    "sample, chat, evaluate and export of a run, on a device without float64."
    code, err = single.run('train', '--model', tiny, '--data', rows, *TRAIN, '--dtype', 'fp32', '--out', 'run')
    assert code == 0, err[-3000:]
    for argv in (['sample', 'run', '--instruction', 'Name a tree.', '--max-new-tokens', 4],
                 ['evaluate', 'run', '--against', 'base', '--n-samples', 2, '--max-new-tokens', 4],
                 ['export', 'run', '--to', 'exported', '--dtype', 'fp32']):
        code, err = single.run(*argv)
        assert code == 0, (argv, err[-3000:])
    code, err = single.run('chat', 'run', '--max-new-tokens', '4', text='Name a tree.\n/quit\n')
    assert code == 0, err[-3000:]


def test_command_on_the_device(here, tiny, rows):
    "Once without anything imported before, as a user's process is."
    args = ['train', '--model', tiny, '--data', rows, *TRAIN, '--max-steps', 1, '--dtype', 'fp32', '--out', 'run']
    kind = 'real' if REAL else 'double'
    r = subprocess.run([sys.executable, HERE/'device_run.py', kind, *map(str, args)], capture_output=True, text=True,
                       env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert r.returncode == 0 and Path('run/model/model.safetensors').exists(), r.stderr[-3000:]


@pytest.mark.skipif(not REAL or not find_spec('liger_kernel'), reason='Liger needs a GPU')
def test_liger_takes_an_empty_micro_batch():
    from alpaca_ft.speed import liger_linear_loss
    h = torch.zeros(0, 8, device='cuda', requires_grad=True)
    w = torch.zeros(9, 8, device='cuda', requires_grad=True)
    loss = liger_linear_loss(h, w, torch.zeros(0, dtype=torch.long, device='cuda'), 1.)
    loss.backward()
    assert loss.item() == 0 and h.grad.shape == (0, 8)
