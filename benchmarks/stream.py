"""A file that is larger than what a run may hold: memory and speed while it streams, and a kill in its middle.

usage: python benchmarks/stream.py [--folder FOLDER] [--gb 5] [--processes 1] [--kill 0.5] [--minutes 60]
                                   [--out FILE]

Rows of some 3.6 KB of random words are written to FOLDER/rows.jsonl, once. Then `alpaca_ft train --stream` reads the
file to its end with a model of one tiny layer whose head alone trains, so that reading, checking, tokenizing and
packing are what is measured. Every two seconds the kernel is asked for the resident memory of each process, and the
log for how far the file was read. With --kill all processes get SIGKILL at that part of the file, and the run is
resumed; the steps between the last checkpoint and the kill were then computed twice, and have to have the same
losses. A result is added to those that FILE has; `python tools/draw.py` draws them. Linux only.
"""
import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

SEQ_LEN, BATCH = 2048, 16
SYLLABLES = [a + b + c for a in 'bdfgkl' for b in 'aeiou' for c in 'nr']


def made_rows(seed):
    "Rows without an end."
    draw = random.Random(seed)
    words = [''.join(draw.choices(SYLLABLES, k=8)) for _ in range(300)]
    while True:
        given = draw.choices(words, k=draw.randint(50, 240))
        yield dict(instruction='Repeat the last words.', input=' '.join(given), output=' '.join(given[-5:]))


def make_file(path, size):
    "A file of JSON lines of so many bytes; how many rows it has."
    about = path.with_suffix('.json')
    if about.exists() and json.loads(about.read_text())['size'] == size:
        return json.loads(about.read_text())['rows']
    n = 0
    with open(path, 'w') as f:
        for row in made_rows(0):
            f.write(json.dumps(row) + '\n')
            n += 1
            if n % 1000 == 0 and f.tell() >= size:
                break
    about.write_text(json.dumps(dict(size=size, rows=n)))
    return n


def make_model(folder):
    "One tiny layer, and a tokenizer that has each word as one token."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from alpaca_ft import create_prompt
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [create_prompt(row) for row, _ in zip(made_rows(0), range(500))]
    t.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=6000, special_tokens=['</s>'], show_progress=False,
                                                     initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=t, eos_token='</s>', pad_token='</s>')
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                 num_attention_heads=1, max_position_embeddings=SEQ_LEN, eos_token_id=0,
                                 pad_token_id=0)).save_pretrained(folder)


def steps_of(path, model, n_rows):
    "The steps that lead nearly to the end of the file, from how its first window is packed."
    from alpaca_ft import RunConfig, load_tokenizer
    from alpaca_ft.stream import START, PackedStream, open_stream
    cfg = RunConfig(data=str(path), stream=True, seq_len=SEQ_LEN, batch_size=BATCH)
    stream = PackedStream(open_stream(cfg), load_tokenizer(str(model)), cfg)
    window = stream.packed(START)
    return int(.998*(n_rows - 1000)*len(window.rows)/window.counts['examples']/BATCH)


def resident(pid):
    "MiB that are resident, or None where the process has ended."
    try:
        text = Path(f'/proc/{pid}/status').read_text()
    except OSError:
        return None
    found = re.search(r'VmRSS:\s+(\d+)', text)
    return int(found[1])/1024 if found else None


def trainers_of(pid):
    "The processes that train: the command itself, or those that the launcher has started."
    children = Path(f'/proc/{pid}/task/{pid}/children')
    try:
        return [int(word) for word in children.read_text().split()] or [pid]
    except OSError:
        return []


def last_line(log):
    "The last whole line of a log, or {}."
    if not log.exists():
        return {}
    with open(log, 'rb') as f:
        f.seek(max(0, log.stat().st_size - 4000))
        lines = f.read().split(b'\n')[:-1]
    return json.loads(lines[-1]) if lines else {}


def words_of(args, steps, out):
    "The command line of the run."
    launch = ['-m', 'alpaca_ft']
    if args.processes > 1:
        launch = ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={args.processes}', *launch]
    return [sys.executable, *launch, 'train', '--stream', f'--model={args.folder}/tiny',
            f'--data={args.folder}/rows.jsonl', '--n-freeze=1', '--loss-on=response', f'--seq-len={SEQ_LEN}',
            f'--batch-size={BATCH}', f'--micro-batch-size={BATCH//args.processes}', f'--max-steps={steps}',
            f'--eval-every={steps}', f'--save-every={steps//20}', '--n-samples=0', '--dtype=fp32', f'--out={out}']


def watch(words, out, points, begin, until, stop_at=2.):
    "Run a command and add [seconds, part of the file, MiB of each process]; True where it has ended by itself."
    log = open(f'{out}.log', 'a')
    child = subprocess.Popen(words, stdout=log, stderr=log, env=os.environ | dict(
        OMP_NUM_THREADS='1', ALPACA_FT_CACHE=f'{out}-cache'))
    while child.poll() is None:
        memory = [resident(pid) for pid in trainers_of(child.pid)]
        part = last_line(Path(out)/'metrics.jsonl').get('epoch', 0)
        points.append([round(time.time() - begin, 1), part, *(round(mib) for mib in memory if mib)])
        if part >= stop_at or time.time() > until:
            for pid in (child.pid, *trainers_of(child.pid)):  # those of a launcher are in groups of their own
                os.kill(pid, signal.SIGKILL)
            child.wait()
            return False
        time.sleep(2)
    if child.returncode:
        raise RuntimeError(Path(f'{out}.log').read_text()[-2000:])
    return True


def losses(out):
    "Step: loss, of a log."
    lines = [json.loads(line) for line in (Path(out)/'metrics.jsonl').read_text().splitlines()]
    return {line['step']: line['loss'] for line in lines if 'loss' in line}


def measure(args, n_rows, steps):
    "One run over the file, killed and resumed where that is asked for."
    out = f'{args.folder}/run-{args.processes}'
    shutil.rmtree(out, ignore_errors=True)
    Path(f'{out}.log').unlink(missing_ok=True)
    words, points, begin = words_of(args, steps, out), [], time.time()
    until = begin + 60*args.minutes
    found = dict(processes=args.processes, rows=n_rows, bytes=Path(f'{args.folder}/rows.jsonl').stat().st_size,
                 steps=steps, points=points, loads=[os.getloadavg()[0]])
    ended = watch(words, out, points, begin, until, args.kill or 2.)
    if not ended and args.kill and time.time() < until:
        before, killed_at = losses(out), time.time()
        ended = watch([*words, '--resume'], out, points, begin, until)
        after = losses(out)
        at, was = killed_at - begin, next(p[1] for p in reversed(points) if p[0] <= killed_at - begin)
        back = next((p[0] for p in points if p[0] > at and p[1] < was), None)  # the log is cut: the first step comes
        again = [step for step in sorted(before) if step > max(before)//(steps//20)*(steps//20)]
        found['kill'] = dict(seconds=round(killed_at - begin, 1), after_step=max(before), steps_again=len(again),
                             same=all(before[step] == after[step] for step in again),
                             seconds_to_go_on=back and round(back - at, 1))
    found['loads'].append(os.getloadavg()[0])
    found['points'] = thinned(points)
    found.update(ended=ended, read=points[-1][1] if not ended else last_line(Path(out)/'metrics.jsonl')['epoch'],
                 seconds=round(time.time() - begin, 1))
    return found


def thinned(points, most=200):
    "Not more points than a picture needs."
    return points[::max(1, len(points)//most)]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--folder', default='build/stream', help='for the file, the model and the runs [build/stream]')
    p.add_argument('--gb', type=float, default=5, help='size of the file [5]')
    p.add_argument('--processes', type=int, default=1, help='that train together [1]')
    p.add_argument('--kill', type=float, default=0, metavar='PART', help='of the file, at which all are killed [never]')
    p.add_argument('--minutes', type=float, default=60, help='after which the run is ended where it stands [60]')
    p.add_argument('--out', default=f'benchmarks/results/{date.today()}-stream.json', metavar='FILE')
    args = p.parse_args()
    known = json.loads(Path(args.out).read_text())['runs'] if Path(args.out).exists() else []
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    n_rows = make_file(folder/'rows.jsonl', int(args.gb*1e9))
    if not (folder/'tiny').exists():
        make_model(folder/'tiny')
    found = measure(args, n_rows, steps_of(folder/'rows.jsonl', folder/'tiny', n_rows))
    others = [run for run in known if run['processes'] != args.processes]
    runs = sorted([*others, found], key=lambda run: run['processes'])
    about = dict(unit='[seconds, part of the file, MiB of each process]', cpus=os.cpu_count(), runs=runs)
    Path(args.out).write_text(json.dumps(about))
    print({k: v for k, v in found.items() if k != 'points'})


if __name__ == '__main__':
    main()
