"""Which way to tune? Every choice of what trains, at equal seconds and at equal memory, its learning rate swept.

What the libraries lack: each measures its own method, at settings that were chosen for it. Here a choice (an arm) gets
as many steps as fit into the same seconds, at the best of its own learning rates, and is measured on rows that neither
the training nor the choice of the rate has seen.

usage: methods.py --out RESULT.json [--rows demo FILE ...] [--minutes 60]   (stopped, it goes on by the same command)
       methods.py --out RESULT.json --show                                  (the tables of what is there)

1. Time: seconds a step, seconds a row through the frozen layers, and peak memory of each arm, on a quiet machine.
2. Sweep: each arm at three rates or more, a third of the seconds, one seed, by the loss of validation rows; then the
   best of them and lower ones with all of the seconds (three epochs at most), because a longer run wants a lower rate.
3. Seeds: the best rate with all of the seconds, three seeds, measured on test rows.
4. Memory: arms that need more than the default get recomputed activations.
5. Time to quality: this package's arms that came first, at parts of the seconds, three seeds; it waits for all of them.
   Short runs want a higher rate, so it is the best one of the sweep, whose runs are as short.
The jobs after the timing share the kept states of a folder: what they would cost is in the seconds by the timing.
Seconds and memory are those of the machine that timed; the losses may come from a faster one, a GPU for instance: there
the same command goes on with the file of the other machine, as many steps as had fit into the seconds there.
"""
import argparse
import json
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import BoundedSemaphore, Lock

here = Path(__file__).resolve().parent
SOUP = here/'.envs'/'soup'/'bin'/'python'
SEQ_LEN = 1024
N_ROWS = dict(train=100, validation=40, test=100)  # of a file; of fewer rows the test part gets what is left
DEMO_TRAIN = 300  # of the demo's rows, which are shorter: as many tokens
RATES = dict(freeze=(5e-5, 1.5e-4, 5e-4), lora=(3e-4, 1e-3, 3e-3), full=(2e-5, 6e-5, 2e-4))
STEP = 3.  # between neighbouring rates; a best rate at the edge is followed by one more
PART_OF_SWEEP = 1/3  # of the seconds
PARTS = (1/3, 1/2, 1/4)  # of the seconds, for the time to quality
EPOCHS = 3  # at most, however many would fit into the seconds
PEER = 'TRL, LoRA on all layers'  # its epoch sets the seconds, its loss the quality
DEFAULT = 'last 6 and head'  # its peak memory is the limit of the second table

# what an arm gives to `alpaca_ft train`; `kept`: the output of the layers below is kept
ARMS = {
    DEFAULT: dict(kept='memory', kind='freeze', options=dict(n_freeze=24)),
    'last 6 and head, loss on all': dict(kept='memory', kind='freeze', options=dict(n_freeze=24, loss_on='all')),
    'last 6 and head, bf16 weights': dict(kept='memory', kind='freeze', options=dict(n_freeze=24, train_dtype='bf16')),
    'last 6': dict(kept='memory', kind='freeze', options=dict(n_freeze=24, train_head=False)),
    'middle 6': dict(kept='memory', kind='freeze', options=dict(layers='12-17', train_head=False)),
    'Spectrum, a quarter': dict(kept=None, kind='freeze', options=dict(layers='spectrum:0.25', train_head=False)),
    'LoRA on the last 6': dict(kept='memory', kind='lora', options=dict(method='lora')),
    'LoRA on the last 15': dict(kept='memory', kind='lora', options=dict(method='lora', n_freeze=15)),
    'LISA, 2 of 30 and head': dict(kept=None, kind='freeze', options=dict(n_freeze=0, rotate=2)),
    'LoRA on all layers': dict(kept=None, kind='lora', options=dict(method='lora', n_freeze=0)),
    'full': dict(kept=None, kind='full', options=dict(method='full')),
    PEER: dict(kind='lora', peer='trl'),
    'Soup, freeze_layers': dict(kind='freeze', peer='soup', method='freeze_layers'),
    'Soup, LISA': dict(kind='freeze', peer='soup', method='lisa'),
    'Soup, Spectrum': dict(kind='freeze', peer='soup', method='spectrum'),
}


def say(*words):
    "A line for whoever waits."
    print(time.strftime('%H:%M'), *words, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- one job, in a process of its own

def watcher():
    "A callback of a transformers trainer that keeps the seconds of each step and the peak of memory."
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        "Nothing is evaluated meanwhile."

        def __init__(self):
            self.seconds, self.begin, self.peak = [], None, 0

        def on_train_begin(self, args, state, control, **kw):
            args.eval_on_start = False

        def on_step_begin(self, args, state, control, **kw):
            self.begin = time.perf_counter()

        def on_step_end(self, args, state, control, **kw):
            self.seconds.append(time.perf_counter() - self.begin)
            self.peak = peak_mib()
            control.should_evaluate = False

    return Watch()


def peak_mib():
    "The most memory that this process has had, in MiB."
    from probe import memory
    return memory('VmHWM')


def train_ours(spec, folder):
    "A run of this package without evaluations and samples; the model is in folder/run/model."
    from alpaca_ft import prefix, run
    from alpaca_ft.options import RunConfig
    watch, fill, inner = watcher(), [0.], run.keep_states

    def keep_states(r):
        "Time the pass through the frozen layers."
        begin = time.perf_counter()
        inner(r)
        fill[0] = time.perf_counter() - begin

    run.keep_states = keep_states
    options = dict(loss_on='response', activation_checkpointing=spec['recompute']) | spec['options']
    cfg = RunConfig(data=str(folder/'train.json'), eval_data=str(folder/'validation.json'), out=str(folder/'run'),
                    max_steps=spec['steps'], lr=spec['lr'], seed=spec['seed'], dtype=spec['dtype'], seq_len=SEQ_LEN,
                    n_samples=0, eval_every=10**6, prefix_cache=spec['kept'] or 'off', **options)
    done = run.train(cfg, [watch])
    fill = fill[0]/(len(done.train) + len(done.test))
    return dict(seconds=watch.seconds, peak=watch.peak, fill=fill, packed=len(done.train),
                trains=done.report['trains'], trainable=done.report['trainable'])


def train_trl(spec, folder):
    "TRL's SFTTrainer with peft as its documentation has it: prompt and completion, packing, LoRA on all linear layers."
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer
    from alpaca_ft.model import model_folder
    from contenders import prompt
    name = str(model_folder('demo'))
    tokenizer = AutoTokenizer.from_pretrained(name)
    rows = []
    for row in json.loads((folder/'train.json').read_text()):
        given = prompt(row | dict(output=''))
        rows.append(dict(prompt=given, completion=row['output']))
    args = SFTConfig(output_dir=str(folder/'trl'), packing=True, max_length=SEQ_LEN, per_device_train_batch_size=1,
                     max_steps=spec['steps'], learning_rate=spec['lr'], bf16=spec['dtype'] == 'bf16', report_to=[],
                     lr_scheduler_type='cosine', warmup_steps=round(spec['steps']*.1), seed=spec['seed'],
                     save_strategy='no', disable_tqdm=True, eos_token=tokenizer.eos_token,
                     use_cpu=not torch.cuda.is_available())
    lora = LoraConfig(r=16, lora_alpha=32, target_modules='all-linear', task_type='CAUSAL_LM')
    watch = watcher()
    model = AutoModelForCausalLM.from_pretrained(name, dtype='auto')
    trainer = SFTTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                         peft_config=lora, callbacks=[watch])
    packed = len(trainer.train_dataset)
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    trainer.train()
    merged = trainer.model.merge_and_unload()
    merged.save_pretrained(folder/'run'/'model')
    tokenizer.save_pretrained(folder/'run'/'model')
    return dict(seconds=watch.seconds, peak=watch.peak, fill=0., packed=packed, trains='LoRA of rank 16 on all layers',
                trainable=trainable)


def train_soup(spec, folder):
    "Soup in its own environment, see soup_arm.py."
    from alpaca_ft.model import load_tokenizer, model_folder
    from alpaca_ft.prompts import alpaca_chat_template
    end = '{{ m.content + eos_token }}'
    template = alpaca_chat_template(load_tokenizer())
    assert end in template
    template = template.replace(end, '{% generation %}' + end + '{% endgeneration %}')  # so that it finds the responses
    about = dict(model=str(model_folder('demo')), rows=str(folder/'train.json'), out=str(folder/'run'), lr=spec['lr'],
                 method=spec['method'], max_steps=spec['steps'], seq_len=SEQ_LEN, seed=spec['seed'], template=template)
    (folder/'soup.json').write_text(json.dumps(about))
    command = [SOUP, here/'soup_arm.py', folder/'soup.json', folder/'soup.jsonl']
    subprocess.run(list(map(str, command)), check=True, stdout=sys.stderr, cwd=folder)
    *steps, last = [json.loads(line) for line in (folder/'soup.jsonl').read_text().splitlines()]
    return dict(seconds=[step['seconds'] for step in steps], peak=max(step['peak_mib'] for step in steps), fill=0.,
                packed=last['steps_per_epoch'], trains=spec['method'], trainable=last['trainable'])


def unrelated_text(tokenizer, pieces=10, width=512):
    "Text that has nothing to do with instructions: Python's own documentation, which comes with it."
    from pydoc_data.topics import topics
    ids = []
    for name in sorted(topics):
        ids += tokenizer(topics[name])['input_ids']
        if len(ids) >= pieces*width:
            break
    return [ids[i*width:(i + 1)*width] for i in range(pieces)]


def measure(name, folder, dtype, what):
    "Losses of a model on validation or test rows; fully: on test rows and on unrelated text, and its answers."
    import torch
    from datasets import Dataset
    from alpaca_ft.evaluate import repetition, row_losses
    from alpaca_ft.model import load_model, load_tokenizer
    from alpaca_ft.sampling import fit_prompt, generate_all
    tokenizer = load_tokenizer(name)
    model = load_model(name, dtype=dict(bf16=torch.bfloat16, fp32=torch.float32)[dtype])

    def losses(split):
        "Sum and number of the response tokens' losses, a row each."
        rows = Dataset.from_list(json.loads((folder/f'{split}.json').read_text()))
        found = row_losses(model, tokenizer, rows, SEQ_LEN).values()
        return rows, [[round(x[2], 4), x[3]] for x in found]

    if what != 'fully':
        return {what: losses(what)[1]}
    rows, test = losses('test')
    out = dict(test=test)
    prompts = [fit_prompt(row, tokenizer, SEQ_LEN) for row in rows.select(range(min(24, len(rows))))]
    answers = generate_all(prompts, model, tokenizer, 96)
    out['answers'] = [[a['stopped'], a['tokens'], round(repetition(a['text']), 3)] for a in answers]
    sums = []
    for piece in unrelated_text(tokenizer):
        ids = torch.tensor([piece], device=model.device)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        sums.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction='sum').item())
    out['unrelated'] = [[round(s, 3), len(piece) - 1] for s in sums]
    return out


def job(spec, out):
    "Train and measure as a spec says; the result is in the file `out`."
    sys.path.insert(0, str(here))
    folder = Path(spec['folder'])
    trained = {}
    if spec['steps']:
        train = dict(trl=train_trl, soup=train_soup).get(spec.get('peer'), train_ours)
        trained = train(spec, folder)
    measured = {}
    if spec['measure']:
        name = str(folder/'run'/'model') if spec['steps'] else 'demo'
        measured = measure(name, folder, spec['dtype'], spec['measure'])
    Path(out).write_text(json.dumps(trained | measured))


def forked_job(spec, out, log):
    "The same in a process that was forked after the imports; what it prints goes to a file."
    file = open(log, 'w', buffering=1)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = file
    job(spec, out)


IMPORTED = ['datasets', 'peft', 'trl.trainer.sft_trainer', 'alpaca_ft.evaluate', 'alpaca_ft.run']  # before the fork


# ---------------------------------------------------------------- all jobs

class Bench:
    "The result as far as it has come, and what is needed to go on with it."

    def __init__(self, args):
        self.args, self.lock, self.end, self.dtype = args, Lock(), math.inf, None
        self.slots = BoundedSemaphore(args.workers)
        self.forks = multiprocessing.get_context('forkserver')
        self.forks.set_forkserver_preload(IMPORTED)
        self.result = dict(arms={}, jobs={}, hours=0.)
        if args.out.exists():
            self.result = json.loads(args.out.read_text())
        if args.minutes:
            self.end = time.monotonic() + 60*args.minutes

    def write(self):
        "Save the result, whole or not at all."
        part = self.args.out.with_suffix('.part')
        part.write_text(json.dumps(self.result, indent=0))
        os.replace(part, self.args.out)

    def prepare(self):
        "Machine, versions and rows; a result that was begun on others is refused."
        import torch
        from bench import _version
        cuda = torch.cuda.is_available()
        bf16 = cuda or torch.cpu.get_capabilities().get('avx512_bf16', False)
        setup = dict(cores=len(os.sched_getaffinity(0)), bf16_in_hardware=bf16, dtype='bf16' if bf16 else 'fp32',
                     python=platform.python_version(), seq_len=SEQ_LEN, rows={}, seconds={}, seeds=self.args.seeds,
                     versions={k: _version(k) for k in ('alpaca_ft', 'torch', 'transformers', 'trl', 'peft')})
        for name, source in self.sources():
            setup['rows'][name] = {split: len(rows) for split, rows in self.split(source).items()}
        before, self.dtype = self.result.setdefault('setup', setup), setup['dtype']  # another machine may have another
        self.device = f'{torch.cuda.get_device_name(0)}, torch {torch.__version__}' if cuda else 'cpu'
        setup['rows'] = before['rows'] | setup['rows']  # others may be added
        before['rows'] = setup['rows'] | before['rows']
        for key in ('seq_len', 'rows', 'seeds'):
            if before[key] != setup[key]:
                raise SystemExit(f'{self.args.out}: begun with {key} {before[key]}, and here it is {setup[key]}; '
                                 'go on where it was begun, or give another --out')

    def sources(self):
        "The name and the source of each set of rows; a file's folder is not told."
        for source in self.args.rows:
            yield Path(source).name, source

    def split(self, source):
        "Training, validation and test rows, in an order drawn once."
        import random
        from alpaca_ft.data import load_alpaca
        rows = [dict(r) for r in load_alpaca(source)['train']]
        random.Random(0).shuffle(rows)
        out = {}
        for split, n in N_ROWS.items():
            if split == 'train' and source == 'demo':
                n = DEMO_TRAIN
            n = round(n*self.args.part)
            out[split], rows = rows[:n], rows[n:]
        return out

    def go(self, key, spec, threads=1):
        "The result of a job, done now unless it was done before; None where it failed."
        with self.lock:
            if key in self.result['jobs']:
                return self.result['jobs'][key]
        with self.slots:
            if time.monotonic() > self.end:
                raise TimeoutError
            return self.do(key, spec, threads)

    def do(self, key, spec, threads):
        "A job in a process of its own; one that is timed is started as a user's command is."
        begin = time.monotonic()
        with tempfile.TemporaryDirectory(prefix='methods-') as tmp:
            folder = Path(tmp)
            for split, rows in self.split(spec.pop('source')).items():
                (folder/f'{split}.json').write_text(json.dumps(rows))
            (folder/'spec.json').write_text(json.dumps(spec | dict(folder=tmp)))
            out, log = folder/'out.json', folder/'log'
            if spec['measure']:
                child = self.forks.Process(target=forked_job, args=(spec | dict(folder=tmp), str(out), str(log)))
                child.start()
                child.join()
                rc = child.exitcode
            else:
                command = [sys.executable, here/'methods.py', 'job', folder/'spec.json', out]
                env = os.environ | dict(OMP_NUM_THREADS=str(threads))
                with open(log, 'w') as file:
                    rc = subprocess.run(list(map(str, command)), stdout=file, stderr=file, env=env).returncode
            text = log.read_text().replace(tmp, 'FOLDER').strip().splitlines()
            if rc == 0:
                out = json.loads(out.read_text()) | dict(dtype=spec['dtype'], device=self.device)
            else:
                out = dict(failed=' '.join(text[-1:])[:300])
                if self.args.logs:
                    self.args.logs.mkdir(exist_ok=True, parents=True)
                    (self.args.logs/(key.replace('/', '_') + '.log')).write_text('\n'.join(text))
        seconds = time.monotonic() - begin
        say(f'{key}: {out.get("failed") or self.brief(out)} ({seconds:.0f} s)')
        with self.lock:
            self.result['jobs'][key] = out
            self.result['hours'] += seconds/3600
            self.write()
        return out

    def brief(self, out):
        "A job's result in a few words."
        words = []
        if out.get('seconds'):
            words.append(f"{len(out['seconds'])} steps of {statistics.median(out['seconds']):.2f} s, "
                         f"{out['peak']:,.0f} MiB")
        words += [f'{split} {mean(out[split]):.4f}' for split in ('validation', 'test', 'unrelated') if split in out]
        return ', '.join(words)

    def spec(self, arm, source, steps, lr, seed, measured, recompute=False):
        "What a job needs to know."
        about = dict(kept=None, options={}) | ARMS.get(arm, {})
        if about['kept'] and measured:
            about['kept'] = 'disk'
        return about | dict(source=source, steps=steps, lr=lr, seed=seed, measure=measured, recompute=recompute,
                            dtype=self.dtype)

    def time_arms(self, arms):
        "Seconds and memory of each arm, round after round; and with recomputed activations where it needs too much."
        _, source = next(self.sources())
        n = self.args.warmup + self.args.steps
        for i in range(self.args.rounds):
            for arm in arms:
                key = f'time/{arm}/{i}'
                lr = RATES[ARMS[arm]['kind']][0]
                self.go(key, self.spec(arm, source, n, lr, i, None), threads=os.cpu_count())
        for arm in arms:
            before = self.result['arms'].get(arm, {})
            self.result['arms'][arm] = self.timed('time', arm) | {k: before[k] for k in ('lr',) if k in before}
        limit = self.result['arms'].get(DEFAULT, {}).get('peak')
        for arm in arms if limit else []:
            about = self.result['arms'][arm]
            if 'peer' in ARMS[arm] or about.get('failed') or about['peak'] <= limit:
                continue
            for i in range(self.args.rounds):
                spec = self.spec(arm, source, n, RATES[ARMS[arm]['kind']][0], i, None, recompute=True)
                self.go(f'time-recomputed/{arm}/{i}', spec, threads=os.cpu_count())
            about['recomputed'] = self.timed('time-recomputed', arm)
        self.write()

    def timed(self, kind, arm):
        "Medians over the rounds."
        jobs = [self.result['jobs'][f'{kind}/{arm}/{i}'] for i in range(self.args.rounds)]
        for out in jobs:
            if 'failed' in out:
                return dict(failed=out['failed'])
        steps = [statistics.median(out['seconds'][self.args.warmup:]) for out in jobs]
        return dict(step=statistics.median(steps), steps=[round(x, 4) for x in steps],
                    fill=statistics.median(out['fill'] for out in jobs), peak=max(out['peak'] for out in jobs),
                    epoch=jobs[0]['packed'], trains=jobs[0]['trains'], trainable=jobs[0]['trainable'])

    def packed(self, name, source):
        "Packed training rows of a set of rows, and those of the peer, which packs in its own way."
        jobs = {f'packed/{name}/{arm}': self.spec(arm, source, 1, 1e-5, 0, None) for arm in (DEFAULT, PEER)}
        ours, theirs = self.together(jobs)
        return ours['packed'], theirs['packed']

    def steps_in(self, arm, seconds, n_packed, recomputed=False):
        "Steps that fit into so many seconds, the pass through the frozen layers taken off; no more than some epochs."
        about = self.result['arms'][arm]
        most = EPOCHS*(about['epoch'] if ARMS[arm].get('peer') == 'soup' else n_packed)
        if recomputed:
            about = about['recomputed']
        return min(most, max(1, int((seconds - about['fill']*n_packed)/about['step'])))

    def sweep(self, arm, name, source, steps):
        "The best of an arm's rates by the loss on validation rows."
        rates, found = list(RATES[ARMS[arm]['kind']]), {}
        while True:
            jobs = {f'sweep/{name}/{arm}/{lr:.2g}': self.spec(arm, source, steps, lr, 0, 'validation')
                    for lr in rates if lr not in found}
            new = [lr for lr in rates if lr not in found]
            for lr, out in zip(new, self.together(jobs)):
                found[lr] = math.inf if 'failed' in out else mean(out['validation'])
            best = min(found, key=found.get)
            if found[best] == math.inf or len(found) > len(RATES[ARMS[arm]['kind']]) + 2:
                return best
            if best == max(found):
                rates.append(best*STEP)
            elif best == min(found):
                rates.append(best/STEP)
            else:
                return best

    def sweep_arm(self, arm, name, source, seconds, n_packed):
        "The best rate of one arm on one set of rows: near it in short runs, then down from there in long ones."
        lr = self.sweep(arm, name, source, self.steps_in(arm, seconds*PART_OF_SWEEP, n_packed))
        steps, found, rates = self.steps_in(arm, seconds, n_packed), {}, [lr, lr/STEP]
        while rates:
            jobs = {f'whole/{name}/{arm}/{rate:.2g}': self.spec(arm, source, steps, rate, 0, 'validation')
                    for rate in rates}
            for rate, out in zip(rates, self.together(jobs)):
                found[rate] = math.inf if 'failed' in out else mean(out['validation'])
            lr = min(found, key=found.get)
            rates = [lr/STEP] if lr == min(found) and len(found) < 4 else []
        with self.lock:
            self.result['arms'][arm].setdefault('lr', {})[name] = lr

    def seeds(self, arms, name, source, seconds, n_packed):
        "All of the seconds, one seed after another; then the arms whose activations have to be computed again."
        jobs, last = {}, {}
        for seed in range(1, self.args.seeds + 1):
            for arm in arms:
                about = self.result['arms'][arm]
                steps, lr = self.steps_in(arm, seconds, n_packed), about['lr'][name]
                jobs[f'seeds/{name}/{arm}/{lr:.2g}/{seed}'] = self.spec(arm, source, steps, lr, seed, 'fully')
                recomputed = about.get('recomputed', dict(failed=''))
                if 'failed' not in recomputed and recomputed['peak'] <= self.result['arms'][DEFAULT]['peak']:
                    fewer = self.steps_in(arm, seconds, n_packed, True)
                    spec = self.spec(arm, source, fewer, lr, seed, 'fully', recompute=True)
                    last[f'recomputed/{name}/{arm}/{lr:.2g}/{seed}'] = spec
        self.together(jobs | last)

    def time_to_quality(self, arm, name, source, seconds, n_packed):
        "One of the arms that came first, at parts of the seconds."
        lr, jobs = short_rate(self.result, name, arm), {}
        for part in PARTS:
            steps = self.steps_in(arm, seconds*part, n_packed)
            for seed in range(1, self.args.seeds + 1):
                key = f'quality/{name}/{arm}/{lr:.2g}/{part:.2f}/{seed}'
                jobs[key] = self.spec(arm, source, steps, lr, seed, 'test')
        self.together(jobs)

    def all(self):
        "Everything, one set of rows after another."
        only = self.args.only and {*self.args.only, DEFAULT, PEER}
        arms = [arm for arm in ARMS if not only or arm in only]
        self.time_arms(arms)
        self.each(list(self.sources()), lambda named: self.rows(arms, *named))

    def rows(self, arms, name, source):
        "All arms on one set of rows."
        self.go(f'base/{name}', self.spec('base', source, 0, 0, 0, 'fully'))
        ours, theirs = self.packed(name, source)
        seconds = theirs*self.result['arms'][PEER]['step']
        self.result['setup']['seconds'][name] = round(seconds, 1)
        good = [arm for arm in arms if not self.result['arms'][arm].get('failed')]
        self.each(good, lambda arm: self.sweep_arm(arm, name, source, seconds, ours))
        self.seeds(good, name, source, seconds, ours)
        own = [arm for arm in good if 'peer' not in ARMS[arm]]
        if any(arm not in arms for arm in ARMS if 'peer' not in ARMS[arm]):
            return
        first = sorted(own, key=lambda arm: mean_of(self.result, at_best(self.result, 'seeds', name, arm)))[:3]
        self.each(first, lambda arm: self.time_to_quality(arm, name, source, seconds, ours))

    def together(self, jobs):
        "The results of some jobs."
        return self.each(list(jobs.items()), lambda job: self.go(*job))

    def each(self, items, work):
        "The work on all items, at once as far as there are workers; what fails in one ends all."
        if not items:
            return []
        with ThreadPoolExecutor(len(items)) as pool:
            return list(pool.map(work, items))


# ---------------------------------------------------------------- tables

def mean(pairs):
    "Mean of [sum, number] pairs over all that was counted."
    return sum(s for s, _ in pairs)/sum(n for _, n in pairs)


def at_best(result, kind, name, arm):
    "How the names of an arm's jobs begin, those at its best rate."
    lr = result['arms'][arm].get('lr', {}).get(name, math.nan)
    return f'{kind}/{name}/{arm}/{lr:.2g}/'


def short_rate(result, name, arm):
    "The best rate of the short runs, by the loss of validation rows."
    found = {}
    for key, out in result['jobs'].items():
        if key.startswith(f'sweep/{name}/{arm}/') and 'failed' not in out:
            found[mean(out['validation'])] = float(key.split('/')[-1])
    return found[min(found)] if found else math.nan


def chosen(result, prefix):
    "The jobs whose names begin so, those that failed left out."
    return [out for key, out in result['jobs'].items() if key.startswith(prefix) and 'failed' not in out]


def mean_of(result, prefix, split='test'):
    "Mean over seeds of a loss; infinite where there is none."
    found = [mean(out[split]) for out in chosen(result, prefix) if split in out]
    return statistics.mean(found) if found else math.inf


def against(result, prefix, other):
    "Difference of two arms' test losses, with the interval over rows of the losses averaged over seeds."
    from alpaca_ft.evaluate import interval
    columns = []
    for p in (prefix, other):
        jobs = chosen(result, p)
        rows = zip(*(out['test'] for out in jobs))
        columns.append(tuple(zip(*[(sum(s for s, _ in row)/len(row), row[0][1]) for row in rows])))
    return interval(*columns)


def line_of(result, name, arm, kind='seeds'):
    "A line of a table; None where the arm has no result."
    jobs = chosen(result, at_best(result, kind, name, arm))
    if not jobs:
        return None
    about = result['arms'][arm]
    if kind == 'recomputed':
        about = about['recomputed']
    losses = [mean(out['test']) for out in jobs]
    stops = [statistics.mean(a[0] for a in out['answers']) for out in jobs]
    line = dict(arm=arm + (', recomputed' if kind == 'recomputed' else ''), rate=result['arms'][arm]['lr'][name],
                steps=len(jobs[0]['seconds']), step=about['step'], peak=about['peak'], seeds=len(jobs),
                seconds=about['fill']*jobs[0]['packed'] + about['step']*len(jobs[0]['seconds']),
                loss=statistics.mean(losses), spread=max(losses) - min(losses), stops=statistics.mean(stops),
                unrelated=statistics.mean(mean(out['unrelated']) for out in jobs))
    peer = at_best(result, 'seeds', name, PEER)
    if arm != PEER and chosen(result, peer):
        line['against'] = against(result, at_best(result, kind, name, arm), peer)
    return line


def equal_seconds(result, name):
    "The first table: every arm with the same seconds, the best loss first."
    lines = [line_of(result, name, arm) for arm in result['arms']]
    return sorted((line for line in lines if line), key=lambda line: line['loss'])


def equal_memory(result, name):
    "The second table: the same seconds, and no more memory than the default; with what does not fit."
    limit, fits, not_fit = result['arms'][DEFAULT]['peak'], [], []
    for arm, about in result['arms'].items():
        if about.get('failed'):
            continue
        if about['peak'] <= limit:
            line = line_of(result, name, arm)
        else:
            line = line_of(result, name, arm, 'recomputed')
            if not line:
                least = min(about['peak'], about.get('recomputed', about).get('peak', math.inf))
                not_fit.append(f'{arm} ({least:,.0f} MiB)')
        if line:
            fits.append(line)
    return sorted(fits, key=lambda line: line['loss']), not_fit, limit


def show_table(lines):
    "A table as text."
    print(f"{'':32}{'rate':>8}{'steps':>7}{'s/step':>8}{'s':>6}{'MiB':>7}{'loss':>8}{'spread':>8}"
          f"{'stop':>6}{'unrelated':>11}"
          f'  against {PEER} (95 %)')
    for x in lines:
        other = ''
        if 'against' in x:
            difference, low, high = x['against']
            other = f'  {difference:+.3f} ({low:+.3f} to {high:+.3f})' + (', within noise' if low <= 0 <= high else '')
        print(f"{x['arm']:32}{x['rate']:8.1g}{x['steps']:7}{x['step']:8.2f}{x['seconds']:6.0f}{x['peak']:7.0f}"
              f"{x['loss']:8.3f}{x['spread']:8.3f}{x['stops']:6.0%}{x['unrelated']:11.3f}{other}")


def show_quality(result, name):
    "How many seconds the first arms need for the peer's loss."
    target, seconds = mean_of(result, at_best(result, 'seeds', name, PEER)), result['setup']['seconds'][name]
    if target == math.inf:
        return
    print(f'\ntime to quality: {PEER}, one epoch, {seconds:.0f} s: {target:.3f}')
    for arm in result['arms']:
        cells = []
        for part in sorted(PARTS):
            prefix = f'quality/{name}/{arm}/{short_rate(result, name, arm):.2g}/{part:.2f}/'
            loss = mean_of(result, prefix)
            if loss < math.inf:
                cells.append(f'{part*seconds:.0f} s ({part:.2f}) {loss:.3f}{" reached" if loss <= target else ""}')
        if cells:
            print(f'{arm:32}' + ' · '.join(cells))


def show(result):
    "All tables."
    setup = result['setup']
    for name in setup['rows']:
        if name not in setup['seconds']:
            continue
        base = result['jobs'].get(f'base/{name}')
        print(f"\n{name}: {setup['rows'][name]} rows, {setup['seconds'][name]:.0f} s each, {setup['dtype']}")
        if base:
            stops = statistics.mean(a[0] for a in base['answers'])
            print(f"before training: loss {mean(base['test']):.3f}, stop {stops:.0%}, "
                  f"unrelated {mean(base['unrelated']):.3f}")
        print('\nequal seconds')
        show_table(equal_seconds(result, name))
        if DEFAULT in result['arms']:
            fits, not_fit, limit = equal_memory(result, name)
            print(f'\nequal seconds and at most {limit:,.0f} MiB')
            show_table(fits)
            if not_fit:
                print(f'do not fit: {", ".join(not_fit)}')
        show_quality(result, name)
    failed = {key: out['failed'] for key, out in result['jobs'].items() if 'failed' in out}
    for key, why in failed.items():
        print(f'failed: {key}: {why}')
    print(f"\n{len(result['jobs'])} jobs, {result['hours']:.1f} hours of them"
          + ('' if result.get('finished') else '; not finished'))


def main():
    "Read the command line, and go on as far as time allows."
    if sys.argv[1:2] == ['job']:
        return job(json.loads(Path(sys.argv[2]).read_text()), sys.argv[3])
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--out', type=Path, required=True, help='the result; where it is there, it is gone on with')
    parser.add_argument('--rows', nargs='+', default=['demo'], help='demo, or files of Alpaca rows')
    parser.add_argument('--only', nargs='+', metavar='ARM', help='these arms; one may be added to a finished result')
    parser.add_argument('--minutes', type=float, help='begin no job after so many minutes')
    parser.add_argument('--workers', type=int, default=2, help='jobs at once, of one thread each; timing is alone')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--rounds', type=int, default=3, help='of timing')
    parser.add_argument('--steps', type=int, default=4, help='that are timed, in a round')
    parser.add_argument('--warmup', type=int, default=1, help='steps before them')
    parser.add_argument('--part', type=float, default=1., help='of the numbers of rows, to try things out')
    parser.add_argument('--logs', type=Path, metavar='FOLDER', help='keep there what failed jobs printed')
    parser.add_argument('--show', action='store_true', help='only print the tables')
    args = parser.parse_args()
    os.environ |= dict(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', WANDB_MODE='disabled')
    bench = Bench(args)
    if not args.show:
        bench.prepare()
        bench.write()
        try:
            bench.all()
            bench.result['finished'] = not args.only
        except TimeoutError:
            say('time is up; the same command goes on')
        bench.write()
    show(bench.result)


if __name__ == '__main__':
    main()
