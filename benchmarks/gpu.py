#!/usr/bin/env python3
"""The same table on a CUDA device, with the shape of Llama-2-7B and random weights: nothing is downloaded, one call
takes under 8 minutes.

usage: gpu.py [--rounds 2] [--steps 10] [--budget 420] [--out FILE.json]
       gpu.py --device cpu --tiny        a smoke test of this script where there is no GPU; it measures nothing
Needs the package and its requirements (PyPI wheels alone), 14 GB of disk in the temporary folder, 20 GB of memory and
about 50 GB on the device.
"""
import argparse, datetime, os, re, sys, tempfile, time
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path[:0] = [str(here.parent), str(here)]
TINY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
            vocab_size=1000,
            max_position_embeddings=1024, tie_word_embeddings=False)
WHO = ['floor', 'floor-cached', 'trl-doc', 'trl-nockpt', 'alpaca_ft', 'alpaca_ft-cached']


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--device', choices=('cuda', 'cpu'), default='cuda', help='[cuda]')
    p.add_argument('--tiny', action='store_true', help='a tiny shape, to see that the script works')
    p.add_argument('--rounds', type=int, default=2, help='blocks of each contender, in turns [2]')
    p.add_argument('--steps', type=int, default=10, help='measured steps of a block [10]')
    p.add_argument('--warmup', type=int, default=3, help='steps of a block that are not measured [3]')
    p.add_argument('--only', nargs='+', choices=WHO, default=WHO, metavar='NAME',
                   help='nothing but these: ' + ', '.join(WHO))
    p.add_argument('--budget', type=int, default=420, help='seconds after which no block is started [420]')
    p.add_argument('--seq-len', type=int, default=1024, help='tokens of a packed row [1024]')
    p.add_argument('--data', default='builtin', help='rows, as alpaca_ft train takes them [builtin]')
    p.add_argument('--out', help='the JSON [benchmarks/results/DATE-DEVICE.json]')
    return p.parse_args(argv)


def main(argv=None):
    args, t0 = parse(argv), time.monotonic()
    if args.device == 'cpu':
        os.environ['CUDA_VISIBLE_DEVICES'] = ''
    os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
    import torch
    if args.device == 'cuda' and not torch.cuda.is_available():
        print('gpu.py: no CUDA device here; --device cpu --tiny tests the script', file=sys.stderr)
        return 2
    from bench import Bench, Work, finish, main_lines, random_model, rounds, say
    from alpaca_ft.data import load_alpaca
    from alpaca_ft.model import LLAMA_2_7B
    from alpaca_ft.prompts import create_prompt
    from alpaca_ft.trainer import quiet
    quiet()
    device = torch.cuda.get_device_name(0) if args.device == 'cuda' else 'cpu'
    smoke = '-smoke' if args.device == 'cpu' or args.tiny else ''
    name = re.sub(r'[^a-z0-9]+', '-', device.lower())
    args.out = args.out or here/'results'/f'{datetime.date.today().isoformat()}-{name}{smoke}.json'
    shape, n_freeze = (TINY, 3) if args.tiny else (LLAMA_2_7B, 24)
    with tempfile.TemporaryDirectory() as tmp:
        b = Bench(args, Path(tmp))
        rows = load_alpaca(args.data)['train'].to_list()
        asked = {k: getattr(args, k) for k in ('rounds', 'steps', 'warmup', 'seq_len', 'budget')}
        b.result['settings'] = asked | dict(shape=shape, n_freeze=n_freeze, rows=len(rows), weights='random')
        if smoke:
            size = 'tiny' if args.tiny else 'full'
            b.result['not_measured']['gpu'] = (f'a smoke test of the script ({device}, {size} shape); '
                                               'its figures mean nothing')
        model = random_model(shape, Path(tmp)/'model', map(create_prompt, rows), args.device)
        if args.device == 'cuda':
            torch.cuda.empty_cache()
        say(f'random model after {time.monotonic() - t0:.0f} s')
        work = Work(args, Path(tmp), 'gpu', model, shape['num_hidden_layers'], n_freeze, rows)
        done = rounds(b, [(work, list(args.only))], args.budget - (time.monotonic() - t0))
        b.result['lines'] = main_lines(done)
        b.result['seconds'] = round(time.monotonic() - t0)
        b.result['not_measured'] |= b.failed
        b.write()
    finish(b)
    return 1 if b.failed else 0


if __name__ == '__main__':
    sys.exit(main())
