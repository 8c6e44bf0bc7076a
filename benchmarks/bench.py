#!/usr/bin/env python3
"""Measure alpaca_ft against a bare PyTorch loop, TRL and LLaMA-Factory: the same rows, model and step, each in its
own process, in turns.

usage: bench.py [--rounds 3] [--steps 8] [--only NAME ...] [--skip NAME ...] [--data FILE] [--out FILE.json]
Prints one table and writes one JSON (benchmarks/results/DATE-cpu.json). NAME: a contender or a section, see --help.
"""
import argparse, datetime, json, os, platform, statistics, subprocess, sys, tempfile, time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

here = Path(__file__).resolve().parent
root = here.parent
sys.path[:0] = [str(root), str(here)]

CONTENDERS = ('floor', 'floor-cached', 'trl-doc', 'trl-nockpt', 'llama-factory', 'alpaca_ft', 'alpaca_ft-cached')
SECTIONS = dict(shape7b='the 7B-proportioned model', batch32='one step of many rows', losses='the same losses',
                sampling='samples at once and one at a time',
                data='preparing rows', help='alpaca_ft --help',
                launch='launch to first step (from the blocks of the table)')
SHAPE7B = dict(hidden_size=512, intermediate_size=1376, num_hidden_layers=32, num_attention_heads=4,
               num_key_value_heads=4, vocab_size=4012,
               # Llama-2-7B divided by 8; the head is 0.65 of a layer
               max_position_embeddings=4096, tie_word_embeddings=False)
LF_PYTHON = here/'.envs'/'llama-factory'/'bin'/'python'


def say(*args): print(*args, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- what is measured on

def machine():
    "What a reader has to know about the machine, and nothing that tells where it is."
    import torch
    cpu = platform.processor() or platform.machine()
    try:
        cpu = next(l.split(':', 1)[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name'))
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    d = dict(cpu=cpu, cores=cores,
             bf16_in_hardware=bool(getattr(torch.cpu, '_is_avx512_bf16_supported', lambda: False)()),
             memory_gib=round(os.sysconf('SC_PAGE_SIZE')*os.sysconf('SC_PHYS_PAGES')/2**30, 1),
             system=platform.system(), python=platform.python_version())
    if torch.cuda.is_available():
        d |= dict(device=torch.cuda.get_device_name(0),
                  device_memory_gib=round(torch.cuda.get_device_properties(0).total_memory/2**30, 1))
    return d | dict(versions={k: _version(k)
                              for k in ('alpaca_ft', 'torch', 'transformers', 'trl', 'datasets', 'accelerate',
                                        'tokenizers')})


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        if package == 'alpaca_ft':
            import alpaca_ft
            return alpaca_ft.__version__


def peer_versions():
    "Releases in LLaMA-Factory's own environment."
    code = ("import json; from importlib.metadata import version; "
            "print(json.dumps({k: version(k) for k in ('llamafactory', 'torch', 'transformers', 'trl')}))")
    return json.loads(subprocess.run([str(LF_PYTHON), '-c', code], capture_output=True, text=True, check=True).stdout)


# ---------------------------------------------------------------- the work

def untied(model_id, folder):
    "A copy of the model with a head of its own, so that every contender trains the same parameters."
    from alpaca_ft.model import load_model, load_tokenizer, untie
    model = load_model(model_id).cpu()
    untie(model)
    model.save_pretrained(folder)
    load_tokenizer(model_id).save_pretrained(folder)
    return str(folder)


def random_model(config, folder, texts, device='cpu'):
    "A Llama with random bf16 weights and a tokenizer made from the rows."
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.train_from_iterator(texts,
                          trainers.BpeTrainer(vocab_size=config['vocab_size'], special_tokens=['<s>', '</s>', '<pad>'],
                                              show_progress=False,
                                                     initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    PreTrainedTokenizerFast(tokenizer_object=t, bos_token='<s>', eos_token='</s>',
                            pad_token='<pad>').save_pretrained(folder)
    torch.manual_seed(0)
    was = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**config, bos_token_id=0, eos_token_id=1, pad_token_id=2))
    finally:
        torch.set_default_dtype(was)
    model.save_pretrained(folder)
    return str(folder)


def pack_rows(rows, model, seq_len, n, folder):
    """Files of as many rows as fill `n` packed rows, of these packed rows, and of two rows for an evaluation that
    does not take place."""
    from datasets import Dataset
    from alpaca_ft.data import write_jsonl
    from alpaca_ft.model import load_tokenizer
    from alpaca_ft.packing import pack
    from alpaca_ft.prompts import tokenize
    tok = tokenize(Dataset.from_list(rows), load_tokenizer(model))
    lengths = [min(len(x), seq_len) for x in tok['input_ids']]
    times = 1 + n*seq_len//sum(lengths)
    if times > 1:
        say(f'note: {len(rows)} rows fill fewer than {n} packed rows; they are repeated')
    use, total = [], 0
    for i in [*range(len(rows))]*times:
        total += lengths[i]
        if total > n*seq_len*0.995:
            break
        use.append(i)
    while True:
        packed, report = pack(tok.select(use), seq_len)
        if len(packed) <= n:
            break
        use.pop()
    folder.mkdir()
    write_jsonl(folder/'rows.jsonl', (rows[i] for i in use))
    write_jsonl(folder/'eval.jsonl',
                [dict(instruction=f'Count to {n}.', input='', output='One, two, and so on.') for n in (7, 8)])
    write_jsonl(folder/'packed.jsonl', packed)
    return dict(rows=str(folder/'rows.jsonl'), eval_rows=str(folder/'eval.jsonl'), packed=str(folder/'packed.jsonl'),
                n_packed=len(packed), fill=report['fill'])


class Work:
    "A model, and rows packed for it: what a block of steps is asked to do."
    def __init__(self, args, folder, name, model, n_layers, n_freeze, rows):
        self.args, self.folder, self.name, self.model = args, folder, name, model
        self.n_layers, self.n_freeze, self.rows, self.packed = n_layers, n_freeze, rows, {}

    def spec(self, who, n, skip, steps, batch_size=1, dtype='bfloat16'):
        """`n` packed rows, `steps` measured after `skip`; a cached contender first goes once through all rows, if it
        is to be timed."""
        if n not in self.packed:
            self.packed[n] = pack_rows(self.rows, self.model, self.args.seq_len, n, self.folder/f'{self.name}-{n}')
        p = self.packed[n]
        if who.endswith('-cached') and skip:
            skip += p['n_packed']//batch_size
        return p | dict(model=self.model, n_layers=self.n_layers, n_freeze=self.n_freeze, seq_len=self.args.seq_len,
                        batch_size=batch_size, lr=2e-4, seed=42,
                        dtype=dtype, skip=skip, steps=steps, planned=skip + steps)


# ---------------------------------------------------------------- blocks of steps

class Bench:
    "Runs blocks, remembers what failed, and keeps the JSON up to date."
    def __init__(self, args, folder):
        self.args, self.folder, self.count, self.failed = args, folder, 0, {}
        self.result = dict(date=datetime.date.today().isoformat(), machine=machine(), settings={}, contenders=[],
                           lines=[], sections={}, not_measured={})

    def run(self, script, *argv, python=sys.executable):
        "A process of ours: (exit code, seconds, its output's last line)."
        env = os.environ | dict(HF_HUB_OFFLINE='1', HF_DATASETS_CACHE=str(self.folder/'datasets'), WANDB_MODE='offline',
                                DISABLE_VERSION_CHECK='1')
        ours = os.pathsep.join(filter(None, [str(root), os.environ.get('PYTHONPATH')]))
        env['PYTHONPATH'] = ours if python == sys.executable else ''
        env['BENCH_T0'] = str(t := time.monotonic())
        with open(self.folder/'output', 'w+', encoding='utf-8', errors='replace') as f:
            code = subprocess.run([str(python), str(here/script), *map(str, argv)], stdout=f, stderr=subprocess.STDOUT,
                                  env=env, cwd=self.folder).returncode
            f.seek(0)
            text = f.read().strip()
        if code and os.environ.get('BENCH_VERBOSE'):
            say(text[-4000:])
        last = text.splitlines()[-1] if text else ''
        for path in (self.folder, root, Path.home()):
            last = last.replace(str(path), '...')  # the JSON tells nothing of where it was made
        return code, time.monotonic() - t, last[:300]

    def block(self, work, who, *args, **kw):
        "A block of steps of one contender: the lines of its log, or None with the reason noted."
        self.count += 1
        spec, log = self.folder/f'{self.count}.json', self.folder/f'{self.count}.jsonl'
        s = work.spec(who, *args, **kw)
        spec.write_text(json.dumps(s | dict(out=str(self.folder/f'out-{self.count}'))))
        code, seconds, last = self.run('contenders.py', who, spec, log,
                                       python=LF_PYTHON if who == 'llama-factory' else sys.executable)
        lines = [json.loads(l) for l in open(log)] if log.exists() else []
        if code or len(lines) < s['skip'] + s['steps']:
            self.failed[f'{work.name}:{who}'] = f'exit code {code} after {len(lines)} steps: {last}'
            say(f'  {who} FAILED: {self.failed[f"{work.name}:{who}"]}')
            return None
        m = [l for l in lines if l['measured']]
        say(f"  {who:18} {len(m)} steps, {statistics.median(l['tokens']/l['seconds'] for l in m):8.1f} tokens/s, "
            f"peak {max(l['step_peak'] for l in m):7.0f} MiB, "
            f"{seconds:5.0f} s in all, others {statistics.median(l['others'] or 0 for l in m):.2f} cores")
        return lines

    def write(self):
        "The JSON so far, complete or as it was."
        out = Path(self.args.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        part = out.with_name(out.name + '.part')
        part.write_text(json.dumps(self.result, indent=1) + '\n')
        os.replace(part, out)


def absent(who):
    "Why a contender cannot run here, or None."
    import importlib.util
    if who == 'llama-factory' and not (LF_PYTHON.parents[1]/'done').exists():
        return 'no environment; make it with benchmarks/make_envs.sh'
    if who == 'alpaca_ft-cached' and importlib.util.find_spec('alpaca_ft.prefix') is None:
        return 'this version has no alpaca_ft/prefix.py'


# ---------------------------------------------------------------- numbers

def spread(xs):
    "Median and quartiles."
    xs = sorted(xs)
    q = statistics.quantiles(xs, n=4, method='inclusive') if len(xs) > 1 else [xs[0]]*3
    return dict(median=q[1], q25=q[0], q75=q[2], n=len(xs))


def speeds(lines): return [l['tokens']/l['seconds'] for l in lines if l['measured']]


def ratio(a, b, value=speeds):
    """Of two contenders: ratio of the medians over all rounds, and the least and greatest of a round. `a` and `b`:
    rounds of lines."""
    def med(rounds): return statistics.median(x for r in rounds for x in value(r))
    each = [med([x])/med([y]) for x, y in zip(a, b)]
    return dict(value=med(a)/med(b), low=min(each), high=max(each), rounds=len(each))


def aggregate(name, who, rounds, base):
    "One row of the table."
    m = [l for r in rounds for l in r if l['measured']]
    others = [l['others'] for l in m if l['others'] is not None]
    d = dict(workload=name, who=who, steps=len(m), tokens_per_second=spread(l['tokens']/l['seconds'] for l in m),
             seconds=spread(l['seconds'] for l in m),
             ratio_to_floor=ratio(rounds, base) if base else None, peak_mib=max(l['step_peak'] for l in m),
             process_peak_mib=max(l['process_peak'] for l in m),
             first_step_seconds=[r[0]['t'] for r in rounds],
             others=dict(median=statistics.median(others), max=max(others)) if others else None, rounds=rounds)
    if 'cuda_peak' in m[0]:
        d['cuda_peak_mib'] = max(l['cuda_peak'] for l in m)
    return d


def table(rows):
    "The table as text."
    cuda = any('cuda_peak_mib' in r for r in rows)
    head = ['model', 'who', 'steps', 'tokens/s', '25-75 %', 'x floor', 'by round', 's/step', 'peak MiB', 'process',
            *(['GPU peak'] if cuda else []), 'first step', 'others']
    out = [head]
    for r in rows:
        t, x = r['tokens_per_second'], r['ratio_to_floor']
        out.append([r['workload'], r['who'], str(r['steps']), f"{t['median']:.1f}", f"{t['q25']:.1f}-{t['q75']:.1f}",
                    f"{x['value']:.2f}" if x else '-',
                    f"{x['low']:.2f}-{x['high']:.2f}" if x else '-', f"{r['seconds']['median']:.3g}",
                    f"{r['peak_mib']:.0f}", f"{r['process_peak_mib']:.0f}",
                    *([f"{r['cuda_peak_mib']:.0f}"] if cuda else []),
                    f"{statistics.median(warm(r['first_step_seconds'])):.1f} s",
                    f"{r['others']['median']:.2f}" if r['others'] else '-'])
    width = [max(len(r[i]) for r in out) for i in range(len(head))]
    return '\n'.join('  '.join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(r, width))).rstrip()
                     for r in out)


def warm(xs): return xs[1:] or xs  # the first round fills caches


def show(line):
    "One of the lines below the table."
    def number(x): return f'{x:,.0f}' if x >= 1000 else f'{x:.3g}'
    v = number(line['value']) + line.get('unit', '')
    return f"{line['line']:82} {v:>13}" + (f"   ({number(line['low'])}-{number(line['high'])})"
                                           if 'low' in line else '') + (f"   {line['note']}" if 'note' in line else '')


def main_lines(done):
    "The ratios between contenders that were measured: `done` is {(workload, who): rounds}."
    out = []
    def add(text, a, b, value=speeds):
        if a in done and b in done and not (value is device and 'cuda_peak' not in done[a][0][0]):
            out.append(dict(line=text, unit='x', **ratio(done[a], done[b], value)))
    def peak(r): return [max(l['step_peak'] for l in r if l['measured'])]
    def whole(r): return [max(l['process_peak'] for l in r)]
    def device(r): return [max(l.get('cuda_peak', 0) for l in r if l['measured'])]
    def first(r): return [r[0]['t']]
    def d(who): return ('demo', who)
    for who, text in (('alpaca_ft', 'first epoch, tokens/s'), ('alpaca_ft-cached', 'cached epochs, tokens/s')):
        for peer, name in (('trl-doc', 'TRL as documented'), ('trl-nockpt', 'TRL without checkpointing'),
                           ('llama-factory', 'LLaMA-Factory neat_packing'), ('floor', 'the bare loop')):
            add(f'{text}, against {name}', d(who), d(peer))
    add('cached epochs, tokens/s, against the bare loop on cached outputs', d('alpaca_ft-cached'), d('floor-cached'))
    for w in ('shape7b', 'gpu'):
        for who in ('alpaca_ft', 'alpaca_ft-cached'):
            for peer in ('floor', 'trl-doc', 'trl-nockpt'):
                add(f'{w}, tokens/s, {who} against {"the bare loop" if peer == "floor" else peer}', (w, who), (w, peer))
    for who in ('alpaca_ft', 'alpaca_ft-cached'):
        add(f'gpu, peak device memory, {who} against the bare loop', ('gpu', who), ('gpu', 'floor'), device)
    for who in ('alpaca_ft', 'alpaca_ft-cached'):
        add(f'peak memory while training, {who} against the bare loop', d(who), d('floor'), peak)
        add(f'peak memory of the process until then, {who} against the bare loop', d(who), d('floor'), whole)
    for peer in ('trl-doc', 'trl-nockpt'):
        a, b = done.get(d('alpaca_ft')), done.get(d(peer))
        if a and b:
            out.append(dict(line=f'launch to the end of the first step, alpaca_ft against {peer}', unit='x',
                            **ratio(warm(a), warm(b), first)))
    return out


# ---------------------------------------------------------------- sections

def batch32(b, work):
    "An optimizer step of 32 rows against 32 steps of one row: the very same rows. The bare loop's peak beside it."
    n = b.args.batch
    # the same rows, half of them as warm-up
    one, many = [b.block(work, 'alpaca_ft', n, n, n)], [b.block(work, 'alpaca_ft', n, 1, 1, batch_size=n)]
    bare_one, bare_many = [b.block(work, 'floor', n, n, n)], [b.block(work, 'floor', n, 1, 1, batch_size=n)]
    if None in one + many + bare_one + bare_many:
        return []
    def peak(r): return [max(l['step_peak'] for l in r if l['measured'])]
    def seconds(r): return [l['seconds'] for l in r if l['measured']]
    k = ratio(many, one, seconds)
    b.result['sections']['batch32'] = dict(one=one, many=many, bare_one=bare_one, bare_many=bare_many)
    return [dict(line=f'a step of {n} rows against steps of one row, peak memory', unit='x', **ratio(many, one, peak)),
            dict(line='the same in the bare loop', unit='x', **ratio(bare_many, bare_one, peak)),
            dict(line=f'a step of {n} rows against {n} steps of one row, seconds', unit='x', value=k['value']/n,
                 low=k['low']/n, high=k['high']/n, rounds=k['rounds'])]


def losses(b, work):
    "Twenty steps with the losses of the bare loop, in bf16 and in fp32."
    out, n = [], b.args.loss_steps
    for dtype in ('bfloat16', 'float32'):
        got = {w: b.block(work, w, n, 0, n, dtype=dtype) for w in ('floor', 'alpaca_ft', 'alpaca_ft-cached')
               if not absent(w)}
        got = {w: [l['loss'] for l in ls] for w, ls in got.items() if ls}
        b.result['sections'].setdefault('losses', {})[dtype] = got
        for x, y in (('alpaca_ft', 'floor'), ('alpaca_ft-cached', 'alpaca_ft'), ('alpaca_ft-cached', 'floor')):
            if x in got and y in got:
                d = [abs(p - q) for p, q in zip(got[x], got[y])]
                out.append(dict(line=f'losses of {n} steps in {dtype}, largest difference, {x} and {y}', value=max(d),
                                note=f'(loss {got[y][0]:.3f} to {got[y][-1]:.3f})'))
    return out


def other(b, what, *argv):
    "A part of `sections.py` in its own process: its JSON, or None with the reason noted."
    b.count += 1
    out = b.folder/f'{b.count}.json'
    code, _, last = b.run('sections.py', what, out, *argv)
    if code:
        b.failed[what] = f'exit code {code}: {last}'
        say(f'  {what} FAILED: {b.failed[what]}')
        return None
    d = json.loads(out.read_text())
    say(f'  {what}: ' + ', '.join(f'{k} {v:.4g}' if isinstance(v, float) else f'{k} {v}' for k, v in d.items()))
    return d


def sampling(b, work):
    "Ten samples of 128 tokens in one batch against one at a time, greedy, in fp32."
    d = other(b, 'sampling', work.model, work.spec('floor', max(2, b.args.warmup + b.args.steps), 0, 1)['rows'],
              b.args.samples, b.args.new_tokens)
    if not d:
        return []
    b.result['sections']['sampling'] = d
    return [dict(line=f"{d['prompts']} samples of {d['new_tokens']} tokens, one at a time against at once, seconds",
                 unit='x', value=d['ratio'], note=f"({d['same']} of {d['prompts']} texts equal)")]


def data(b, work):
    "Rows read, formatted, tokenised and packed, against TRL's own path."
    from alpaca_ft.data import write_jsonl
    n, path, got = b.args.data_rows, b.folder/'many.jsonl', {}
    write_jsonl(path,
                (r | dict(instruction=f"{r['instruction']} ({i})") for i in range(n)
                 for r in [work.rows[i % len(work.rows)]]))
    for _ in range(min(2, b.args.rounds)):
        for who in ('alpaca_ft', 'trl-prompt-completion', 'trl-text'):
            if d := other(b, f'data-{who}', work.model, path, b.args.seq_len):
                got.setdefault(who, []).append(d)
    b.result['sections']['data'] = got
    def rate(ds): return [d['rows_per_second'] for d in ds]
    out = [dict(line=f'{n:,} rows prepared, {who}', unit=' rows/s', value=statistics.median(rate(ds)),
                low=min(rate(ds)), high=max(rate(ds))) for who, ds in got.items()]
    return out + [dict(line=f'{n:,} rows prepared, rows/s, alpaca_ft against {who}', unit='x',
                       **ratio([[d] for d in got['alpaca_ft']], [[d] for d in ds], rate))
                  for who, ds in got.items() if who != 'alpaca_ft' and 'alpaca_ft' in got]


def help_(b, work):
    "How long a person waits for the help text."
    seconds = []
    for _ in range(5):
        t = time.monotonic()
        subprocess.run([sys.executable, '-c', "import sys; from alpaca_ft.cli import main; sys.exit(main(['--help']))"],
                       stdout=subprocess.DEVNULL, check=True,
                       env=os.environ | dict(PYTHONPATH=str(root)))
        seconds.append(time.monotonic() - t)
    b.result['sections']['help'] = seconds
    return [dict(line='alpaca_ft --help', unit=' s', value=statistics.median(seconds), low=min(seconds),
                 high=max(seconds))]


# ---------------------------------------------------------------- the whole run

def parse(argv):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                epilog='contenders: ' + ', '.join(CONTENDERS) + '. sections: '
                                + '; '.join(f'{k}: {v}' for k, v in SECTIONS.items()))
    p.add_argument('--rounds', type=int, default=3, help='blocks of each contender, in turns [3]')
    p.add_argument('--steps', type=int, default=8, help='measured steps of a block [8]')
    p.add_argument('--warmup', type=int, default=2, help='steps of a block that are not measured [2]')
    p.add_argument('--only', nargs='+', metavar='NAME', choices=[*CONTENDERS, *SECTIONS], help='nothing but these')
    p.add_argument('--skip', nargs='+', metavar='NAME', choices=[*CONTENDERS, *SECTIONS], default=[],
                   help='all but these')
    p.add_argument('--data', default='builtin', help='rows, as alpaca_ft train takes them [builtin]')
    p.add_argument('--model', default='demo', help='model folder; its layers must be called as those of a Llama [demo]')
    p.add_argument('--n-freeze', type=int, default=24, help='frozen layers [24]')
    p.add_argument('--seq-len', type=int, default=1024, help='tokens of a packed row [1024]')
    p.add_argument('--batch', type=int, default=32, help='rows in the step of section batch32 [32]')
    p.add_argument('--loss-steps', type=int, default=20, help='steps of section losses [20]')
    p.add_argument('--samples', type=int, default=10, help='prompts of section sampling [10]')
    p.add_argument('--new-tokens', type=int, default=128, help='tokens of its answers [128]')
    p.add_argument('--data-rows', type=int, default=50_000, help='rows of section data [50000]')
    p.add_argument('--out', help='the JSON [benchmarks/results/DATE-cpu.json]')
    args = p.parse_args(argv)
    args.out = args.out or here/'results'/f'{datetime.date.today().isoformat()}-cpu.json'
    args.chosen = [x for x in [*CONTENDERS, *SECTIONS] if (args.only is None or x in args.only) and x not in args.skip]
    return args


def rounds(b, works, budget=None):
    """All contenders of all workloads in turns, round after round; `works`: [(Work, contenders)]. Stops in time
    where there is a budget in seconds."""
    done, t0, longest = {}, time.monotonic(), {}
    for work, who in works:
        for w in list(who):
            if why := absent(w):
                b.result['not_measured'][f'{work.name}:{w}'] = why
                say(f'{work.name}:{w} left out: {why}')
                who.remove(w)
    for r in range(b.args.rounds):
        for work, who in works:
            say(f'round {r+1} of {b.args.rounds}, {work.name}')
            for w in who:
                key = work.name, w
                if f'{work.name}:{w}' in b.failed:
                    continue
                if budget and time.monotonic() - t0 + longest.get(key, 0) > budget:
                    say(f'  {w} left out: {budget:.0f} s are over')
                    if key not in done:
                        b.result['not_measured'][f'{work.name}:{w}'] = f'{budget:.0f} s were over'
                    continue
                t = time.monotonic()
                if lines := b.block(work, w, b.args.warmup + b.args.steps, b.args.warmup, b.args.steps):
                    done.setdefault(key, []).append(lines)
                longest[key] = time.monotonic() - t
        b.result['contenders'] = [aggregate(*k, v, done.get((k[0], 'floor'))) for k, v in done.items()]
        b.write()
    return done


def main(argv=None):
    args = parse(argv)
    os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
    os.environ.setdefault('HF_DATASETS_DISABLE_PROGRESS_BARS', '1')
    from transformers import AutoConfig
    from alpaca_ft.data import load_alpaca
    from alpaca_ft.prompts import create_prompt
    from alpaca_ft.run import quiet
    quiet()
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        b = Bench(args, folder)
        rows = load_alpaca(args.data)['train'].to_list()
        b.result['settings'] = {k: getattr(args, k)
                                for k in ('rounds', 'steps', 'warmup', 'n_freeze', 'seq_len', 'batch', 'loss_steps',
                                          'samples', 'new_tokens', 'data_rows')} | dict(
            data='builtin' if args.data == 'builtin' else Path(args.data).name, rows=len(rows),
                                              model=Path(args.model).name, chosen=args.chosen)
        model = untied(args.model, folder/'model')
        demo = Work(args, folder, 'demo', model, AutoConfig.from_pretrained(model).num_hidden_layers, args.n_freeze,
                    rows)
        works = [(demo, [x for x in args.chosen if x in CONTENDERS])]
        if 'shape7b' in args.chosen:
            shape = random_model(SHAPE7B, folder/'shape7b', map(create_prompt, rows))
            works.append((Work(args, folder, 'shape7b', shape, 32, 24, rows),
                          ['floor', 'floor-cached', 'alpaca_ft', 'alpaca_ft-cached']))
        if 'llama-factory' in args.chosen and not absent('llama-factory'):
            b.result['machine']['llama_factory_versions'] = peer_versions()
        done = rounds(b, [w for w in works if w[1]])
        b.result['lines'] = [l for l in main_lines(done) if 'launch' in args.chosen
                             or not l['line'].startswith('launch')]
        for name, section in dict(batch32=batch32, losses=losses, sampling=sampling, data=data, help=help_).items():
            if name not in args.chosen:
                continue
            say(SECTIONS[name])
            b.result['lines'] += section(b, demo)
            b.write()
        b.result['not_measured'] |= b.failed
        b.write()
    finish(b)
    return 1 if b.failed else 0


def finish(b):
    "Print the table and its lines."
    if rows := b.result['contenders']:
        print(table(rows))
        busy = max((r['others']['median'] for r in rows if r['others']), default=0)
        if busy > 0.1:
            print(f'\nThis was no quiet machine: others kept up to {busy:.2f} cores busy (median of a contender). '
                  'The figures are not to be quoted.')
    if b.result['lines']:
        print('\n' + '\n'.join(map(show, b.result['lines'])))
    for k, why in b.result['not_measured'].items():
        print(f'not measured: {k}: {why}')
    print(f'\nwritten: {os.path.relpath(b.args.out)}')


if __name__ == '__main__':
    sys.exit(main())
