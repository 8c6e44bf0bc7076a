"""Parts of the benchmark that are no training steps, each in a process of its own that `bench.py` starts.

usage: sections.py sampling OUT.json MODEL ROWS N NEW_TOKENS | data-NAME OUT.json MODEL ROWS SEQ_LEN
"""
import json, sys, time
from probe import memory


def sampling(model_id, rows, n, new_tokens):
    "The same greedy answers one at a time by transformers' generate, and at once by alpaca_ft's."
    import torch
    from alpaca_ft.model import load_model, load_tokenizer
    from alpaca_ft.prompts import create_prompt_no_answer
    from alpaca_ft.sampling import generate
    n, new = int(n), int(new_tokens)
    model, tok = load_model(model_id, dtype=torch.float32).eval(), load_tokenizer(model_id)
    prompts = [create_prompt_no_answer(json.loads(l))['text'] for l in open(rows, encoding='utf-8')][:n]
    length = dict(max_new_tokens=new, min_new_tokens=new)  # no answer ends early: the same work either way

    def single(p):
        enc = tok(p, return_tensors='pt').to(model.device)
        with torch.no_grad():
            out = model.generate(**enc, do_sample=False, pad_token_id=tok.pad_token_id, **length)
        return tok.decode(out[0, enc['input_ids'].shape[1]:], skip_special_tokens=True)

    def timed(f):
        t = time.monotonic()
        res = f()
        return time.monotonic() - t, res

    single(prompts[0])  # warm up
    once, a = timed(lambda: generate(prompts, model, tok, **length))
    alone, c = timed(lambda: [single(p) for p in prompts])
    again, _ = timed(lambda: generate(prompts, model, tok, **length))
    batched = (once + again)/2
    return dict(prompts=len(prompts), new_tokens=new, seconds_at_once=[once, again], seconds_one_at_a_time=alone,
                ratio=alone/batched,
                same=sum(x == y for x, y in zip(a, c)), tokens_per_second_at_once=len(prompts)*new/batched)


def data_ours(model_id, rows, seq_len):
    "From a file to packed rows as a run does it, after imports and with the tokenizer loaded."
    from alpaca_ft.model import load_tokenizer
    from alpaca_ft.run import Run, load_rows, pack_rows, quiet
    from alpaca_ft.trainer import RunConfig, make_trainer  # noqa: F401
    import datasets, trl  # noqa: F401
    quiet()
    run = Run(RunConfig(model=model_id, data=rows, seq_len=int(seq_len), eval_every=1))
    run.tokenizer = load_tokenizer(model_id)
    t = time.monotonic()
    run.rows, bad = load_rows(run.cfg)
    pack_rows(run, bad)
    seconds = time.monotonic() - t
    n = sum(map(len, run.rows.values()))
    return dict(rows=n, seconds=seconds, rows_per_second=n/seconds, packed=len(run.train) + len(run.test),
                process_peak_mib=memory('VmHWM'))


def data_trl(model_id, rows, seq_len, text):
    """TRL's path: load_dataset, map to its columns, and what SFTTrainer does with them before training (the model is
    a tiny one)."""
    import tempfile, torch
    import datasets
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer
    from contenders import prompt
    datasets.disable_progress_bars()
    tok = AutoTokenizer.from_pretrained(model_id)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=1, num_key_value_heads=1))
    def halves(r):
        whole = prompt(r)
        return dict(prompt=whole[:len(whole) - len(r['output'])], completion=r['output'])
    with tempfile.TemporaryDirectory() as tmp:
        args = SFTConfig(output_dir=tmp, packing=True, max_length=int(seq_len), report_to=[], disable_tqdm=True,
                         use_cpu=not torch.cuda.is_available())
        t = time.monotonic()
        ds = datasets.load_dataset('json', data_files=rows, split='train', cache_dir=f'{tmp}/cache')
        n = len(ds)
        ds = ds.map(lambda r: dict(text=prompt(r)) if text else halves(r),
                    remove_columns=['instruction', 'input', 'output'])
        trainer = SFTTrainer(model, args=args, train_dataset=ds, processing_class=tok)
        seconds = time.monotonic() - t
        return dict(rows=n, seconds=seconds, rows_per_second=n/seconds, packed=len(trainer.train_dataset),
                    process_peak_mib=memory('VmHWM'))


PARTS = {'sampling': sampling, 'data-alpaca_ft': data_ours, 'data-trl-text': lambda *a: data_trl(*a, True),
         'data-trl-prompt-completion': lambda *a: data_trl(*a, False)}

if __name__ == '__main__':
    what, out, *rest = sys.argv[1:]
    result = PARTS[what](*rest)
    with open(out, 'w') as f:
        json.dump(result, f)
