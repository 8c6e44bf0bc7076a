"""The contenders: each trains the same model on the same rows, in a process of its own that `bench.py` starts.

usage: contenders.py NAME SPEC.json LOG.jsonl     (SPEC: see `bench.spec`)
"""
import json, sys
from types import SimpleNamespace

from probe import Probe


def read_packed(s):
    "Packed rows as tensors: token ids, and positions that restart in each document."
    import torch
    rows = [json.loads(l) for l in open(s.packed)]
    return [(torch.tensor(r['input_ids']), torch.cat([torch.arange(n) for n in r['seq_lengths']])) for r in rows]


def order(n, seed):
    "Row numbers, epoch after epoch: the order that alpaca_ft takes too."
    import torch
    epoch = 0
    while True:
        yield from torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        epoch += 1


def freeze(model, n_freeze, frozen_dtype):
    "Train the last layers and the head in fp32; what stays is in `frozen_dtype`."
    import torch
    model.requires_grad_(False)
    for m in [model.lm_head, *model.model.layers[n_freeze:]]:
        m.requires_grad_(True)
    for p in model.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else frozen_dtype)


def load(s):
    "The frozen model as every contender of this environment gets it."
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(s.model, dtype='auto')
    if torch.cuda.is_available():
        model = model.to('cuda')
    freeze(model, s.n_freeze, getattr(torch, s.dtype))
    return model


def floor(s, probe, cached=False):
    "A bare PyTorch loop: nothing but forward, loss, backward, clip, step. Documents are isolated by their positions."
    import torch
    import torch.nn.functional as F
    from transformers import get_cosine_schedule_with_warmup
    torch.manual_seed(s.seed)
    model = load(s).train()
    device, rows = model.device, read_packed(s)
    trained = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(trained, lr=s.lr, weight_decay=0., fused=True)
    sched = get_cosine_schedule_with_warmup(opt, round(s.planned*.1), s.planned)
    def cast(): return torch.autocast(device.type, torch.bfloat16, enabled=s.dtype == 'bfloat16')
    if cached:  # the best that a prefix cache could do: the frozen layers run once, then only the trained part exists
        prefix, model = frozen_output(model, s, rows, cast, device)
    batch = order(len(rows), s.seed)
    probe.watch()
    while True:
        step = [next(batch) for _ in range(s.batch_size)]
        n = sum(int((rows[i][1][1:] != 0).sum()) for i in step)
        for i in step:
            ids, pos = (x[None].to(device) for x in rows[i])
            # a document's first token is not predicted from another document
            labels = ids.masked_fill(pos == 0, -100)[0, 1:]
            with cast():
                feed = dict(inputs_embeds=prefix[i]) if cached else dict(input_ids=ids)
                logits = model(**feed, position_ids=pos, use_cache=False).logits
                loss = F.cross_entropy(logits[0, :-1].float(), labels, reduction='sum')/n
            loss.backward()
            probe.tokens += ids.numel()
            probe.losses.append(loss.detach())
            del logits
        torch.nn.utils.clip_grad_norm_(trained, 1.)
        opt.step()
        sched.step()
        opt.zero_grad()


def frozen_output(model, s, rows, cast, device):
    "The hidden states at the first trained layer, and the model from there on."
    import copy, torch
    out = []
    hook = model.model.layers[s.n_freeze].register_forward_pre_hook(lambda m, a,
            kw: out.append(a[0] if a else kw['hidden_states']), with_kwargs=True)
    with torch.no_grad(), cast():
        for ids, pos in rows:
            model.model(input_ids=ids[None].to(device), position_ids=pos[None].to(device), use_cache=False)
    hook.remove()
    tail = copy.copy(model)
    tail._modules = dict(model._modules)
    tail.model = copy.copy(model.model)
    tail.model._modules = dict(model.model._modules)
    tail.model.layers, tail.model.embed_tokens = model.model.layers[s.n_freeze:], None
    return out, tail


def trl(s, probe, checkpointing=True):
    """TRL's SFTTrainer as its documentation suggests: `text` rows, packing=True, everything else as it comes;
    logging aside."""
    import torch
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer
    tokenizer = AutoTokenizer.from_pretrained(s.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = load_dataset('json', data_files=s.rows, split='train').map(lambda r: dict(text=prompt(r)),
                                                                      remove_columns=['instruction', 'input', 'output'])
    args = SFTConfig(output_dir=s.out, packing=True, max_length=s.seq_len, per_device_train_batch_size=1,
                     gradient_accumulation_steps=s.batch_size,
                     max_steps=s.planned, learning_rate=s.lr, bf16=s.dtype == 'bfloat16', report_to=[],
                     disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
                     **({} if checkpointing else dict(activation_checkpointing=False)))
    trainer = SFTTrainer(load(s), args=args, train_dataset=rows, processing_class=tokenizer)
    probe.watch()
    probe.watch_trainer(tokenizer.pad_token_id)
    trainer.train()


def prompt(r):
    "The text of a row by the Alpaca template; a script of one's own would hold just this."
    given = f"\n\n### Input:\n{r['input']}" if r['input'] else ''
    first = ', paired with an input that provides further context' if given else ''
    return (f'Below is an instruction that describes a task{first}. '
            'Write a response that appropriately completes the request.\n\n'
            f"### Instruction:\n{r['instruction']}{given}\n\n### Response:\n{r['output']}")


def llama_factory(s, probe):
    """LLaMA-Factory's freeze method with neat_packing (isolated documents). Runs in its own environment, see
    make_envs.sh."""
    from pathlib import Path
    from transformers import AutoTokenizer
    from llamafactory.train.tuner import run_exp
    info = dict(rows=dict(file_name=str(s.rows), formatting='alpaca'))
    folder = Path(s.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder/'dataset_info.json').write_text(json.dumps(info))
    probe.watch()
    probe.watch_trainer(AutoTokenizer.from_pretrained(s.model).pad_token_id)
    run_exp(dict(
        model_name_or_path=s.model, stage='sft', do_train=True, finetuning_type='freeze',
        freeze_trainable_layers=s.n_layers - s.n_freeze,
        freeze_extra_modules='lm_head', template='alpaca', dataset='rows', dataset_dir=str(folder),
        cutoff_len=s.seq_len, packing=True, neat_packing=True,
        train_on_prompt=True, per_device_train_batch_size=1, gradient_accumulation_steps=s.batch_size,
        max_steps=s.planned, learning_rate=s.lr,
        lr_scheduler_type='cosine', warmup_ratio=0.1, bf16=s.dtype == 'bfloat16', use_cpu=True,
        output_dir=str(folder/'run'), report_to='none', seed=s.seed,
        overwrite_cache=True, disable_tqdm=True, save_strategy='no', preprocessing_num_workers=1))


def alpaca_ft(s, probe, cached=False):
    "This package: a whole run as the command does it, short of evaluation, samples and saving."
    from transformers import TrainerCallback
    from alpaca_ft.options import RunConfig
    from alpaca_ft.run import train
    from alpaca_ft.trainer import PackedSFTTrainer
    own_step = PackedSFTTrainer.training_step

    def training_step(self, model, inputs, num_items_in_batch=None):
        "Count tokens where the trainer's batches say how many they hold."
        probe.tokens = probe.tokens + inputs['n_tokens']
        return own_step(self, model, inputs, num_items_in_batch=num_items_in_batch)

    class NoEvaluation(TrainerCallback):
        def on_train_begin(self, args, state, control, **kw):
            args.eval_on_start = False
            probe.watch()
            probe.watch_trainer()

    PackedSFTTrainer.training_step = training_step
    train(RunConfig(model=s.model, data=s.rows, eval_data=s.eval_rows, out=s.out, n_freeze=s.n_freeze,
                    seq_len=s.seq_len,
                    batch_size=s.batch_size, max_steps=s.planned, lr=s.lr, n_samples=0,
                    eval_every=10**6, seed=s.seed, dtype=dict(bfloat16='bf16', float32='fp32')[s.dtype],
                    prefix_cache='memory' if cached else 'off'), [NoEvaluation()])


CONTENDERS = {
    'floor': floor, 'floor-cached': lambda s, p: floor(s, p, cached=True),
    'trl-doc': trl, 'trl-nockpt': lambda s, p: trl(s, p, checkpointing=False),
    'llama-factory': llama_factory,
    'alpaca_ft': alpaca_ft, 'alpaca_ft-cached': lambda s, p: alpaca_ft(s, p, cached=True)}


if __name__ == '__main__':
    name, spec, log = sys.argv[1:]
    s = SimpleNamespace(**json.load(open(spec)))
    CONTENDERS[name](s, Probe(log, s.skip, s.skip + s.steps))
