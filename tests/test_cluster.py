"The files for clusters in configs/: their shell, their options and what they do when they are stopped."
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from test_scale import COMMON, metrics, samples

configs = Path(__file__).resolve().parent.parent/'configs'
slurm, sky = configs/'slurm.sbatch', configs/'skypilot.yaml'


def sky_run(folder):
    "SkyPilot's `run` as a script."
    path = folder/'run.sh'
    path.write_text('#!/bin/bash\n' + yaml.safe_load(sky.read_text(encoding='utf-8'))['run'])
    return path


def test_shell(tmp_path):
    "By shellcheck, where it is installed, else by bash itself."
    checker = ['shellcheck'] if shutil.which('shellcheck') else ['bash', '-n']
    for path in (slurm, sky_run(tmp_path)):
        r = subprocess.run([*checker, path], capture_output=True, text=True)
        assert r.returncode == 0, r.stdout + r.stderr


@pytest.mark.parametrize('path', [slurm, sky], ids=lambda path: path.name)
def test_options_exist(path):
    "What the files give to `alpaca_ft train`, and tell a reader to give, are options of it."
    from alpaca_ft.cli import make_parser
    text = path.read_text(encoding='utf-8')
    ours = set(re.findall(r'--(?:data|batch-size|save-every|out|resume|[a-z-]*cache)\b', text))
    assert {'--data', '--batch-size', '--save-every', '--out', '--resume'} <= ours
    train = make_parser()._subparsers._group_actions[0].choices['train']
    assert ours <= set(train._option_string_actions)
    assert 'ALPACA_FT_CACHE' in text


def test_sbatch_asks_for_what_a_resumed_run_needs():
    "The job may be put back in the queue, and is told before its time is over."
    asked = dict(re.findall(r'^#SBATCH --([a-z-]+)=?(.*)$', slurm.read_text(encoding='utf-8'), flags=re.M))
    assert {'requeue', 'signal', 'time', 'output'} <= asked.keys() and asked['open-mode'] == 'append'
    assert re.fullmatch(r'TERM@\d+', asked['signal'])


def test_fsdp_is_what_accelerate_says(monkeypatch):
    "The variables that FSDP=1 sets are those that a run looks at, with values that it takes."
    from alpaca_ft.processes import check_launch, wants
    words = re.search(r'export (ACCELERATE_USE_FSDP.*)', slurm.read_text(encoding='utf-8'))[1]
    for word in words.split():
        monkeypatch.setenv(*word.split('='))
    for name, value in dict(WORLD_SIZE=2, RANK=0, LOCAL_RANK=0, MASTER_ADDR='here', MASTER_PORT=1).items():
        monkeypatch.setenv(name, str(value))
    check_launch()
    assert wants('ACCELERATE_USE_FSDP')


def job(here, out, code=0, state='RUNNING'):
    "Run the script with srun and scontrol that write down how they were called: (exit code, srun's words, scontrol's)."
    (here/'bin').mkdir(exist_ok=True)
    for name, then in (('srun', f'exit {code}'), ('scontrol', f'echo node1; echo JobState={state}')):
        path = here/'bin'/name
        path.write_text(f'#!/bin/bash\necho "$@" >> {name}.txt\n{then}\n')
        path.chmod(0o755)
        (here/f'{name}.txt').write_text('')
    env = os.environ | dict(PATH=f'{here}/bin:{os.environ["PATH"]}', SLURM_JOB_ID='12', SLURM_JOB_NODELIST='node1')
    r = subprocess.run(['bash', slurm, out, '--data', 'my rows.jsonl'], env=env, capture_output=True, text=True)
    return r.returncode, (here/'srun.txt').read_text(), (here/'scontrol.txt').read_text()


def test_job(here):
    "It begins, goes on in a folder that is there, and is put back in the queue if it was stopped and nobody did so."
    code, started, _ = job(here, 'runs/mine')
    assert code == 0 and '--data my rows.jsonl --out=runs/mine' in started and '--resume' not in started
    Path('runs/mine').mkdir(parents=True)
    Path('runs/mine/config.yaml').write_text('')
    code, started, said = job(here, 'runs/mine', 75)
    assert code == 75 and started.strip().endswith('--out=runs/mine --resume') and 'requeue 12' in said
    assert 'requeue 12' in job(here, 'runs/mine', 143)[2]
    for ended in (job(here, 'runs/mine', 75, 'CANCELLED'), job(here, 'runs/mine', 1), job(here, 'runs/mine', 2)):
        assert ended[0] and 'requeue' not in ended[2]
    Path('runs/mine/model').mkdir()
    assert job(here, 'runs/mine') == (0, '', '')


@pytest.mark.slow
def test_a_machine_taken_away(here, tiny, rows):
    "SkyPilot's script: a machine is lost after a checkpoint; the next one, with nothing on it, comes to the same end."
    words = [str(word) for word in ('--model', tiny, '--data', rows, *COMMON, '--save-every', 2, '--n-samples', 1)]
    words += ['--prefix-cache', 'disk']
    begin = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    env = os.environ | dict(OMP_NUM_THREADS='1', ALPACA_FT_CACHE=str(here/'own'))
    whole = subprocess.run([*begin, '-m', 'alpaca_ft', 'train', *words, '--out', 'whole'], env=env, capture_output=True)
    assert whole.returncode == 0, whole.stderr
    script, bucket = sky_run(here), here/'bucket'

    def machine(name):
        (here/name).mkdir()
        env = os.environ | dict(OMP_NUM_THREADS='1', HOME=str(here/name), SHARED=str(bucket), RUN='mine', PROCESSES='2',
                                EVERY='0.2', PYTHON=sys.executable, OPTIONS=' '.join(words))
        return subprocess.Popen(['bash', script], env=env, start_new_session=True, stderr=open(here/f'{name}.txt', 'w'))

    first = machine('first')
    try:
        end = time.time() + 100
        while not (bucket/'runs/mine/step-2.tar').exists() and first.poll() is None and time.time() < end:
            time.sleep(0.02)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    shutil.rmtree(here/'first')
    (bucket/'runs/mine/step-99.tar').write_bytes(b'cut off')
    assert machine('second').wait(timeout=100) == 0, Path('second.txt').read_text()
    said = Path('second.txt').read_text()
    assert 'going on from' in said and 'is there from an earlier run' in said
    ended = bucket/'runs/mine'
    assert metrics(ended) == metrics('whole') and samples(ended) == samples('whole')
    results = [(folder/'model/model.safetensors').read_bytes() for folder in (ended, here/'whole')]
    assert results[0] == results[1]
    third = machine('third')
    assert third.wait(timeout=20) == 0 and not Path('third/runs').exists()
