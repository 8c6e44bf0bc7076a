"""The benchmark's driver on a tiny random model: the table and the JSON are complete. What it measures is no matter
of tests."""
import json, os, subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent


def test_bench(tiny, rows, tmp_path):
    out = tmp_path/'result.json'
    cmd = [sys.executable, root/'benchmarks'/'bench.py', '--rounds', 1, '--steps', 2, '--warmup', 1, '--seq-len', 512,
           '--n-freeze', 2, '--only', 'floor', 'alpaca_ft',
           '--model', tiny, '--data', rows, '--out', out]
    r = subprocess.run(list(map(str, cmd)), capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(root)),
                       timeout=240)
    assert r.returncode == 0, r.stderr[-2000:]
    head, *lines = r.stdout.splitlines()
    for column in ('tokens/s', '25-75 %', 'x floor', 'peak MiB', 'others'):
        assert column in head
    assert [l.split()[1] for l in lines[:2]] == ['floor', 'alpaca_ft']
    assert 'first epoch, tokens/s, against the bare loop' in r.stdout

    d = json.loads(out.read_text())
    assert not d['not_measured'] and d['machine']['cores'] and d['machine']['versions']['torch']
    assert {l['line'] for l in d['lines']} >= {'first epoch, tokens/s, against the bare loop',
                                               'peak memory while training, alpaca_ft against the bare loop'}
    for c in d['contenders']:
        assert c['steps'] == 2 and c['workload'] == 'demo' and c['ratio_to_floor']['rounds'] == 1
        assert 0 < c['tokens_per_second']['q25'] <= c['tokens_per_second']['median'] <= c['tokens_per_second']['q75']
        (steps,) = c['rounds']
        assert [s['step'] for s in steps] == [1, 2, 3] and [s['measured'] for s in steps] == [False, True, True]
        assert all(0 < s['tokens'] <= 512 and s['seconds'] > 0
                   and s['process_peak'] >= s['step_peak'] > 0 for s in steps)
    floor, ours = ([s['loss'] for s in c['rounds'][0]] for c in d['contenders'])
    assert max(abs(a - b) for a, b in zip(floor, ours)) < 0.05  # the same rows in the same order
    for secret in (str(tmp_path), str(Path.home()), os.uname().nodename):
        assert secret not in out.read_text()


@pytest.mark.slow
def test_scale(tiny, rows, tmp_path):
    "benchmarks/scale.py: three arms in a round, six jobs around kept states; only the first of each pair fills them."
    out = tmp_path/'result.json'
    cmd = [sys.executable, root/'benchmarks'/'scale.py', '--rounds', 1, '--steps', 4, '--rows', 30, '--model', tiny,
           '--n-freeze', 2, '--seq-len', 512, '--out', out]
    r = subprocess.run(list(map(str, cmd)), capture_output=True, text=True, timeout=600)
    assert r.returncode == 0, r.stderr[-2000:]
    d = json.loads(out.read_text())
    assert len(d['rounds'][0]) == len(d['ratios']) == 3 and all(len(v) == 1 for v in d['ratios'].values())
    sent = [job['rows_through_frozen_layers'] for job in d['sharing']]
    assert sent[0] == sent[3] > 0 and sent[1:3] == sent[4:] == [0, 0]
    assert len({job['bytes_on_disk'] for job in d['sharing']}) == 1 and d['sharing'][0]['bytes_on_disk'] > 0
    for secret in (str(tmp_path), str(Path.home()), os.uname().nodename):
        assert secret not in out.read_text()


def test_quoted():
    "benchmarks/README.md and the front page say what the results say that they name."
    page = (root/'benchmarks'/'README.md').read_text(encoding='utf-8')
    d = json.loads((root/'benchmarks'/'results'/'2026-11-28-cpu.json').read_text())
    for c in d['contenders']:
        figures = f"| {c['tokens_per_second']['median']:,.0f} | {c['peak_mib']:,.0f} |"
        assert figures in page, (c['workload'], c['who'], figures)
    front = (root/'README.md').read_text(encoding='utf-8')
    ratios = {l['line']: [f"{l[name]:.2f}" for name in ('value', 'low', 'high')] for l in d['lines'] if 'low' in l}
    for line, (value, low, high) in ratios.items():
        if line.startswith(('first epoch', 'cached epochs', 'shape7b', 'launch to the end of the first step, alpaca_ft '
                            'against trl-nockpt')):
            assert f'{value}x ({low}-{high})' in page, line
    for line in ('first epoch, tokens/s, against LLaMA-Factory neat_packing',
                 'first epoch, tokens/s, against TRL without checkpointing',
                 'first epoch, tokens/s, against the bare loop',
                 'cached epochs, tokens/s, against LLaMA-Factory neat_packing',
                 'cached epochs, tokens/s, against TRL without checkpointing',
                 'cached epochs, tokens/s, against the bare loop',
                 'shape7b, tokens/s, alpaca_ft against the bare loop'):
        assert '{} times ({} to {})'.format(*ratios[line]) in front, line


def test_memory_is_quoted():
    "The table of appendix A5 is that of the result beside it."
    text = (root/'nbs'/'a5_memory.ipynb').read_text(encoding='utf-8')
    results = json.loads((root/'benchmarks'/'results'/'2026-11-27-memory.json').read_text())['results']
    lines = {}
    for r in results:
        if r['malloc'] == 'given-back':
            sign = '\N{MINUS SIGN}' if r['off'] < 0 else '+'
            sizes = f"{r['predicted']/2**20:,.0f} / {r['measured']/2**20:,.0f}"
            lines.setdefault((r['model'], r['settings']), []).append(f"{sizes} ({sign}{abs(r['off']):.1%})")
    assert len(lines) == 8
    for (model, settings), cells in lines.items():
        line = ' | '.join([f'| {model}', settings, *cells]).replace('%)', ' %)')
        assert line + ' |' in text, line


def test_the_large_model_is_quoted():
    "What A5 and the front page say of the model in Llama-2-7B's shape."
    found = json.loads((root/'benchmarks'/'results'/'2026-11-27-7b.json').read_text())
    text = (root/'nbs'/'a5_memory.ipynb').read_text(encoding='utf-8')
    front = (root/'README.md').read_text(encoding='utf-8')
    for r in found.values():
        counted, peak, losses = r['counted_gib'], r['peak_mib']/1024, r['held_out']
        rows = int(dict(flag[2:].split('=') for flag in r['flags'])['batch-size'])
        seconds = [s/rows for s in r['seconds_a_step']]
        line = (f'| {counted:.1f} GiB | {peak:.1f} GiB | {min(seconds):.0f} to {max(seconds):.0f} | '
                f'{losses[0]:.2f} \N{RIGHTWARDS ARROW} {losses[-1]:.2f} |')
        assert line in text, line
        assert f'{counted:.1f} GiB; {peak:.1f} GiB measured' in front
        assert losses == sorted(losses, reverse=True)
    moved = found['weights in bf16, adafactor']
    assert (moved['tensors_same'], moved['tensors_moved']) == (218 + 16, 57)


def test_the_seeds_are_quoted():
    "What the front page says of three seeds."
    found = json.loads((root/'benchmarks'/'results'/'2026-11-28-three-seeds.json').read_text(encoding='utf-8'))
    front = (root/'README.md').read_text(encoding='utf-8')
    by = {m['measure']: m for m in found['measures']}
    loss, stop, tokens = by['loss, response tokens'], by['answers that stop'], by['tokens, median']
    fell = sorted(loss['other'] - value for value in loss['runs'])
    assert f'fell by {fell[0]:.3f} to {fell[-1]:.3f}' in front
    assert f"the interval for their mean is {loss['low']:.3f} to {loss['high']:.3f}" in front
    assert {f'{value:.0%}' for value in stop['runs']} == {'99%', '100%'} and by['answers with ###']['runs'] == [0, 0, 0]
    assert f"{min(tokens['runs']):.0f} to {max(tokens['runs']):.0f} tokens" in front


def test_make_train_is_quoted():
    "The front page's table is that of the result beside it, and so are the answers in the picture."
    from alpaca_ft.evaluate import comparison_lines
    found = json.loads((root/'benchmarks'/'results'/'2026-11-28-make-train.json').read_text(encoding='utf-8'))
    front = (root/'README.md').read_text(encoding='utf-8')
    for line in comparison_lines(found['measures'], ('before', 'after')):
        assert line.rstrip() in front, line
    picture = (root/'nbs'/'images'/'answers.svg').read_text(encoding='utf-8')
    for sample in found['answers'][:4]:
        assert all(word in picture for word in sample['after'].split())


@pytest.mark.slow
def test_gpu_smoke(tmp_path):
    out = tmp_path/'gpu.json'
    cmd = [sys.executable, root/'benchmarks'/'gpu.py', '--device', 'cpu', '--tiny', '--rounds', 1, '--steps', 1,
           '--warmup', 1, '--seq-len', 256, '--only', 'floor', '--out', out]
    r = subprocess.run(list(map(str, cmd)), capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(root)),
                       timeout=240)
    assert r.returncode == 0, r.stderr[-2000:]
    d = json.loads(out.read_text())
    assert d['contenders'][0]['who'] == 'floor' and 'mean nothing' in d['not_measured']['gpu']
    assert 'not measured: gpu' in r.stdout
