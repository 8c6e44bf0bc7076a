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


def test_quoted():
    "The README's comparison says what the result that it names says."
    import re
    text = (root/'README.md').read_text(encoding='utf-8')
    d = json.loads((root/re.search(r'\]\((benchmarks/results/[\w-]+\.json)\)', text)[1]).read_text())
    who = {c['who']: c for c in d['contenders'] if c['workload'] == 'demo'}
    ratio = {l['line']: f"{l['value']:.2f}x ({l['low']:.2f}-{l['high']:.2f})" for l in d['lines'] if 'low' in l}
    names = {'alpaca_ft, first epoch': ('alpaca_ft', None), 'alpaca_ft, prefix cache': ('alpaca_ft-cached', None),
             'LLaMA-Factory 0.9.5': ('llama-factory', 'LLaMA-Factory neat_packing'),
             'a bare PyTorch loop': ('floor', 'the bare loop'),
             'TRL 1.16, activation checkpointing off': ('trl-nockpt', 'TRL without checkpointing'),
             'TRL 1.16, as': ('trl-doc', 'TRL as documented')}
    for name, (c, peer) in names.items():
        row = next(l for l in text.splitlines() if l.startswith(f'| {name}'))
        expected = [f"{who[c]['tokens_per_second']['median']:.0f}",
                    f"{who[c]['peak_mib']:,.0f}"] + ([ratio[f'{k} epoch{s}, tokens/s, against {peer}'] for k,
                                                      s in (('first', ''), ('cached', 's'))] if peer else ['', ''])
        assert [x.strip() for x in row.split('|')[2:-1]] == expected


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
