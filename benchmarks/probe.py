"""Log every optimizer step of this process, whoever does the training: seconds, tokens, loss, memory, and how busy
others keep the machine.

A torch hook is called after each step of any optimizer, so that a contender runs unchanged. Times count from the
launch of the process.
"""
import json, os, resource, sys, time
from pathlib import Path

MIB = 2**20


def own_cpu():
    "CPU seconds of this process, all threads."
    t = os.times()
    return t.user + t.system


def busy_cpu():
    "CPU seconds that the machine was busy, all cores and processes; None where there is no /proc."
    try:
        f = [int(x) for x in Path('/proc/stat').read_text().split('\n', 1)[0].split()[1:9]]
    except OSError:
        return None
    return (sum(f) - f[3] - f[4])/os.sysconf('SC_CLK_TCK')  # all but idle and waiting for a disk


def memory(key):
    "VmRSS (now) or VmHWM (the peak) in MiB."
    try:
        return next(int(l.split()[1])/1024 for l in open('/proc/self/status') if l.startswith(key))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(1024 if sys.platform != 'darwin' else MIB)


def forget_peak():
    "Let VmHWM start again from what is resident now."
    try:
        Path('/proc/self/clear_refs').write_text('5')
    except OSError:
        pass


class Load:
    "CPU cores that other processes kept busy since the last call."
    def __init__(self): self.mark()
    def mark(self): self.at = time.monotonic(), own_cpu(), busy_cpu()
    def __call__(self):
        (t, own, busy), _ = self.at, self.mark()
        if busy is None:
            return None
        return round(max(0., (self.at[2] - busy) - (self.at[1] - own))/max(1e-9, self.at[0] - t), 2)


class Probe:
    "One line of JSON a step; the process ends after `last` steps, and steps up to `skip` are warm-up."
    def __init__(self, path, skip, last):
        self.file, self.skip, self.last = open(path, 'w', buffering=1), skip, last
        self.t0 = float(os.environ.get('BENCH_T0') or time.monotonic())
        self.n, self.tokens, self.losses, self.peak, self.load = 0, 0, [], 0, Load()

    def watch(self):
        "Start to watch; imports torch."
        from torch.optim.optimizer import register_optimizer_step_post_hook
        self.at = time.monotonic()
        register_optimizer_step_post_hook(self.step)

    def watch_trainer(self, pad_id=None):
        """Count the tokens (trailing pads left out) and keep the losses of transformers' Trainer, and of what
        inherits from it."""
        from transformers import Trainer
        inner = Trainer.training_step
        def training_step(trainer, model, inputs, *args, **kw):
            if pad_id is not None:
                ids = inputs['input_ids']
                # a row's last EOS may be the pad token too, and counts
                pads = (ids == pad_id).flip(-1).int().cumprod(-1).sum(-1)
                # a tensor: no waiting for the device
                self.tokens = self.tokens + ids.numel() - (pads - 1).clamp(min=0).sum()
            loss = inner(trainer, model, inputs, *args, **kw)
            self.losses.append(loss)
            return loss
        Trainer.training_step = training_step

    def step(self, *_):
        import torch
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.synchronize()
        now = time.monotonic()
        self.n += 1
        self.peak = max(self.peak, memory('VmHWM'))
        line = dict(step=self.n, measured=self.n > self.skip, t=round(now - self.t0, 3),
                    seconds=round(now - self.at, 4), tokens=int(self.tokens),
                    loss=float(sum(self.losses)) if self.losses else None, others=self.load(),
                    rss=round(memory('VmRSS'), 1), step_peak=round(memory('VmHWM'), 1),
                    process_peak=round(self.peak, 1))
        if cuda:
            line |= dict(cuda_peak=round(torch.cuda.max_memory_allocated()/MIB, 1))
        self.file.write(json.dumps(line) + '\n')
        if self.n == self.skip:
            forget_peak()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
        self.tokens, self.losses = 0, []
        if self.n >= self.last:
            raise SystemExit(0)  # nothing is evaluated or saved
        self.at = time.monotonic()
