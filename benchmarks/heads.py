#!/usr/bin/env python3
"""The head and its loss on a CUDA device: all logits at once, or one of the functions that never hold them all.

usage: heads.py [--out FILE.json]      (needs liger-kernel beside the package's requirements; under a minute)
"""
import argparse
import datetime
import json
import sys
import time
from pathlib import Path

import torch

from alpaca_ft.speed import liger_linear_loss, linear_loss, torch_linear_loss
from bench import machine

SHAPES = ((1024, 4096, 32000), (8192, 4096, 32000), (8192, 2048, 151936))  # tokens, width, words


def plain_loss(h, weight, targets, scale):
    "All logits at once."
    logits = h @ weight.to(h.dtype).T
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction='sum')*scale


def measured(function, tokens, width, words):
    "Milliseconds of a forward and a backward pass, MiB beyond weights and inputs, and how far the loss is from fp32's."
    h = torch.randn(tokens, width, device='cuda', dtype=torch.bfloat16, requires_grad=True)
    w = (torch.randn(words, width, device='cuda')*0.02).requires_grad_()
    targets = torch.randint(0, words, (tokens,), device='cuda')
    seconds = []
    for _ in range(8):
        h.grad = w.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        begin = time.perf_counter()
        loss = function(h, w, targets, 1/tokens)
        loss.backward()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    mib = (torch.cuda.max_memory_allocated() - held)/2**20
    exact = plain_loss(h.detach().float(), w.detach(), targets, 1/tokens)
    return sorted(seconds[2:])[3]*1000, mib, (loss - exact).abs().item()


def main():
    "One line a shape and function, and the JSON."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, help='the JSON')
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print('heads.py: no CUDA device here', file=sys.stderr)
        return 2
    torch.manual_seed(0)
    rows = []
    for tokens, width, words in SHAPES:
        for head in (plain_loss, linear_loss, torch_linear_loss, liger_linear_loss):
            ms, mib, off = measured(head, tokens, width, words)
            print(f'{tokens} tokens x {width}, {words} words, {head.__name__}: {ms:.2f} ms, {mib:.0f} MiB, '
                  f'loss off by {off:.1e}')
            rows.append(dict(tokens=tokens, width=width, words=words, head=head.__name__, milliseconds=round(ms, 2),
                             mib=round(mib), loss_off_by=off))
    if args.out:
        date = datetime.date.today().isoformat()
        args.out.write_text(json.dumps(dict(date=date, machine=machine(), heads=rows), indent=1) + '\n')


if __name__ == '__main__':
    sys.exit(main())
