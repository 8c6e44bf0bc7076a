"""The fault suite: kill a run at many moments, resume it, and compare the end with that of a run which was left alone.

usage: python tests/faults.py [KILLS] [WORKERS]
       (50 kills with 2 workers unless told otherwise; exit code 0 if all survived)

Modules are imported once; every run is a forked child, so that a kill costs seconds. A child counts what it does:
forward passes in training, evaluation and generation, optimizer steps, and each operation on a file of the run
folder. A first run lists these moments; then a run is killed (SIGKILL) at each chosen one: every file operation of a
whole save (writes and weights are cut in half), and others spread over the run. Every fifth resumed run is killed too.
"""
import builtins, io, json, os, shutil, signal, sys, tempfile, time
from pathlib import Path

STEPS, SAVE = 8, 6  # optimizer steps; the save whose file operations are all tried (it deletes an older one)
OPTIONS = ['--n-freeze', 2, '--seq-len', 512, '--batch-size', 4, '--micro-batch-size', 2, '--epochs', 3, '--max-steps',
           STEPS, '--save-every', 2, '--keep', 2,
           '--eval-every', 3, '--n-samples', 2, '--max-new-tokens', 4, '--dtype', 'fp32', '--lr', '1e-3']


def make_parts(folder):
    "A tiny model with dropout, so that the random state matters, a tokenizer of bytes, and a few rows."
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from alpaca_ft import load_alpaca
    t = Tokenizer(models.BPE({c: i for i, c in enumerate(['</s>', *sorted(pre_tokenizers.ByteLevel.alphabet())])}, []))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=t, eos_token='</s>', pad_token='</s>').save_pretrained(folder/'tiny')
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
                                 num_attention_heads=4, num_key_value_heads=2,
                                 attention_dropout=0.1, eos_token_id=0, pad_token_id=0)).save_pretrained(folder/'tiny')
    rows = sorted(load_alpaca()['train'], key=lambda r: len(str(r)))[:20]
    (folder/'rows.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))


class Moments:
    "Counts the moments of a run in this process, lists them, and ends it at one of them."
    def __init__(self, out, at=None): self.out, self.at, self.seen = Path(out).resolve(), at, []

    def now(self, what, half=None):
        self.seen.append(what)
        if len(self.seen) - 1 != self.at:
            return
        if half:
            half()
        os.kill(os.getpid(), signal.SIGKILL)

    def inside(self, path):
        try:
            p = Path(os.path.abspath(os.fspath(path)))
        except TypeError:
            return None
        return str(p.relative_to(self.out)) or '.' if p == self.out or self.out in p.parents else None

    def wrap(self, module, name, what):
        old = getattr(module, name)
        def new(path, *args, **kw):
            if isinstance(path, int):
                path_ = os.readlink(f'/proc/self/fd/{path}')
            else:
                path_ = path
            if (p := self.inside(path_)) is not None:
                self.now(f'{what} {p}')
            return old(path, *args, **kw)
        setattr(module, name, new)

    def hook(self):
        "Count whatever this process does from now on."
        self.hook_folder()
        self.hook_open()
        self.hook_weights()
        self.hook_steps()

    def hook_folder(self):
        for name in ('fsync', 'rename', 'replace', 'truncate', 'mkdir'):
            self.wrap(os, name, name)
        self.wrap(shutil, 'rmtree', 'rmtree')
        old_unlink = os.unlink
        def unlink(path, *args, dir_fd=None, **kw):
            at = os.path.join(os.readlink(f'/proc/self/fd/{dir_fd}'), path) if dir_fd is not None else path
            if (p := self.inside(at)) is not None:
                self.now(f'unlink {p}')
            return old_unlink(path, *args, dir_fd=dir_fd, **kw)
        os.unlink = unlink

    def hook_open(self):
        old_open, moments = builtins.open, self
        class Writer:
            def __init__(self, f, name): self.f, self.name = f, name
            def write(self, data):
                def half():
                    self.f.write(data[:len(data)//2])
                    self.f.flush()
                moments.now(f'write {self.name}', half)
                return self.f.write(data)
            def __enter__(self):
                self.f.__enter__()
                return self
            def __exit__(self, *args): return self.f.__exit__(*args)
            def __getattr__(self, name): return getattr(self.f, name)
        def open_(path, mode='r', *args, **kw):
            name = self.inside(path) if any(c in mode for c in 'wax') and not isinstance(path, int) else None
            if name is not None:
                self.now(f'open {name}')
            f = old_open(path, mode, *args, **kw)
            return f if name is None else Writer(f, name)
        builtins.open = io.open = open_

    def hook_weights(self):
        import safetensors.torch
        import transformers.modeling_utils
        import alpaca_ft.checkpoints
        old_save = safetensors.torch.save_file
        def save_file(tensors, path, *args, **kw):
            name = self.inside(path)
            if name is None:
                return old_save(tensors, path, *args, **kw)
            def half():
                old_save(tensors, path, *args, **kw)
                os.truncate(path, os.path.getsize(path)//2)
            self.now(f'begin {name}')
            self.now(f'half of {name}', half)
            return old_save(tensors, path, *args, **kw)
        safetensors.torch.save_file = transformers.modeling_utils.safe_save_file = save_file
        alpaca_ft.checkpoints.save_file = save_file

    def hook_steps(self):
        import torch
        from transformers.models.llama.modeling_llama import LlamaModel
        forward, step = LlamaModel.forward, torch.optim.AdamW.step
        def forward_(model, *args, **kw):
            if (self.out/'config.yaml').exists():
                self.now('train' if model.training else 'generate' if kw.get('past_key_values') is not None
                         or kw.get('use_cache') else 'evaluate')
            return forward(model, *args, **kw)
        def step_(opt, *args, **kw):
            self.now('optimizer step')
            return step(opt, *args, **kw)
        LlamaModel.forward, torch.optim.AdamW.step = forward_, step_


def child(work):
    "Run a function in a forked child; its wait status."
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            import torch
            torch.set_num_threads(1)  # PyTorch's thread pool is new after a fork; threads would race for it
            code = work() or 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def run(out, at=None, resume=False, moments=None):
    "One run in a child: killed at a moment, or to its end; its moments to a file. Returns the wait status."
    def work():
        with builtins.open(f'{out}.log', 'a') as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        m = Moments(out, at)
        m.hook()
        from alpaca_ft.cli import main
        code = main([str(a)
                     for a in ['train', '--model', './tiny', '--data', 'rows.jsonl', '--out', out,
                               *OPTIONS] + ['--resume']*resume])
        if moments:
            Path(moments).write_text(json.dumps(m.seen))
        return code
    return child(work)


def end(out):
    """What has to be the same: metrics but for the speed, samples, the model's files, the checkpoints' tensors; and
    what must not be there."""
    from alpaca_ft.checkpoints import checkpoints, damage
    from alpaca_ft.files import sha256 as _sha256
    out = Path(out)
    lines = [json.loads(l) for l in (out/'metrics.jsonl').read_text().splitlines()]
    return dict(metrics=json.dumps([{k: v for k, v in l.items() if k != 'tokens_per_second'} for l in lines]),
                samples=(out/'samples.jsonl').read_text(),
                model={p.name: _sha256(p) for p in sorted((out/'model').iterdir())},
                checkpoints={f'{c.name}/{p.name}': _sha256(p) for c in checkpoints(out)
                             for p in sorted(c.glob('*.safetensors'))},
                damaged=[str(c) for c in checkpoints(out) if damage(c)],
                left=sorted(p.name for p in out.rglob('*.part')))


def case(i, at, again, what, right):
    "Kill, perhaps kill the resumed run too, resume, compare: a dict for the table."
    out, kills, t = f'case{i}', 0, time.time()
    for k in [at] + [again]*(again is not None):
        if (Path(out)/'model').exists():
            break
        status = run(out, k, resume=Path(out).exists())
        kills += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if not (Path(out)/'model').exists():
        status = run(out, resume=Path(out).exists())
    log = Path(f'{out}.log').read_text()
    start = [l.split('step-')[-1] if 'going on' in l else '0' for l in log.splitlines() if 'going on from' in l
             or 'starts again' in l]
    try:
        different = [k for k, v in end(out).items() if v != right[k]]
    except OSError as e:
        different = [str(e)]
    if 'damaged (' in log:
        different.append('a damaged checkpoint')
    if not different:
        shutil.rmtree(out)
    return dict(case=i, moment=at, what=what, kills=kills, went_on_from=start[-1] if start else '-',
                different=different, log=log if different else '', seconds=round(time.time()-t, 1))


def choose(seen, n):
    "All file operations of one save, and others spread over the run: moment numbers."
    save = [i for i, w in enumerate(seen) if f'step-{SAVE}' in w]
    save = list(range(save[0],
                      next((i for i in range(save[-1], len(seen)) if seen[i] in ('train', 'evaluate', 'generate')),
                           save[-1] + 1)))
    rest = [[i for i, w in enumerate(seen) if w == k] for k in ('train', 'evaluate', 'generate', 'optimizer step')]
    rest.append([i for i,
                 w in enumerate(seen) if i not in save
                 and w not in ('train', 'evaluate', 'generate', 'optimizer step')])
    if n < 2*len(save):
        save = [save[j*len(save)//(n//2)] for j in range(n//2)] if n < len(save) + 10 else save
    per, left = n - len(save), []
    for j, r in enumerate(rest):
        k = per//len(rest) + (j < per % len(rest))
        left += [r[(2*i + 1)*len(r)//(2*k)] for i in range(k)]
    return sorted(save + left)


def main(kills=50, workers=2):
    import torch, trl, datasets, yaml, alpaca_ft.cli, alpaca_ft.run  # noqa: F401 (once, for all children)
    torch.set_num_threads(1)
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'
    t, home = time.time(), os.getcwd()
    with tempfile.TemporaryDirectory() as tmp:
        os.chdir(tmp)
        child(lambda: make_parts(Path(tmp)))
        assert run('straight', moments='moments.json') == 0, Path('straight.log').read_text()
        seen, right = json.loads(Path('moments.json').read_text()), end('straight')
        assert run('twice') == 0 and end('twice') == right, 'two runs without a kill differ'
        todo, done, busy = [(i, at, at//2 if i % 5 == 4 else None, seen[at]) for i,
                            at in enumerate(choose(seen, kills))], [], {}
        print(f'{len(seen)} moments in a run; {len(todo)} of them are tried', flush=True)
        while todo or busy:
            while todo and len(busy) < workers:
                c = todo.pop(0)
                if (pid := os.fork()) == 0:
                    try:
                        Path(f'{c[0]}.json').write_text(json.dumps(case(*c, right)))
                    finally:
                        os._exit(0)
                busy[pid] = c
            c = busy.pop(os.wait()[0])
            r = json.loads(Path(f'{c[0]}.json').read_text()) if Path(f'{c[0]}.json').exists() else dict(case=c[0],
                    moment=c[1], what=c[3], kills=0, went_on_from='-', different=['the case died'], log='', seconds=0)
            done.append(r)
            how = 'DIFFERENT: ' + ', '.join(r['different']) if r['different'] else 'same end'
            print(f"{r['case']+1:3} moment {r['moment']:4} {r['what'][:58]:58} kills {r['kills']}  "
                  f"went on from step {r['went_on_from']:2} {how}", flush=True)
            if r['log']:
                print(r['log'][-3000:])
        os.chdir(home)
    good = [r for r in done if not r['different'] and r['kills']]
    kills, damaged = sum(r['kills'] for r in done), sum('damaged' in str(r['different']) for r in done)
    print(f'{len(good)} of {len(done)} killed runs ended like the one left alone '
          f'({kills} kills, {damaged} damaged states, {time.time()-t:.0f} s)')
    return 0 if len(good) == len(done) else 1


if __name__ == '__main__':
    sys.exit(main(*map(int, sys.argv[1:])))
