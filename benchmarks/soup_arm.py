"""Train with the peer Soup (soup-cli) in this process, and log its steps. It runs in an environment of its own, which
`make_envs.sh soup` makes.

usage: soup_arm.py SPEC.json LOG.jsonl     (SPEC: model, rows, out, method, lr, max_steps, seq_len, seed, template)

Everything is as Soup's documentation has it, but for: no quantisation, no rows held back, the Alpaca prompt as chat
template, so that it learns the prompt that all are measured with, and an end after so many steps. Of a row with an
input Soup makes one message, so its prompt is that of a row without. The model is left in OUT/model.
"""
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

from probe import memory

QUIET = dict(HF_HUB_OFFLINE='1', TRANSFORMERS_OFFLINE='1', HF_DATASETS_OFFLINE='1', SOUP_NO_AUDIT_LOG='1',
             SOUP_TELEMETRY='0', TOKENIZERS_PARALLELISM='false')  # nothing is contacted


class StepLog:
    "A line of JSON for each optimizer step, and one for the training as a whole."

    def __init__(self, path):
        self.file, self.count, self.begin = open(path, 'w', buffering=1), 0, time.monotonic()

    def write(self, **line):
        "Append a line."
        self.file.write(json.dumps(line) + '\n')

    def watch(self, max_steps):
        "Log each step of any optimizer, and let transformers' Trainer stop after so many."
        from torch.optim.optimizer import register_optimizer_step_post_hook
        from transformers import Trainer
        inner = Trainer.train

        def train(trainer, *args, **kw):
            "Soup has epochs only, so the number of steps is set here."
            trainer.args.max_steps = max_steps
            batches = len(trainer.get_train_dataloader())
            trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
            self.begin = time.monotonic()
            out = inner(trainer, *args, **kw)
            self.write(trainable=trainable,
                       steps_per_epoch=math.ceil(batches/trainer.args.gradient_accumulation_steps))
            return out

        Trainer.train = train
        register_optimizer_step_post_hook(self.step)

    def step(self, *_):
        "Torch calls this after a step."
        now = time.monotonic()
        self.count += 1
        self.write(step=self.count, seconds=round(now - self.begin, 4), peak_mib=round(memory('VmHWM'), 1))
        self.begin = time.monotonic()


def soup(*words):
    "A command of Soup's command line, in this process."
    from soup_cli.cli import app
    code = app(list(words), standalone_mode=False)
    if code:
        raise SystemExit(code)


def method_options(method, model):
    "What selects the method in Soup's configuration; for Spectrum, its own scan says which matrices train."
    import yaml
    if method == 'freeze_layers':
        return dict(freeze_layers=24, lora=dict(r=0))
    if method == 'lisa':
        return dict(lisa_enabled=True)
    soup('spectrum', 'scan', '--model', model, '--top-percent', '25', '--modules', 'mlp,attn', '--output', 'patch.yaml',
         '--no-cache')
    return yaml.safe_load(Path('patch.yaml').read_text())['training']


def main():
    "Read what is wanted, write Soup's configuration, and train."
    import yaml
    spec, log = json.loads(Path(sys.argv[1]).read_text()), StepLog(Path(sys.argv[2]).resolve())
    out = Path(spec['out'])
    out.mkdir(parents=True)
    os.chdir(out)  # Soup writes below the current folder only
    os.environ.update(QUIET, SOUP_DB_PATH=str(out/'soup.db'), SOUP_SPECTRUM_CACHE_DIR=str(out))
    shutil.copytree(spec['model'], 'base')
    Path('base/chat_template.jinja').write_text(spec['template'])
    shutil.copyfile(spec['rows'], 'rows.json')
    model = str(out/'base')
    config = dict(base=model, task='sft', output='model',
                  data=dict(train=str(out/'rows.json'), format='alpaca', val_split=0., max_length=spec['seq_len']),
                  training=dict(epochs=1, lr=spec['lr'], batch_size=1, quantization='none', seed=spec['seed'])
                  | method_options(spec['method'], model))
    Path('soup.yaml').write_text(yaml.safe_dump(config, sort_keys=False))
    log.watch(spec['max_steps'])
    soup('train', '--config', 'soup.yaml', '--yes')


if __name__ == '__main__':
    main()
