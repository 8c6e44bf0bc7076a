"""The command on the stand-in device: python tests/device_run.py [single|double|real] ARGUMENTS

`real` takes the device that PyTorch finds (a GPU), and no stand-in.

With COPIES=FILE in the environment, the copies between device and host of each training step are written there, and
where they came from. With `serve` in the place of arguments, modules are imported once, and each line of JSON on
stdin (argv, cwd, env, input, out, err) is a command in a forked child: its process id is printed, and when it has
ended its exit code.
"""
import json
import os
import sys

import torch

import standin

if sys.argv[1] != 'real':
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


def run(argv):
    "One command; its exit code."
    try:
        code = main(argv)
    except SystemExit as e:
        code = e.code
    if path := os.environ.get('COPIES'):
        steps = {}
        for (step, start), (_, end) in zip(seen, seen[1:]):
            places = [f'{p.direction} {os.path.basename(p.file)}:{p.function}'
                      for p in standin.copies.places[start:end]]
            steps.setdefault(step, []).extend(places)
        with open(path, 'w') as f:
            json.dump(steps, f)
    return code


def child(order):
    "What a forked child does: it takes its place, its files and its environment, and ends with the command."
    code = 1
    try:
        torch.set_num_threads(1)  # PyTorch's thread pool is new after a fork; threads would race for it
        os.chdir(order['cwd'])
        os.environ |= order['env']
        os.dup2(os.open(order['input'], os.O_RDONLY), 0)
        for number, name in ((1, order['out']), (2, order['err'])):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdin = open(0, closefd=False)
        sys.stdout = open(1, 'w', buffering=1, closefd=False)
        sys.stderr = open(2, 'w', buffering=1, closefd=False)
        code = run(order['argv'])
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve():
    "Commands, one after another."
    import alpaca_ft.evaluate, alpaca_ft.run, alpaca_ft.use, datasets, trl  # noqa: F401 (once, for all children)
    trl.SFTTrainer
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(order)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == '__main__':
    if sys.argv[2:] == ['serve']:
        serve()
    else:
        sys.exit(run(sys.argv[2:]))
