"""The memory of three runs over time: everything at once, on kept states, and layer by layer.

usage: python benchmarks/memory_over_time.py [--out FILE]

A model of random weights (24 layers, 1024 wide, bf16; the upper four train) is trained for four steps of one row of 512
tokens, each way in a process of its own. The kernel is asked for the resident memory of the process ten times a second.
Linux only.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from memory import make_parts

SHAPE = dict(vocab_size=16000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=24, num_attention_heads=16,
             num_key_value_heads=16, tie_word_embeddings=False)
WAYS = {'ordinary': ['--prefix-cache=off'], 'kept states': ['--prefix-cache=disk', '--no-layer-by-layer'],
        'layer by layer': ['--prefix-cache=disk', '--layer-by-layer']}


def resident(pid):
    "MiB that are resident, or None where the process has ended."
    try:
        text = Path(f'/proc/{pid}/status').read_text()
    except OSError:
        return None
    lines = [line for line in text.splitlines() if line.startswith('VmRSS')]
    return int(lines[0].split()[1])/1024 if lines else None


def watch(folder, way, flags):
    "[seconds, MiB] points of a run."
    argv = ['train', f'--model={folder}/Large', f'--data={folder}/rows.jsonl', f'--eval-data={folder}/eval.jsonl',
            '--n-freeze=20', '--seq-len=512', '--max-steps=4', '--n-samples=0', '--dtype=bf16',
            f'--out={folder}/{way.replace(" ", "-")}', *flags]
    env = os.environ | dict(OMP_NUM_THREADS='1', ALPACA_FT_CACHE=f'{folder}/{way.replace(" ", "-")}-cache')
    points, begin = [], time.perf_counter()
    with subprocess.Popen([sys.executable, '-m', 'alpaca_ft', *argv], env=env, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True) as child:
        os.set_blocking(child.stderr.fileno(), False)
        said = ''
        while child.poll() is None:
            if (now := resident(child.pid)) is not None:
                points.append([round(time.perf_counter() - begin, 1), round(now)])
            said = (said + (child.stderr.read() or ''))[-2000:]
            time.sleep(0.1)
    if child.returncode:
        raise RuntimeError(said)
    return points


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', default=f'benchmarks/results/{date.today()}-memory-over-time.json', metavar='FILE')
    args = p.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_parts(folder, {'Large': ('LlamaConfig', SHAPE)})
        for way, flags in WAYS.items():
            found[way] = watch(folder, way, flags)
            print(f'{way}: {max(mib for _, mib in found[way]):,} MiB at most', flush=True)
    Path(args.out).write_text(json.dumps(dict(unit='[seconds, MiB]', ways=found)))


if __name__ == '__main__':
    main()
