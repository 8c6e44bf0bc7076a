"""Two processes against one on the same two cores, and what a shared file of kept states saves.

usage: scale.py [--rounds 3] [--steps 8] [--rows 120] [--model demo] [--out FILE.json]

Commands as a user types them, one after another, in turns. A ratio is taken within a round, because others may load
the machine in one round more than in the next; the table says how many cores they took.
1. Tokens a second (the run's own log, median of the steps but the first two), nothing kept: one process with one
   thread, one with two, two (torchrun, DDP over gloo) with one each.
2. Kept states: a first job with an empty cache in one process and in two, each with one thread, a second job like it,
   and the same job with nothing kept. Seconds from launch to the end of the first step, rows that were sent through the
   frozen layers before it, bytes on the disk.
Writes benchmarks/results/DATE-scale.json. Linux only.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from bench import machine, say
from probe import busy_cpu

here = Path(__file__).resolve().parent
LAUNCH = {1: [], 2: ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']}
ARMS = {'1 process, 1 thread': (1, 1), '1 process, 2 threads': (1, 2), '2 processes, 1 thread each': (2, 1)}
WARM = 2  # steps that are not counted


def steps(out):
    "The logged steps of a run."
    path = out/'metrics.jsonl'
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in map(json.loads, lines) if 'loss' in line]


def children():
    "CPU seconds of the children that have ended."
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def job(out, processes, threads, cache, options):
    "A command: (seconds from launch to the end of its first step, what it printed, cores that others took meanwhile)."
    words = [sys.executable, *LAUNCH[processes], '-m', 'alpaca_ft', 'train', *options, f'--out={out}']
    env = os.environ | dict(OMP_NUM_THREADS=str(threads), ALPACA_FT_CACHE=str(cache), TOKENIZERS_PARALLELISM='false',
                            PYTHONPATH=str(here.parent))
    log, first = out.with_suffix('.log'), None
    own, busy, begin = children(), busy_cpu(), time.perf_counter()
    with open(log, 'w') as f, subprocess.Popen(words, env=env, stdout=f, stderr=f) as child:
        while child.poll() is None:
            if first is None and steps(out):
                first = time.perf_counter() - begin
            time.sleep(0.02)
    seconds = time.perf_counter() - begin
    if child.returncode:
        raise RuntimeError(log.read_text()[-2000:])
    others = max(0., busy_cpu() - busy - (children() - own))/seconds
    return round(first, 2), log.read_text(), round(others, 2)


def throughput(folder, args, options):
    "Tokens a second of each arm in each round."
    rounds = []
    for number in range(args.rounds):
        done = {}
        for arm, (processes, threads) in ARMS.items():
            out = folder/f'{number}-{processes}-{threads}'
            others = job(out, processes, threads, folder/'cache', [*options, f'--max-steps={args.steps}',
                                                                   '--prefix-cache=off'])[2]
            speeds = [line['tokens_per_second'] for line in steps(out)[WARM:]]
            done[arm] = dict(tokens_per_second=round(statistics.median(speeds), 1), steps=speeds, others=others)
            say(f'round {number + 1}, {arm}: {done[arm]["tokens_per_second"]} tokens/s, others {others}')
        rounds.append(done)
    return rounds


def ratios(rounds, arm, against):
    "How many times as fast an arm is, in each round."
    return [round(r[arm]['tokens_per_second']/r[against]['tokens_per_second'], 3) for r in rounds]


def rows_sent(log, out):
    "Packed rows that went through the frozen layers before the first step, as a run says it."
    if 'is there from an earlier run' in log or 'frozen layers, once' not in log:
        return 0
    report = json.loads((out/'preflight.json').read_text())
    return report['train']['rows'] + report['eval']['rows']


def sharing(folder, options):
    "A first and a second job on the same manifest, in one process and in two, and one with nothing kept."
    found = []
    for processes in (1, 2):
        cache = folder/f'cache-{processes}'
        cache.mkdir()
        for about in ('first', 'second', 'nothing kept'):
            keep = 'off' if about == 'nothing kept' else 'disk'
            out = folder/f'{processes}-{about.replace(" ", "-")}'
            first, log, others = job(out, processes, 1, cache, [*options, '--max-steps=2', f'--prefix-cache={keep}'])
            files = list(cache.glob('prefix/*.bin'))
            found.append(dict(processes=processes, job=about, seconds_to_first_step=first, others=others,
                              rows_through_frozen_layers=rows_sent(log, out), files=len(files),
                              bytes_on_disk=sum(path.stat().st_size for path in files)))
            say(*found[-1].items())
    return found


def show(result):
    "The two tables."
    rounds = result['rounds']
    print(f'{"tokens a second":30}' + ''.join(f'round {i + 1:<6}' for i in range(len(rounds))))
    for arm in ARMS:
        print(f'{arm:30}' + ''.join(f'{r[arm]["tokens_per_second"]:<12}' for r in rounds))
    for name, values in result['ratios'].items():
        print(f'{name:64} {"  ".join(f"{v:.2f}" for v in values)}')
    print(f'\n{"kept states":28}first step after  rows sent before it  on disk')
    for line in result['sharing']:
        print(f'{line["processes"]} process{"es" if line["processes"] > 1 else "  "}, {line["job"]:14}'
              f'{line["seconds_to_first_step"]:>12.1f} s {line["rows_through_frozen_layers"]:>18} '
              f'{line["bytes_on_disk"]/1e6:>12,.1f} MB')


def main():
    "Measure, print and write."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--steps', type=int, default=8, help=f'optimizer steps of a run, the first {WARM} not counted')
    parser.add_argument('--rows', type=int, default=120, help='of the built-in rows, for the second table')
    parser.add_argument('--model', default='demo')
    parser.add_argument('--n-freeze', default='24')
    parser.add_argument('--seq-len', default='1024')
    parser.add_argument('--out', type=Path, default=here/'results'/f'{date.today()}-scale.json')
    args = parser.parse_args()
    two = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, two)
    from alpaca_ft.data import load_alpaca, write_jsonl
    from alpaca_ft.model import demo_model
    model = str(demo_model()) if args.model == 'demo' else args.model
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        rows = list(load_alpaca()['train'])
        write_jsonl(folder/'rows.jsonl', rows)
        write_jsonl(folder/'some.jsonl', rows[:args.rows])
        options = [f'--model={model}', f'--n-freeze={args.n_freeze}', f'--seq-len={args.seq_len}', '--batch-size=4',
                   '--eval-every=1000000', '--n-samples=0']
        rounds = throughput(folder, args, [*options, f'--data={folder}/rows.jsonl'])
        shared = sharing(folder, [*options, f'--data={folder}/some.jsonl'])
    alone, threads, both = ARMS
    pairs = [(both, alone), (threads, alone), (both, threads)]
    settings = vars(args) | dict(model='demo' if args.model == 'demo' else 'another', cores=len(two))
    settings.pop('out')
    result = dict(date=str(date.today()), machine=machine(), settings=settings, rounds=rounds,
                  ratios={f'{a} / {b}': ratios(rounds, a, b) for a, b in pairs}, sharing=shared)
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + '\n')
    show(result)


if __name__ == '__main__':
    main()
