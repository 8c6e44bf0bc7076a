"""The command on the stand-in device: python tests/device_run.py [single|double] ARGUMENTS

Prints the copies between device and host of each training step to stderr at the end, and where they came from.
"""
import json
import os
import sys

import standin

standin.register(double=sys.argv[1] == 'double')
standin.copies.where = True

import alpaca_ft.trainer  # noqa: E402
from alpaca_ft.cli import main  # noqa: E402

seen = []
begin = alpaca_ft.trainer.PackedSFTTrainer.training_step


def training_step(self, *args, **kw):
    "Note how many copies there were before each micro-batch."
    seen.append((self.state.global_step, len(standin.copies.places)))
    return begin(self, *args, **kw)


alpaca_ft.trainer.PackedSFTTrainer.training_step = training_step
code = main(sys.argv[2:])
if path := os.environ.get('COPIES'):
    steps = {}
    for (step, start), (_, end) in zip(seen, seen[1:]):
        places = [f'{p.direction} {os.path.basename(p.file)}:{p.function}' for p in standin.copies.places[start:end]]
        steps.setdefault(step, []).extend(places)
    with open(path, 'w') as f:
        json.dump(steps, f)
sys.exit(code)
