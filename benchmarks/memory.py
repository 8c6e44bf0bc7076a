"""Predicted against measured: the peak memory of training, eight shapes, each in a process of its own.

usage: python benchmarks/memory.py [--only REGEX] [--out FILE]

Models of random weights are trained for two steps by `alpaca_ft.train` on rows of 1024 tokens. The kernel's mark of the
most resident memory (VmHWM) is cleared before a step and read after its backward pass and after its update; the same
for the evaluations, and for the whole run, with loading, checks and saving. It is done twice: with malloc as it comes,
and as it is where memory may be short, when what was freed goes back at once (`give_back_at_once`). Linux only.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

COMMON = dict(max_position_embeddings=2048, bos_token_id=0, eos_token_id=1, pad_token_id=1)
MODELS = {
    'Llama': ('LlamaConfig', dict(vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
                                  num_attention_heads=12, num_key_value_heads=12, tie_word_embeddings=False)),
    'SmolLM2': ('LlamaConfig', dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                                    num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True)),
    'Qwen2': ('Qwen2Config', dict(vocab_size=100000, hidden_size=512, intermediate_size=2048, num_hidden_layers=12,
                                  num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=False)),
    'GPT-NeoX': ('GPTNeoXConfig', dict(vocab_size=50304, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                                       num_attention_heads=12, attention_dropout=0., hidden_dropout=0.)),
}
CASES = [
    ('Llama', 'upper quarter, kept states, fp32', dict(n_freeze=0.75, dtype='fp32', prefix_cache='memory')),
    ('Llama', 'all weights, fp32', dict(method='full', dtype='fp32')),
    ('SmolLM2', 'upper 6 layers, kept states, bf16', dict(n_freeze=24, dtype='bf16', prefix_cache='memory')),
    ('SmolLM2', 'LoRA, 2 rows, recomputed, bf16', dict(method='lora', n_freeze=0, dtype='bf16', batch_size=2,
                                                       micro_batch_size=2, activation_checkpointing=True)),
    ('Qwen2', 'upper quarter, 2 micro-batches, bf16', dict(n_freeze=0.75, dtype='bf16', prefix_cache='off',
                                                           batch_size=2)),
    ('Qwen2', 'layers 4-7, 2 rows, kept states, fp32', dict(layers='4-7', dtype='fp32', prefix_cache='memory',
                                                            batch_size=2, micro_batch_size=2)),
    ('GPT-NeoX', 'LoRA, recomputed, fp32', dict(method='lora', n_freeze=0, dtype='fp32',
                                                activation_checkpointing=True)),
    ('GPT-NeoX', 'all weights, recomputed, bf16', dict(method='full', dtype='bf16', activation_checkpointing=True)),
]


def small_tokenizer(rows, size=600):
    "A tokenizer that was trained on the prompts of rows."
    import transformers
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from alpaca_ft import create_prompt
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    how = trainers.BpeTrainer(vocab_size=size, special_tokens=['<s>', '</s>'], initial_alphabet=letters,
                              show_progress=False)
    bpe.train_from_iterator([create_prompt(r) for r in rows], how)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token='<s>', eos_token='</s>',
                                                pad_token='</s>')


def make_parts(folder, models=MODELS):
    "Models of random weights with a small tokenizer, and rows."
    import torch
    import transformers
    from alpaca_ft import load_alpaca, write_jsonl
    rows = load_alpaca()['train']
    tokenizer = small_tokenizer(rows)
    for name, (kind, config) in models.items():
        torch.manual_seed(0)
        config = getattr(transformers, kind)(**config, **COMMON)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder/name)
        tokenizer.save_pretrained(folder/name)
    write_jsonl(folder/'rows.jsonl', rows.select(range(24)))
    write_jsonl(folder/'eval.jsonl', rows.select(range(60, 76)))


def status(name):
    "A line of the kernel's status of this process, in bytes."
    text = Path('/proc/self/status').read_text()
    return int(re.search(rf'^{name}:\s+(\d+)', text, re.M)[1])*1024


def marks(peaks):
    "A callback that keeps the peaks of steps and of evaluations apart."
    from transformers import TrainerCallback

    class Marks(TrainerCallback):
        "The kernel's high-water mark is read and taken back around each."

        def mark(self, what=None):
            for one in ('run', what) if what else ('run',):
                peaks[one] = max(peaks[one], status('VmHWM'))
            Path('/proc/self/clear_refs').write_text('5')

        def on_train_begin(self, *args, **kw):
            self.mark()

        def on_step_begin(self, *args, **kw):
            self.mark()

        def on_optimizer_step(self, *args, **kw):
            self.mark('step')

        def on_step_end(self, *args, **kw):
            self.mark()

        def on_evaluate(self, *args, **kw):
            self.mark('evaluation')

    return Marks()


def child(options, given_back):
    "Train two steps; print what was predicted and what was measured."
    import alpaca_ft.run as runs
    from alpaca_ft.memory import give_back_at_once, memory_plan
    from alpaca_ft.options import RunConfig
    runs.spare_memory = lambda *_: given_back and give_back_at_once()  # as if the machine had less memory, or more
    peaks, kept, build = dict(step=0, evaluation=0, run=0), {}, runs.build_trainer

    def before(run, *args, **kw):
        kept.update(runs.known(run), shape=run.shape, place=run.place, choice=run.choice)
        return build(run, *args, **kw)

    runs.build_trainer = before
    callback = marks(peaks)
    run = runs.train(RunConfig(**options), [callback])
    callback.mark()
    sums, by = memory_plan(run.cfg, **kept)
    predicted = dict(step=sums['a training step'], evaluation=sums['an evaluation'], run=max(sums.values()))
    print('RESULT ' + json.dumps(dict(process=kept['process'], by=by, predicted=predicted, measured=peaks)))


def measured(folder, model, options, given_back):
    "One shape in a process of its own."
    options = options | dict(model=str(folder/model), data=str(folder/'rows.jsonl'), eval_data=str(folder/'eval.jsonl'),
                             out=str(folder/'out'), max_steps=2, eval_every=2, n_samples=0)
    subprocess.run(['rm', '-rf', str(folder/'out')], check=True)
    command = [sys.executable, __file__, '--child', json.dumps([options, given_back])]
    env = os.environ | dict(OMP_NUM_THREADS='1')
    r = subprocess.run(command, capture_output=True, text=True, timeout=7200, env=env)
    for line in r.stdout.splitlines():
        if line.startswith('RESULT '):
            return json.loads(line[7:])
    raise RuntimeError(r.stderr[-2000:])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', default='', metavar='REGEX')
    p.add_argument('--out', default=f'benchmarks/results/{date.today()}-memory.json', metavar='FILE')
    p.add_argument('--malloc', nargs='+', choices=('given-back', 'default'), default=['given-back', 'default'])
    p.add_argument('--child', help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.child:
        return child(*json.loads(args.child))
    results = []
    print('| model | settings | malloc | process | predicted | measured | off | off without the process |\n'
          '|---|---|---|---|---|---|---|---|')
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_parts(folder)
        for model, settings, options in CASES:
            if not re.search(args.only, f'{model} {settings}'):
                continue
            for given_back in args.malloc:
                r = measured(folder, model, options, given_back == 'given-back')
                for what in ('step', 'evaluation', 'run'):
                    base, predicted, found = r['process'], r['predicted'][what], r['measured'][what]
                    off, off_alone = predicted/found - 1, (predicted - base)/(found - base) - 1
                    results.append(dict(model=model, settings=settings, options=options, what=what, malloc=given_back,
                                        process=base, by=r['by'], predicted=predicted, measured=found, off=off,
                                        off_without_process=off_alone))
                    row = [model, f'{settings}: {what}', given_back,
                           *(f'{n/2**20:,.0f}' for n in (base, predicted, found)), f'{off:+.1%}', f'{off_alone:+.1%}']
                    print('| ' + ' | '.join(row) + ' |', flush=True)
                Path(args.out).write_text(json.dumps(dict(unit='bytes', results=results), indent=1))


if __name__ == '__main__':
    main()
