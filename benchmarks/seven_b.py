"""A model as large as the article's, tuned in little memory: Llama-2-7B's shape with random bf16 weights.

usage: python benchmarks/seven_b.py FOLDER [--only REGEX] [--out FILE]

FOLDER gets the model (13 GB of safetensors, made shard by shard), its rows, the kept states (0.2 GB) and the runs (at
most 13 GB, deleted one after another). Run again, it uses the model and the states that are there. Each way of training
is a command of its own that reads the frozen layers one by one; the kernel says how much memory was resident at most.
Afterwards the tuned model's files are compared with the original ones, tensor by tensor. With the states there, on two
cores that compute in bf16, the second way took 13 minutes and the third 8. Linux only.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

WAYS = {
    'LoRA': ['--n-freeze=24', '--method=lora', '--batch-size=1', '--max-steps=10', '--eval-every=5'],
    'weights in bf16, adafactor': ['--n-freeze=24', '--train-dtype=bf16', '--optim=adafactor', '--batch-size=1',
                                   '--max-steps=10', '--eval-every=5'],
    'preset article, as check --memory 16GB has it': ['--preset=article', '--method=lora', '--prefix-cache=disk',
                                                      '--track=none', '--batch-size=4', '--max-steps=2'],
}


def make_model(folder):
    "Random weights, two layers a file, never held whole; with a small tokenizer and rows."
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig
    from alpaca_ft import load_alpaca, write_jsonl
    from alpaca_ft.model import LLAMA_2_7B, model_shape
    from memory import small_tokenizer
    folder.mkdir(parents=True, exist_ok=True)
    shape, numbers = model_shape().state_dict(), torch.Generator().manual_seed(0)
    groups = [[name for name in shape if '.layers.' not in name]]
    for i in range(0, LLAMA_2_7B['num_hidden_layers'], 2):
        groups.append([name for name in shape if re.search(rf'\.layers\.({i}|{i + 1})\.', name)])
    where, size = {}, 0
    for n, names in enumerate(groups, 1):
        file, part = f'model-{n:05}-of-{len(groups):05}.safetensors', {}
        for name in names:
            weight = torch.ones(shape[name].shape)
            if 'norm' not in name:
                weight.normal_(0, 0.02, generator=numbers)
            part[name], where[name] = weight.bfloat16(), file
            size += 2*weight.numel()
        save_file(part, folder/file, metadata=dict(format='pt'))
    index = dict(metadata=dict(total_size=size), weight_map=where)
    (folder/'model.safetensors.index.json').write_text(json.dumps(index))
    config = LlamaConfig(**LLAMA_2_7B, bos_token_id=0, eos_token_id=1, architectures=['LlamaForCausalLM'])
    config.dtype = 'bfloat16'
    rows = load_alpaca()['train']
    write_jsonl(folder/'rows.jsonl', rows.select(range(130)))
    write_jsonl(folder/'eval.jsonl', rows.select(range(300, 312)))
    small_tokenizer(rows, 2000).save_pretrained(folder)
    config.save_pretrained(folder)  # last: it says that all is there


def peak_of(argv, env):
    "Run a command; the most memory that it had, in MiB, and the end of what it printed."
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        said = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(said[-2000:])
    return usage.ru_maxrss/1024


def compared(old, new):
    "How many tensors of the tuned model differ from the original's, and how many are the same byte for byte."
    from safetensors import safe_open
    index = json.loads((old/'model.safetensors.index.json').read_text())['weight_map']
    moved = same = 0
    for file in sorted(new.glob('*.safetensors')):
        with safe_open(file, 'pt') as tuned:
            for name in tuned.keys():
                with safe_open(old/index[name], 'pt') as before:
                    equal = bool((tuned.get_tensor(name) == before.get_tensor(name)).all())
                moved, same = moved + (not equal), same + equal
    return moved, same


def measured(folder, flags):
    "One way of training."
    model, out = folder/'model', folder/'run'
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, '-m', 'alpaca_ft']
    rows = [f'--model={model}', f'--data={model}/rows.jsonl', f'--eval-data={model}/eval.jsonl', '--layer-by-layer',
            *([] if '--preset=article' in flags else ['--seq-len=1024', '--dtype=bf16']), *flags]
    env = os.environ | dict(ALPACA_FT_CACHE=str(folder/'cache'), HF_HUB_OFFLINE='1')
    check = subprocess.run([*command, 'check', *rows, '--memory=16GB'], env=env, capture_output=True, text=True)
    counted = re.search(r'the worst moment takes ([\d.]+) GiB', check.stdout)
    peak = peak_of([*command, 'train', *rows, '--n-samples=0', f'--out={out}'], env)
    metrics = [json.loads(line) for line in (out/'metrics.jsonl').read_text().splitlines()]
    steps = [line for line in metrics if 'loss' in line]
    held_out = [round(line['eval_loss'], 4) for line in metrics if 'eval_loss' in line]
    seconds = []
    tokens = 0
    for line in steps:
        seconds.append(round((line['tokens'] - tokens)/line['tokens_per_second'], 1))
        tokens = line['tokens']
    result = dict(flags=flags, counted_gib=counted and float(counted[1]), peak_mib=round(peak), seconds_a_step=seconds,
                  losses=[round(line['loss'], 4) for line in steps], held_out=held_out)
    if '--method=lora' not in flags:
        result['tensors_moved'], result['tensors_same'] = compared(model, out/'model')
    shutil.rmtree(out)
    return result


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', type=Path)
    p.add_argument('--only', default='', metavar='REGEX')
    p.add_argument('--out', type=Path, default=f'benchmarks/results/{date.today()}-7b.json', metavar='FILE')
    args = p.parse_args()
    if not (args.folder/'model'/'config.json').exists():
        make_model(args.folder/'model')
    results = {}
    for way, flags in WAYS.items():
        if re.search(args.only, way):
            results[way] = measured(args.folder, flags)
            print(way, json.dumps(results[way]), flush=True)
            args.out.write_text(json.dumps(results, indent=1) + '\n')


if __name__ == '__main__':
    main()
