#!/usr/bin/env python3
"""What was tried to make a step faster, kept or not: each beside the way it would replace, in turns, in one process,
on the demo model.

usage: tried.py [--rows 4] [--rounds 5] [--data FILE] [--out FILE.json]
Prints one table and writes one JSON (benchmarks/results/DATE-tried.json). A ratio above 1 means that the tried way
is faster.
"""
import argparse, copy, datetime, json, os, random, shutil, statistics, sys, tempfile, time
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path[:0] = [str(here.parent), str(here)]

import torch  # noqa: E402
from alpaca_ft.data import load_alpaca  # noqa: E402
from alpaca_ft.model import autocast, decoder_layers, freeze, load_model, load_tokenizer  # noqa: E402
from alpaca_ft.packing import pack  # noqa: E402
from alpaca_ft.prefix import States, prefix_states, tail  # noqa: E402
from alpaca_ft.prompts import tokenize  # noqa: E402
from alpaca_ft.run import quiet  # noqa: E402
from alpaca_ft.speed import head_inputs, isolated, linear_loss  # noqa: E402
from alpaca_ft.trainer import run_collator, token_losses  # noqa: E402


def in_turns(old, new, rounds, items):
    """Seconds of both ways for each item, one after the other: (ratio of the medians, least and greatest ratio of a
    round)."""
    for f in (old, new):
        f(items[0])  # warm up
    each, a, b = [], [], []
    for _ in range(rounds):
        s = []
        for f in (old, new):
            t = time.perf_counter()
            for x in items:
                f(x)
            s.append(time.perf_counter() - t)
        a.append(s[0])
        b.append(s[1])
        each.append(s[0]/s[1])
    return dict(ratio=statistics.median(a)/statistics.median(b), low=min(each), high=max(each),
                seconds=statistics.median(b)/len(items), seconds_before=statistics.median(a)/len(items))


class Work:
    "The demo model, frozen as a run freezes it, and packed rows with the states at the first trained layer."
    def __init__(self, args):
        quiet()
        self.args, self.model, self.tok = args, freeze(load_model('demo'), 24, verbose=False), load_tokenizer('demo')
        self.packed, _ = pack(tokenize(load_alpaca(args.data)['train'], self.tok), 1024)
        collate = run_collator(0, 'all')
        self.batches = [collate([self.packed[i]]) for i in range(args.rows)]
        for b in self.batches:
            b['states'] = self.prefix(b)
        self.params = [p for p in self.model.parameters() if p.requires_grad]

    def prefix(self, b, model=None):
        with isolated(model or self.model, b['position_ids']):
            return prefix_states(model or self.model, 24, b)

    def hidden(self, t, b):
        "The tail's last hidden states and their targets."
        t._states = b['states']
        try:
            with autocast(self.model):
                return head_inputs(t,
                                   dict(inputs_embeds=b['states'], position_ids=b['position_ids'], labels=b['labels']))
        finally:
            t._states = None

    def step(self, t, b):
        h, targets = self.hidden(t, b)
        linear_loss(h, self.model.lm_head.weight, targets, 1/len(targets)).backward()
        for p in self.params:
            p.grad = None


def fused(w):
    """Head and loss in one function that makes the gradients on the spot, in pieces of 128 tokens, against logits
    and cross entropy."""
    t = tail(w.model, 24)
    def plain(b):
        h, targets = w.hidden(t, b)
        with autocast(w.model):
            logits = w.model.lm_head(h)
        torch.nn.functional.cross_entropy(logits.float(), targets).backward()
        for p in w.params:
            p.grad = None
    out = in_turns(plain, lambda b: w.step(t, b), w.args.rounds, w.batches)
    t._hook.remove()
    return out | dict(kept=True, of='a cached step')


def torchs_own(w):
    "PyTorch's chunked `linear_cross_entropy` for head and loss, against the function of the package."
    import torch.nn.functional as F
    if not hasattr(torch.nn, 'LinearCrossEntropyOptions'):
        return dict(why='no chunked linear_cross_entropy in this PyTorch')
    t = tail(w.model, 24)
    made = [(h.detach(), targets) for h, targets in (w.hidden(t, b) for b in w.batches)]
    t._hook.remove()
    weight, losses = w.model.lm_head.weight, {}
    def run(name, loss):
        def f(x):
            h, targets = x[0].clone().requires_grad_(True), x[1]
            out = loss(h, targets)
            out.backward()
            weight.grad = None
            losses.setdefault(name, []).append(out.item())
        return f
    ours = run('ours', lambda h, t: linear_loss(h, weight, t, 1/len(t)))
    theirs = run('theirs', lambda h,
                 t: F.linear_cross_entropy(h, weight.to(h.dtype), t, options=torch.nn.LinearCrossEntropyOptions()))
    out = in_turns(ours, theirs, w.args.rounds, made)
    return out | dict(kept=False, of='head and loss',
                      note=f"{out['seconds']:.1f} s a row instead of {out['seconds_before']:.1f}; the first row's "
                           f"loss is {losses['theirs'][0]:.4f} instead of {losses['ours'][0]:.4f}")


def documents(w):
    "Attention document by document, against one masked attention over the row."
    def masked(b): return prefix_states(w.model, 24, b)
    return in_turns(masked, w.prefix, w.args.rounds, w.batches) | dict(kept=True, of='a pass through the frozen layers')


def compiled(w):
    """torch.compile of the trained layers' feed-forward blocks (attention's lengths differ from row to row, and
    would be compiled anew for each)."""
    if shutil.which('g++') is None:
        return dict(why='no g++ here')
    t = tail(w.model, 24)
    layers, plain = decoder_layers(w.model)[24:], [l.mlp for l in decoder_layers(w.model)[24:]]
    def use(mlps):
        for l, m in zip(layers, mlps):
            l.mlp = m
    fast = [torch.compile(m) for m in plain]
    start = time.perf_counter()
    def new(b):
        use(fast)
        w.step(t, b)
        use(plain)
    new(w.batches[0])
    first = time.perf_counter() - start
    out = in_turns(lambda b: w.step(t, b), new, w.args.rounds, w.batches)
    t._hook.remove()
    return out | dict(kept=False, of='a cached step', note=f'the first step takes {first:.0f} s')


def int8(w):
    "Frozen layers with int8 weights and activations (PyTorch's dynamic quantization), against bf16."
    import warnings
    warnings.filterwarnings('ignore')
    q = copy.deepcopy(w.model).float()
    layers = decoder_layers(q)
    for i in range(24):
        layers[i] = torch.ao.quantization.quantize_dynamic(layers[i], {torch.nn.Linear}, torch.qint8)
    def new(b): return w.prefix(b, q)
    def loss(states, b):
        t = tail(w.model, 24)
        t._states = states.to(b['states'].dtype)
        with torch.no_grad(), autocast(w.model), isolated(w.model, b['position_ids']):
            l, on, _ = token_losses(t,
                                    dict(inputs_embeds=b['states'], position_ids=b['position_ids'], labels=b['labels'],
                                         response=b['response']))
        t._hook.remove()
        return (l.sum()/on.sum()).item()
    out = in_turns(w.prefix, new, w.args.rounds, w.batches)
    a, b = (statistics.mean(loss(f(x), x) for x in w.batches) for f in (w.prefix, new))
    return out | dict(kept=False, of='a pass through the frozen layers', note=f'loss {a:.4f} becomes {b:.4f}')


def opening(w):
    """The template's opening, the same in each document, computed once for a row: an upper bound, by leaving its
    tokens out of all documents but the first."""
    first = next(i for i,
                 (a, b) in enumerate(zip(*(w.tok(w.tok.decode(d))['input_ids'] for d in docs(w.packed[0])[:2])))
                 if a != b)
    collate, short = run_collator(0, 'all'), []
    for i in range(w.args.rows):
        d = docs(w.packed[i])
        kept = [x if j == 0 else x[first:] for j, x in enumerate(d)]
        short.append(collate([dict(input_ids=sum(kept, []), completion_mask=[1]*sum(map(len, kept)),
                                   seq_lengths=list(map(len, kept)))]))
    pairs = list(zip(w.batches, short))
    out = in_turns(lambda p: w.prefix(p[0]), lambda p: w.prefix(p[1]), w.args.rounds, pairs)
    return out | dict(kept=False, of='a pass through the frozen layers',
                      note=f'{first} tokens of each document; at most so much, and only in the pass that '
                           'the cache does once')


def docs(row):
    "A packed row's documents."
    out, n = [], 0
    for l in row['seq_lengths']:
        out.append(row['input_ids'][n:n+l])
        n += l
    return out


def read_ahead(w):
    "Cached rows in the file's order instead of a random one, read from a file that is in no cache."
    with tempfile.TemporaryDirectory(dir=here) as tmp:
        n, path = 400, Path(tmp)/'states.bin'
        States([1024]*n, 576, torch.bfloat16, path).data.fill_(1.)
        with open(path, 'rb') as f:
            os.fsync(f.fileno())
        def read(order):
            with open(path, 'rb') as f:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            s = States([1024]*n, 576, torch.bfloat16, path)
            for i in order:
                s[i].clone()
        mixed = random.Random(0).sample(range(n), n)
        out = in_turns(lambda _: read(mixed), lambda _: read(range(n)), w.args.rounds, [0])
    return out | dict(kept=False, of='reading 400 rows',
                      note=f"{out['seconds_before']/n*1000:.1f} ms a row in random order")


TRIED = dict(fused=fused, torchs_own=torchs_own, documents=documents, compiled=compiled, int8=int8, opening=opening,
             read_ahead=read_ahead)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--rows', type=int, default=4, help='packed rows [4]')
    p.add_argument('--rounds', type=int, default=5, help='turns [5]')
    p.add_argument('--data', default='builtin', help='rows [builtin]')
    p.add_argument('--only', nargs='+', choices=TRIED, default=list(TRIED))
    p.add_argument('--out', default=here/'results'/f'{datetime.date.today().isoformat()}-tried.json')
    args = p.parse_args(argv)
    from bench import machine
    w, result = Work(args), {}
    for name in args.only:
        try:
            r = TRIED[name](w)
        except Exception as e:
            r = dict(why=f'{type(e).__name__}: {" ".join(str(e).split())[:160]}')
        result[name] = r | dict(what=' '.join(TRIED[name].__doc__.split()))
        said = f"not run: {r.get('why')}"
        if 'ratio' in r:
            kept = 'kept' if r['kept'] else 'not kept'
            said = f"{r['ratio']:.2f}x ({r['low']:.2f}-{r['high']:.2f}) of {r['of']}; {kept}; {r.get('note', '')}"
        print(f'{name:12}', said, flush=True)
    Path(args.out).parent.mkdir(exist_ok=True)
    Path(args.out).write_text(json.dumps(dict(date=datetime.date.today().isoformat(), machine=machine(), rows=args.rows,
                                              rounds=args.rounds, tried=result), indent=1) + '\n')
    return any('why' in r for r in result.values())


if __name__ == '__main__':
    sys.exit(main())
