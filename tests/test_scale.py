"Several processes: the same run as in one, whoever is killed, told to stop or refused."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import matrix
import several

COMMON = ['--n-freeze', 2, '--seq-len', 256, '--batch-size', 4, '--dtype', 'fp32', '--lr', '1e-3', '--max-steps', 6,
          '--eval-every', 3, '--n-samples', 3, '--max-new-tokens', 4, '--prefix-cache', 'off']


@pytest.fixture
def argv(here, tiny, rows, ready, monkeypatch):
    "A short run's command line."
    monkeypatch.setenv('ALPACA_FT_CACHE', str(here/'cache'))
    return lambda out, *more: ['train', '--model', tiny, '--data', rows, *COMMON, '--out', out, *more]


def metrics(out):
    "The log, but for the speed."
    lines = [json.loads(line) for line in Path(out, 'metrics.jsonl').read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != 'tokens_per_second'} for line in lines]


def furthest(out, other):
    "The largest difference between two logs, which must have the same lines."
    largest = 0.
    for a, b in zip(metrics(out), metrics(other), strict=True):
        assert a.keys() == b.keys() and a['step'] == b['step'] and a.get('tokens') == b.get('tokens'), (a, b)
        largest = max([largest, *(abs(a[k] - b[k]) for k in a if isinstance(a[k], float))])
    return largest


def samples(out):
    "What was said."
    return Path(out, 'samples.jsonl').read_text()


def weights(out):
    "The result's tensors."
    from safetensors.torch import load_file
    return load_file(Path(out, 'model', 'model.safetensors'))


def apart(out, other):
    "The largest difference between two results."
    a, b = weights(out), weights(other)
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


def good(codes, logs):
    "All processes ended well."
    assert not any(codes), (codes, *logs)


def test_one_two_and_four(argv):
    "Losses, evaluations (4 rows among 1, 2 and 4), answers and results; two and four write once."
    for n in (1, 2, 4):
        good(*several.run(n, argv(f'of{n}')))
    for n in (2, 4):
        assert furthest('of1', f'of{n}') < 1e-5 and apart('of1', f'of{n}') < 1e-5
        assert samples('of1') == samples(f'of{n}')
        assert sorted(p.name for p in Path(f'of{n}').iterdir()) == sorted(p.name for p in Path('of1').iterdir())
    assert 'the 4 packed rows of a step are shared out' in Path('log0').read_text()
    assert Path('log1').read_text().strip() == ''


def test_shares_that_differ(argv):
    "Five rows a step, the last step of an epoch with fewer, and three processes: weighted by tokens, not by process."
    more = ['--batch-size', 5, '--loss-on', 'response', '--n-samples', 0]
    for n in (1, 3):
        good(*several.run(n, argv(f'of{n}', *more)))
    assert furthest('of1', 'of3') < 1e-5


def test_states_are_shared(argv):
    "Each computes a share; one file serves both, and the next run, in any number; a damaged one is made anew."
    more = ['--prefix-cache', 'disk', '--n-samples', 0, '--max-steps', 3]
    good(*several.run(1, argv('off', '--n-samples', 0, '--max-steps', 3)))
    codes, logs = several.run(2, argv('made', *more))
    good(codes, logs)
    path, = Path('cache/prefix').glob('*.bin')
    assert 'frozen layers, once' in logs[0] and logs[1].strip() == '' and furthest('off', 'made') < 1e-5
    before = path.stat().st_mtime_ns, path.read_bytes()
    codes, logs = several.run(2, argv('used', *more))
    good(codes, logs)
    assert f'{path.name} is there from an earlier run' in logs[0] and 'frozen layers, once' not in logs[0]
    good(*several.run(1, argv('alone', *more)))
    assert 'is there from an earlier run' in Path('log0').read_text() and path.read_bytes() == before[1]
    with open(path, 'r+b') as f:
        f.seek(1000)
        f.write(b'xxxx')
    path.with_name(path.name + '.part').write_bytes(b'half')
    codes, logs = several.run(2, argv('anew', *more))
    good(codes, logs)
    assert 'is damaged, so it is made anew' in logs[0] and path.read_bytes() == before[1]
    assert not list(Path('cache/prefix').glob('*.part')) and furthest('made', 'anew') == 0


def test_fewer_rows_than_processes(argv, rows):
    "Four processes and two packed rows, whose states two of them compute: a share may be empty."
    two = rows.read_text().splitlines()[:2]
    for name, line in zip(('train', 'held'), two):
        Path(f'{name}.jsonl').write_text(line + '\n')
    more = ['--data', 'train.jsonl', '--eval-data', 'held.jsonl', '--n-samples', 0, '--max-steps', 3]
    good(*several.run(4, argv('off', *more)))
    good(*several.run(4, argv('shared', *more, '--prefix-cache', 'disk')))
    codes, logs = several.run(4, argv('again', *more, '--prefix-cache', 'disk'))
    good(codes, logs)
    assert 'is there from an earlier run' in logs[0]
    assert furthest('off', 'shared') < 1e-5 and furthest('shared', 'again') == 0


def test_killed_while_states_are_computed(argv):
    "One of two dies with its share half written: nothing of it is used, and the next run computes all of them."
    more = ['--prefix-cache', 'disk', '--n-samples', 0, '--max-steps', 2]

    def dies(number):
        import alpaca_ft.prefix as prefix
        real = prefix.rows_states

        def some(*args):
            for n, states in enumerate(real(*args)):
                if number == 1 and n == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield states
        prefix.rows_states = some
    codes, logs = several.run(2, argv('killed', *more), before=dies)
    assert codes == [1, -9] and 'another process of this run has ended' in logs[0], (codes, logs)
    assert not list(Path('cache/prefix').glob('*.bin'))
    codes, logs = several.run(2, argv('next', *more))
    good(codes, logs)
    assert 'frozen layers, once' in logs[0] and 'from an earlier run' not in logs[0]
    assert sorted(path.suffix for path in Path('cache/prefix').iterdir()) == ['.bin', '.json', '.lock']
    good(*several.run(2, argv('off', *more, '--prefix-cache', 'off')))
    assert furthest('off', 'next') < 1e-5


def test_checkpoints_cross_over(argv):
    "SIGTERM to one of two stops both after the same step; one goes on, is stopped, and four end the run."
    good(*several.run(1, argv('whole')))

    def stop_at(steps, out, n, *more):
        pids = several.begin(n, argv(out, *more), before=lambda number: slow(number))
        several.until(lambda: Path(out, 'metrics.jsonl').exists() and len(metrics(out)) > steps)
        os.kill(pids[-1], signal.SIGTERM)
        return several.wait(pids), [Path(f'log{number}').read_text() for number in range(n)]

    def slow(number):
        from torch.optim.optimizer import register_optimizer_step_pre_hook
        register_optimizer_step_pre_hook(lambda *args: time.sleep(0.3))

    codes, logs = stop_at(1, 'crossing', 2)
    step, = [int(p.name[5:]) for p in Path('crossing/checkpoints').iterdir()]
    assert codes == [75, 75] and 0 < step < 5, (codes, logs)
    said = [line for log in logs for line in log.splitlines() if 'stopped by' in line]
    assert len(said) == 1 and f'after step {step}; go on with' in said[0], logs
    codes, logs = stop_at(step + 2, 'crossing', 1, '--resume')
    assert codes == [75] and f'going on from crossing/checkpoints/step-{step}' in logs[0], logs
    assert 'processes was 2 and is 1' in logs[0]
    good(*several.run(4, argv('crossing', '--resume')))
    assert furthest('whole', 'crossing') < 1e-5 and apart('whole', 'crossing') < 1e-5
    assert samples('whole') == samples('crossing')


def test_a_killed_process(argv):
    "The others end within 30 seconds, with one message; the checkpoint is good, and what it leads to is exact."
    good(*several.run(2, argv('whole', '--save-every', 2)))

    def killed(number):
        if number == 1:
            matrix.kill_at(5)
    begin = time.time()
    codes, logs = several.run(2, argv('killed', '--save-every', 2), before=killed)
    assert codes == [1, -9] and time.time() - begin < 30, (codes, logs)
    said = [line for line in logs[0].splitlines() if line.startswith('alpaca_ft:')]
    assert len(said) == 1 and 'another process of this run has ended' in said[0], logs
    assert 'the last checkpoint is killed/checkpoints/step-4; go on with' in said[0]
    good(*several.run(2, argv('killed', '--save-every', 2, '--resume')))
    assert metrics('whole') == metrics('killed') and apart('whole', 'killed') == 0


@pytest.mark.slow
def test_restart_by_the_launcher(argv):
    "torchrun starts a killed run again, and it ends as the whole one does."
    good(*several.run(2, argv('whole', '--save-every', 2, '--n-samples', 0)))
    Path('killed.py').write_text('''
import os, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, os.environ['TESTS'])
if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and os.environ['RANK'] == '1':
    import matrix
    matrix.kill_at(5)
from alpaca_ft.cli import main
sys.exit(main())
''')
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2, '--max-restarts', 1]
    env = os.environ | dict(TESTS=str(Path(__file__).parent), OMP_NUM_THREADS='1')
    words = [*launch, 'killed.py', *argv('again', '--save-every', 2, '--n-samples', 0)]
    r = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=env, timeout=180)
    assert r.returncode == 0, r.stderr
    assert r.stderr.count('alpaca_ft: ') == 1 and 'another process of this run has ended' in r.stderr, r.stderr
    assert 'started again by the launcher' in r.stderr and 'going on from again/checkpoints/step-4' in r.stderr
    assert metrics('whole') == metrics('again') and apart('whole', 'again') == 0


FSDP = matrix.FSDP


def count_parts(number):
    "Have a process say, at its first step, how many of its weights are parts."
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    def count(optimizer, args, kwargs):
        weights = [p for group in optimizer.param_groups for p in group['params']]
        parts = [p for p in weights if hasattr(p, 'full_tensor') and 2*p.to_local().numel() == p.numel()]
        Path(f'parts{number}').write_text(f'{len(parts)} of {len(weights)}')
    register_optimizer_step_pre_hook(count)


def count_kept(number):
    "The same, and how many whole tensors a process holds when the best weights and the result are written."
    import alpaca_ft.checkpoints as checkpoints
    from alpaca_ft.prefix import WholeModel
    count_parts(number)
    write, gather = checkpoints.first_does, WholeModel.gather

    def first_does(work, *args):
        for arg in args:
            if 'trained' in getattr(arg, 'keywords', {}):
                Path(f'best{number}').write_text(str(len(arg.keywords['trained'])))
        return write(work, *args)

    def gathered(self, **kw):
        gather(self, **kw)
        Path(f'result{number}').write_text(str(len(self.trained or ())))
    checkpoints.first_does, WholeModel.gather = first_does, gathered


SPREAD = dict(plain=[], states=['--prefix-cache', 'disk', '--activation-checkpointing'],
              lora=['--method', 'lora', '--final', 'best'])  # name: options
LONG = [pytest.param(name, marks=pytest.mark.slow) for name in ('states', 'lora')]


@pytest.mark.parametrize('name', ['plain', *LONG])
def test_weights_spread(argv, name):
    "FSDP2: every weight that trains is in halves, and losses, answers and result are those of one process."
    more = SPREAD[name]
    good(*several.run(1, argv('one', *more)))
    good(*several.run(2, argv('spread', *more), env=FSDP, before=count_kept))
    parts, of, weights_ = Path('parts0').read_text().split()
    for kept in ('result', 'best') if '--final' in more else ('result',):
        assert (Path(f'{kept}0').read_text(), Path(f'{kept}1').read_text()) == (parts, '0'), kept
    assert parts == weights_ and int(parts) > 10 and Path('parts1').read_text() == Path('parts0').read_text()
    assert furthest('one', 'spread') < 1e-5 and samples('one') == samples('spread')
    if '--method' not in more:
        assert apart('one', 'spread') < 1e-5


def test_checkpoint_after_an_evaluation(argv):
    "FSDP2: what an evaluation has put together is taken apart before a checkpoint is written; else moments are lost."
    more = ['--save-every', 2, '--eval-every', 2, '--n-samples', 0]
    good(*several.run(2, argv('whole', *more), env=FSDP))
    codes, logs = several.run(2, argv('killed', *more), env=FSDP, before=lambda number: matrix.kill_at(5))
    assert codes == [-9, -9], logs
    from safetensors.torch import load_file
    weights = load_file('killed/checkpoints/step-4/weights.safetensors')
    moments = load_file('killed/checkpoints/step-4/optimizer.safetensors')
    assert set(weights) == {name.rpartition('|')[0] for name in moments}
    good(*several.run(2, argv('killed', *more, '--resume'), env=FSDP))
    assert metrics('whole') == metrics('killed') and apart('whole', 'killed') == 0


@pytest.mark.slow
def test_from_spread_to_copied(argv):
    "A run killed under FSDP2 goes on under DDP, is killed again, and FSDP2 ends it."
    good(*several.run(1, argv('whole', '--save-every', 2)))

    def killed(at):
        return lambda number: matrix.kill_at(at)
    assert several.run(2, argv('run', '--save-every', 2), env=FSDP, before=killed(3))[0] == [-9, -9]
    codes, logs = several.run(2, argv('run', '--save-every', 2, '--resume'), before=killed(3))
    assert codes == [-9, -9] and 'going on from run/checkpoints/step-2' in logs[0], logs
    codes, logs = several.run(2, argv('run', '--save-every', 2, '--resume'), env=FSDP)
    good(codes, logs)
    assert 'going on from run/checkpoints/step-4' in logs[0]
    assert furthest('whole', 'run') < 1e-5 and apart('whole', 'run') < 1e-5 and samples('whole') == samples('run')


def refused(n, argv, env=None):
    "The one line of a refusal, which all processes share and one says."
    codes, logs = several.run(n, argv, env=env)
    lines = [line for log in logs for line in log.splitlines() if line.startswith('alpaca_ft:')]
    assert codes == [2]*n and len(lines) == 1, (codes, logs)
    return lines[0]


def test_refusals(argv, tiny, rows):
    "In one line, from one process, with nothing left behind."
    assert 'has work for 1 of 2 processes' in refused(2, argv('no', '--batch-size', 1))
    assert 'share kept states through a file' in refused(2, argv('no', '--prefix-cache', 'memory'))
    assert 'the launcher asks for DeepSpeed' in refused(2, argv('no'), env=dict(ACCELERATE_USE_DEEPSPEED='true'))
    assert 'precision is the option --dtype' in refused(2, argv('no'), env=dict(ACCELERATE_MIXED_PRECISION='bf16'))
    assert 'give one as --out' in refused(2, argv('no')[:-2], env=dict(TORCHELASTIC_MAX_RESTARTS='1'))
    for name, value, words in (('FSDP_VERSION', '1', 'set fsdp_version to 2'),
                               ('FSDP_OFFLOAD_PARAMS', 'true', 'fsdp_offload_params'),
                               ('FSDP_AUTO_WRAP_POLICY', 'SIZE_BASED_WRAP', 'set TRANSFORMER_BASED_WRAP')):
        assert words in refused(2, argv('no'), env=FSDP | {name: value})
    assert 'rotate changes what trains' in refused(2, argv('no', '--rotate', 1), env=FSDP)
    assert 'FSDP, but starts one process' in refused(1, argv('no'), env=FSDP)
    assert 'check runs in one process' in refused(2, ['check', '--model', tiny, '--data', rows])
    Path('theirs').mkdir()
    Path('theirs/notes.txt').write_text('mine')
    assert 'exists already' in refused(2, argv('theirs'))
    assert not Path('no').exists() and not Path('runs').exists() and os.listdir('theirs') == ['notes.txt']


def test_one_process_fails(argv, tiny):
    "What fails in one process alone ends all of them, with its reason."
    def other_files(number):
        if number == 1:
            import alpaca_ft.run
            from alpaca_ft import Refused

            def no(*args):
                raise Refused('this machine has no such rows')
            alpaca_ft.run.load_rows = no
    codes, logs = several.run(2, argv('no'), before=other_files)
    assert codes == [2, 2] and sum('this machine has no such rows' in log for log in logs) == 1, (codes, logs)
    assert not Path('no').exists()


def test_spread_and_copied(monkeypatch, tiny):
    "A model is spread over devices or copied to processes."
    from alpaca_ft import Refused, load_model
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(Refused, match="device_map is 'auto', and 2 processes were started"):
        load_model(tiny, device_map='auto')


def test_compiled_by_the_launcher(monkeypatch):
    "`accelerate launch --dynamo_backend inductor` would wrap the model; its default asks for nothing."
    from alpaca_ft import Refused
    from alpaca_ft.processes import check_launch
    for value in ('', 'no', 'NO'):
        monkeypatch.setenv('ACCELERATE_DYNAMO_BACKEND', value)
        check_launch()
    for value in ('INDUCTOR', 'eager'):
        monkeypatch.setenv('ACCELERATE_DYNAMO_BACKEND', value)
        with pytest.raises(Refused, match='ACCELERATE_DYNAMO_BACKEND.*set dynamo_backend to no'):
            check_launch()
