"""The matrix of models and options: every cell is a run, held against a plain loop, or a refusal that was promised.

usage: python tests/matrix.py [--workers 2] [--only REGEX] [--pairs] [--more] [--two] [--logs FOLDER]

A cell is a family of models with one choice of each option. It must end in one of two ways:
- the run ends, its losses are those of the oracle (a loop in plain PyTorch and transformers, below), what was frozen is
  untouched, what trains has moved, and RUN/model loads with plain transformers to the model that was trained;
- the run is refused in one line before anything was written, where the table REFUSED says so.

`--pairs` tries a covering array (each pair of choices is met once at least) in place of the whole product, `--two` such
an array in two processes, with weights copied or spread, `--more` the families of the table MORE too, `--only` the
cells whose name the regular expression finds, and `--logs` keeps what the failed cells printed. Modules are imported
once, and every cell is a forked child, so that it costs a second or two.
Exit code 0 if no cell failed.
"""
import argparse
import collections
import dataclasses
import functools
import gc
import importlib
import itertools
import json
import math
import os
import pkgutil
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

import alpaca_ft

import several

SEED, SEQ_LEN, BATCH_SIZE, EPOCHS, LR, WARMUP, N_FREEZE = 42, 128, 2, 2, 1e-3, 0.1, 2
ROTATE_EVERY = 3  # steps until another layer trains; a killed run goes on in the middle of them
EVAL_EVERY = 3  # optimizer steps between evaluations
SAVE_EVERY = 2  # optimizer steps between the checkpoints of a run that is killed
KILLED_AT = 4  # the optimizer step before which it is killed: one step is lost, and an evaluation with it
LIMIT = 180  # seconds that a cell may take
SCALE = 5  # the random weights are made so much larger, because a flat model would show no errors

# How far a run's numbers may be from the oracle's, relative to them. In fp32 only the order of additions differs:
# 1.5e-6 is 1e-5 of a loss of 6.5. In bf16 a product has 8 bits, and a packed row is cut into other blocks than its
# documents alone; where experts are chosen, a rounding sends a token to another expert now and then. How much rounding
# does, the oracle itself shows, in fp32 and in bf16: where twice that is more than the bound here, it is the bound
# (`allowed`). ReLU's gradient jumps where its input is 0: in one of ten steps OPT's norm was 3e-4 off in fp32 while all
# losses agreed to 3e-7, and with GELU in its place 2e-7. The norm of the trained weights is 4e-5 off with a weight
# decay of 0.01: fp32 finds that. In bf16 rounding alone moved it by up to 5e-5 (with experts on a processor with AMX,
# 1.2e-4, where the oracle's own rounding is 0.9e-4), so there it finds only what is larger.
LOSS = dict(fp32=1.5e-6, bf16=0.0015, experts=0.005)
NORM = dict(fp32=1e-5, bf16=0.02, experts=0.05, relu=1e-3)  # of the gradient's norm
SIZE = dict(fp32=1e-6, bf16=1e-4, experts=1e-4)  # of the trained weights' norm
EXACTER = dict(bf16='fp32', fp32='fp32')  # precision of a run: that of the oracle which shows what rounding does

# ---- the families ----

VOCAB = 608  # the tokenizer's 600, and room for the one that transformers adds to a tokenizer in a Qwen2 folder
TOKENS = dict(bos_token_id=0, eos_token_id=1, pad_token_id=1)
SHAPE = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=512)
COMMON = SHAPE | TOKENS | dict(intermediate_size=64, num_key_value_heads=2)
GPT = dict(vocab_size=VOCAB, n_embd=32, n_layer=4, n_head=4, n_positions=512, bos_token_id=0, eos_token_id=1)
NO_GPT_DROPOUT = dict(resid_pdrop=0., embd_pdrop=0., attn_pdrop=0.)


def model_of(config, options, **more):
    "A random model of a configuration class of transformers, given by name; more options override the first ones."
    torch.manual_seed(0)
    config = getattr(transformers, config)(**(options | more))
    return scaled(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def scaled(model):
    "A model whose random weights are larger than they came."
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p.mul_(SCALE)
            else:  # biases are not all 0, and norms not all 1
                p.add_(torch.randn_like(p), alpha=0.1)
    return model.eval()


def opt():
    "OPT: learned positions, biases everywhere, a tied head."
    return model_of('OPTConfig', SHAPE | TOKENS, ffn_dim=64, word_embed_proj_dim=32, dropout=0., attention_dropout=0.,
                    activation_dropout=0.)


def gpt_neox():
    "GPT-NeoX: attention and MLP side by side; its files call the head by another name than its module."
    return model_of('GPTNeoXConfig', SHAPE | TOKENS, intermediate_size=64, attention_dropout=0., hidden_dropout=0.)


def bloom():
    "Bloom: no positions but a slope in the attention's scores (ALiBi)."
    return model_of('BloomConfig', TOKENS, vocab_size=VOCAB, hidden_size=32, n_layer=4, n_head=4, hidden_dropout=0.,
                    attention_dropout=0.)


def falcon():
    "Falcon: attention and MLP side by side, one head of keys and values."
    return model_of('FalconConfig', SHAPE | TOKENS, hidden_dropout=0., attention_dropout=0.)


def deepseek():
    "DeepSeek V3: keys and values through a narrow layer, experts in all layers but the first."
    narrow = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
    experts = dict(n_routed_experts=4, n_shared_experts=1, moe_intermediate_size=32, first_k_dense_replace=1, n_group=1,
                   topk_group=1)
    return model_of('DeepseekV3Config', COMMON, num_key_value_heads=4, **narrow, **experts, **EXPERTS)


WINDOWS = dict(head_dim=8, sliding_window=64, query_pre_attn_scalar=8)  # some layers look 64 tokens back only
EXPERTS = dict(num_experts_per_tok=2, output_router_logits=False)
WITH_EXPERTS = ['mixtral', 'qwen3-moe', 'gpt-oss', 'afmoe', 'deepseek-v3']
MULTIPLIERS = dict(logits_scaling=2., embedding_multiplier=2., residual_multiplier=0.5)

FAMILIES = {
    'llama-tied': lambda: model_of('LlamaConfig', COMMON, tie_word_embeddings=True),
    'llama': lambda: model_of('LlamaConfig', COMMON, tie_word_embeddings=False),
    'mistral-window': lambda: model_of('MistralConfig', COMMON, sliding_window=64),
    'qwen2': lambda: model_of('Qwen2Config', COMMON),
    'qwen3': lambda: model_of('Qwen3Config', COMMON, head_dim=8),
    'gemma2': lambda: model_of('Gemma2Config', COMMON, **WINDOWS),
    'gemma3': lambda: model_of('Gemma3TextConfig', COMMON, **WINDOWS, sliding_window_pattern=2),
    'phi3': lambda: model_of('Phi3Config', COMMON),
    'gpt-neox': gpt_neox,
    'gpt2': lambda: model_of('GPT2Config', GPT, **NO_GPT_DROPOUT),
    'opt': opt,
    'mixtral': lambda: model_of('MixtralConfig', COMMON, num_local_experts=4, **EXPERTS),
    'olmo2': lambda: model_of('Olmo2Config', COMMON),
}  # name: function that makes the model

MORE = {
    'gptj': lambda: model_of('GPTJConfig', GPT, rotary_dim=4, **NO_GPT_DROPOUT),
    'falcon': falcon,
    'bloom': bloom,
    'cohere': lambda: model_of('CohereConfig', COMMON, logit_scale=1.),
    'granite': lambda: model_of('GraniteConfig', COMMON, **MULTIPLIERS),
    'starcoder2': lambda: model_of('Starcoder2Config', COMMON, sliding_window=64, residual_dropout=0.,
                                   embedding_dropout=0.),
    'phi': lambda: model_of('PhiConfig', COMMON, resid_pdrop=0., embd_pdrop=0., attention_dropout=0.),
    'gemma': lambda: model_of('GemmaConfig', COMMON, head_dim=8),
    'qwen3-moe': lambda: model_of('Qwen3MoeConfig', COMMON, head_dim=8, num_experts=4, moe_intermediate_size=32,
                                  **EXPERTS),
    'gpt-oss': lambda: model_of('GptOssConfig', COMMON, head_dim=8, num_local_experts=4, sliding_window=64, **EXPERTS),
    'cohere2': lambda: model_of('Cohere2Config', COMMON, logit_scale=1., sliding_window=64),
    'smollm3': lambda: model_of('SmolLM3Config', COMMON),
    'afmoe': lambda: model_of('AfmoeConfig', COMMON, head_dim=8, num_experts=4, moe_intermediate_size=32,
                              num_dense_layers=1, num_shared_experts=1, sliding_window=64, **EXPERTS),
    'deepseek-v3': deepseek,
    'qwen3.5': lambda: model_of('Qwen3_5TextConfig', COMMON, head_dim=8, linear_key_head_dim=8, linear_num_key_heads=2,
                                linear_value_head_dim=8, linear_num_value_heads=4),
    'stablelm': lambda: model_of('StableLmConfig', COMMON, attention_dropout=0., hidden_dropout=0.),
}  # families beyond those, see --more


# ---- the cells ----

OPTIONS = dict(
    prefix=['off', 'memory', 'disk'],
    ac=[0, 1],
    loss=['all', 'response'],
    micro=[1, 2],
    dtype=['fp32', 'bf16'],
    killed=[False, True],
    generation=['new', 'old'],
    choice=['freeze', 'middle', 'lora', 'rotate'],
)  # option of a cell: its choices

REFUSED = [
    (dict(family='bloom', prefix='memory'), 'prefix_cache'),
    (dict(family='bloom', prefix='disk'), 'prefix_cache'),
    (dict(family='falcon', prefix='memory'), 'does not pass arguments on to its layers'),
    (dict(family='falcon', prefix='disk'), 'does not pass arguments on to its layers'),
    (dict(family='gptj', prefix='memory'), 'does not pass arguments on to its layers'),
    (dict(family='gptj', prefix='disk'), 'does not pass arguments on to its layers'),
    (dict(processes=2, prefix='memory'), 'share kept states through a file'),
    (dict(processes=2, micro=2), 'has work for 1 of 2 processes'),
    (dict(spread=True, choice='rotate'), 'rotate changes what trains'),
]  # (choices of a cell as a dict, words of the refusal's line): all cells with these choices are refused


@dataclasses.dataclass(frozen=True)
class Cell:
    "A family of models and one choice of each option."
    family: str  # a key of FAMILIES or MORE
    prefix: str  # where the frozen layers' output is kept
    ac: int  # 1: activation checkpointing
    loss: str  # the tokens that are learnt
    micro: int  # packed rows in a forward pass
    dtype: str
    killed: bool  # killed past the first checkpoint, and resumed
    generation: str  # `old`: the model has a generation_config.json that is no longer valid, as old copies of Llama 2
    # what trains: the last layers and the head (`freeze`), one at a time (`rotate`), two in the `middle`, `lora`
    choice: str
    processes: int = 1  # that train together
    spread: bool = False  # the weights are spread over them (FSDP2), not copied (DDP)

    def __str__(self):
        words = [self.family, f'prefix={self.prefix}', f'ac={self.ac}', f'loss={self.loss}', f'micro={self.micro}']
        words += [self.dtype, 'killed' if self.killed else 'whole', self.generation, self.choice]
        words += [f'{self.processes} processes', 'FSDP2' if self.spread else 'DDP']*(self.processes > 1)
        return ' '.join(words)

    @property
    def choices(self):
        "Its choices: pairs of an option and its value."
        return list(dataclasses.asdict(self).items())

    @property
    def id(self):
        "A name for files and for pytest."
        return str(self).replace('prefix=', 'prefix-').replace(' ', '-').replace('=', '')


TWO = [
    Cell('llama-tied', 'off', 0, 'all', 1, 'fp32', False, 'new', 'freeze', 2),
    Cell('qwen3', 'disk', 1, 'response', 1, 'bf16', True, 'new', 'lora', 2),
    Cell('mixtral', 'disk', 0, 'all', 1, 'fp32', True, 'old', 'rotate', 2),
    Cell('gpt2', 'off', 1, 'response', 1, 'fp32', True, 'new', 'middle', 2),
    Cell('gemma2', 'disk', 0, 'all', 1, 'bf16', False, 'new', 'freeze', 2),
    Cell('llama', 'memory', 0, 'all', 1, 'fp32', False, 'new', 'freeze', 2),
    Cell('phi3', 'off', 0, 'all', 2, 'fp32', False, 'new', 'freeze', 2),
    Cell('olmo2', 'off', 0, 'all', 1, 'fp32', False, 'new', 'rotate', 2, True),
]  # cells in two processes: each choice of what trains, and what is refused
# what else there is in two processes; the choices that are left out are refused, see TWO
IN_TWO = OPTIONS | dict(prefix=['off', 'disk'], micro=[1], processes=[2], spread=[False, True])
# as accelerate launch says it
FSDP = dict(ACCELERATE_USE_FSDP='true', FSDP_VERSION='2', FSDP_AUTO_WRAP_POLICY='TRANSFORMER_BASED_WRAP')


def product(families):
    "All cells of some families."
    return [Cell(*choices) for choices in itertools.product(families, *OPTIONS.values())]


def met(cells):
    "How often each two choices of two options meet in some cells."
    return collections.Counter(two for cell in cells for two in itertools.combinations(cell.choices, 2))


def refusals(choices):
    "What the table of refusals says about choices, all of them or the first few."
    return [text for refused, text in REFUSED if refused.items() <= choices.items()]


def pairs(families, options=OPTIONS, refused=True):
    """Few cells, in which each two choices of two options meet once at least, and none much more often than others;
    without `refused` those two that are not refused, in cells that are not."""
    from allpairspy import AllPairs
    names = [field.name for field in dataclasses.fields(Cell)]

    def wanted(choices):
        return refused or not refusals(dict(zip(names, choices)))
    cells = [Cell(*choices) for choices in AllPairs([list(families), *options.values()], filter_func=wanted)]
    all_pairs = met(cells).keys()

    def unevenness(cells):
        pairs_met = met(cells)
        return sum(n*n for n in pairs_met.values()) if pairs_met.keys() == all_pairs else math.inf

    for i in range(len(cells)):  # the array's last cells are much alike: a choice that no pair rests on may be another
        for name, choices in options.items():
            others = [dataclasses.replace(cells[i], **{name: choice}) for choice in choices]
            others = [other for other in others if wanted(dataclasses.astuple(other))]
            cells[i] = min(others, key=lambda other: unevenness(cells[:i] + [other] + cells[i+1:]))
    return cells


def promised(cell):
    "The text that a cell's refusal must have, or None where it must not be refused."
    return next(iter(refusals(dataclasses.asdict(cell))), None)


# ---- what the runs are made of ----

def make_tokenizer():
    "The tokenizer of the other tests: bytes in pairs, 600 tokens."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=['<s>', '</s>'], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([alpaca_ft.create_prompt(r) for r in alpaca_ft.load_alpaca()['train']], trainer)
    special = dict(bos_token='<s>', eos_token='</s>', pad_token='</s>')
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_rows(folder):
    "14 rows to train on, 4 to evaluate on: short, so that packed rows are shared, and some longer than windows."
    rows = sorted(alpaca_ft.load_alpaca()['train'], key=lambda r: len(r['instruction'] + r['input'] + r['output']))
    test = rows[3:16:4]
    train = [r for r in rows[:15] if r not in test] + rows[30:32]
    for name, some in dict(train=train, test=test).items():
        (folder/f'{name}.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in some))


def make_parts(folder, families):
    "The rows, and each family as a model folder, with a new and with an old generation config."
    make_rows(folder)
    tokenizer = make_tokenizer()
    old_config = TOKENS | dict(temperature=0.9, top_p=0.6, transformers_version='4.31.0')
    for name in families:
        new = folder/'models'/name/'new'
        old = folder/'models'/name/'old'
        (FAMILIES | MORE)[name]().save_pretrained(new)
        tokenizer.save_pretrained(new)
        shutil.copytree(new, old)
        (old/'generation_config.json').write_text(json.dumps(old_config))


def packed_rows(folder, family):
    "The packed rows of training and evaluation, as a run makes them."
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder/'models'/family/'new')
    rows = {}
    for name in ('train', 'test'):
        tokenized = alpaca_ft.tokenize(alpaca_ft.load_alpaca(folder/f'{name}.jsonl')['train'], tokenizer)
        rows[name] = list(alpaca_ft.pack(tokenized, SEQ_LEN)[0])
    return rows['train'], rows['test']


# ---- the oracle: the same training, as plain as can be ----

def decoder_layers(model):
    "The list of a model's layers, where its family has it."
    for path in ('model.layers', 'model.language_model.layers', 'model.decoder.layers', 'transformer.h',
                 'gpt_neox.layers'):
        try:
            return model.get_submodule(path)
        except AttributeError:
            pass
    for module in model.modules():  # of other families, see families.py
        if isinstance(module, torch.nn.ModuleList) and len(module) == SHAPE['num_hidden_layers']:
            return module
    raise AssertionError(f'{type(model).__name__}: add the path of its layers here')


def add_lora(model):
    "LoRA on every linear module of the last layers, by peft."
    from peft import LoraConfig
    layers = set(decoder_layers(model)[N_FREEZE:].modules())
    conv1d = transformers.pytorch_utils.Conv1D
    names = [name for name, m in model.named_modules() if m in layers and isinstance(m, (torch.nn.Linear, conv1d))
             and 'Router' not in type(m).__name__]  # Llama 4's is a linear module that returns two tensors
    # peft takes some names for the experts of all layers
    names = [name for name in names if not alpaca_ft.model.goes_to_experts(model, name.rpartition('.')[2])]
    conv = isinstance(model.get_submodule(names[0]), conv1d)
    torch.manual_seed(SEED)
    model.add_adapter(LoraConfig(r=16, lora_alpha=32, target_modules=names, task_type='CAUSAL_LM', fan_in_fan_out=conv))


def frozen_model(folder, family, dtype, choice):
    "The family's model, where it trains with a head of its own; and what trains: names and parameters."
    model = transformers.AutoModelForCausalLM.from_pretrained(folder/'models'/family/'new').eval()
    head, layers = model.get_output_embeddings(), decoder_layers(model)
    model.requires_grad_(False)
    if choice in ('freeze', 'rotate'):
        if head.weight is model.get_input_embeddings().weight:
            head.weight = torch.nn.Parameter(head.weight.detach().clone())
        for module in (head, *layers[N_FREEZE:]):
            module.requires_grad_(True)
    if choice == 'middle':
        layers[1:3].requires_grad_(True)
    if choice == 'lora':
        add_lora(model)
    if dtype == 'bf16':
        for p in model.parameters():
            if not p.requires_grad:
                p.data = p.data.to(torch.bfloat16)
    if dtype == 'fp64':
        model.double()
    return model, {name: p for name, p in model.named_parameters() if p.requires_grad}


def documents(row):
    "The documents of a packed row: token ids, and which of them are of the response."
    start = 0
    for length in row['seq_lengths']:
        here = slice(start, start + length)
        yield torch.tensor(row['input_ids'][here]), torch.tensor(row['completion_mask'][here]) == 1
        start += length


def token_losses(model, row, dtype):
    "The losses of a packed row's tokens but the first of each document, each run alone; which are of the response."
    losses, of_response = [], []
    for ids, response in documents(row):
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == 'bf16'):
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
        exact = logits[:-1].double() if dtype == 'fp64' else logits[:-1].float()
        losses.append(F.cross_entropy(exact, ids[1:], reduction='none'))
        of_response.append(response[1:])
    return torch.cat(losses), torch.cat(of_response)


def loss_and_tokens(model, row, on, dtype):
    "The sum of a packed row's token losses, and the number of them."
    losses, response = token_losses(model, row, dtype)
    if on == 'response':
        losses = losses[response]
    return losses.sum(), len(losses)


@torch.no_grad()
def mean_losses(model, rows, dtype):
    "The mean loss of the tokens of many packed rows: of all, and of those of responses."
    found = [token_losses(model, row, dtype) for row in rows]
    losses, response = (torch.cat(parts) for parts in zip(*found))
    return [losses.mean().item(), losses[response].mean().item()]


def mean_loss(model, rows, on, dtype):
    "One of the two."
    return mean_losses(model, rows, dtype)[on == 'response']


def evaluated(n_steps):
    "The steps after which a run of so many is evaluated."
    return sorted({0, n_steps, *range(EVAL_EVERY, n_steps, EVAL_EVERY)})


def size(tensors):
    "The norm of all numbers of some tensors together."
    return math.sqrt(sum(t.detach().double().square().sum().item() for t in tensors))


def let_one_train(layers, step, optimizer):
    "One of the layers trains in a step, another after each two; the optimizer forgets the others."
    order = torch.randperm(len(layers), generator=torch.Generator().manual_seed(SEED + step//ROTATE_EVERY)).tolist()
    for i, layer in enumerate(layers):
        for p in layer.parameters():
            p.requires_grad_(i == order[0])
            if i != order[0]:
                optimizer.state.pop(p, None)


def train_plainly(folder, family, on, dtype, choice):
    "What a run must find: losses and norms of the steps, held-out losses around them, what trains, what moved."
    train, test = packed_rows(folder, family)
    model, trained = frozen_model(folder, family, dtype, choice)
    before = {name: p.detach().clone() for name, p in trained.items()}
    order = []  # the rows of each step
    for epoch in range(EPOCHS):
        numbers = torch.randperm(len(train), generator=torch.Generator().manual_seed(SEED + epoch)).tolist()
        order += [numbers[i:i + BATCH_SIZE] for i in range(0, len(numbers), BATCH_SIZE)]
    optimizer = torch.optim.AdamW(trained.values(), lr=LR, weight_decay=0.)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, round(len(order)*WARMUP), len(order))
    losses, norms, held_out = [], [], {}

    def evaluate(step):
        "Where a run is evaluated."
        if step in evaluated(len(order)):
            held_out[step] = mean_losses(model, test, dtype)

    for step, numbers in enumerate(order):
        if choice == 'rotate':
            let_one_train(decoder_layers(model)[N_FREEZE:], step, optimizer)
        evaluate(step)
        sums = [loss_and_tokens(model, train[i], on, dtype) for i in numbers]
        loss = sum(loss for loss, n in sums)/sum(n for loss, n in sums)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained.values(), 1.).item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    evaluate(len(order))
    moved = [name for name, p in trained.items() if not torch.equal(p, before[name])]
    return dict(losses=losses, norms=norms, held_out=list(held_out.values()), size=size(trained.values()),
                trained=list(trained), moved=moved)


def oracle(folder, cell):
    "`train_plainly` for a cell, computed once: no option but these four may change the result."
    path = folder/f'oracle-{cell.family}-{cell.loss}-{cell.dtype}-{cell.choice}.json'
    if not path.exists():
        found = train_plainly(folder, cell.family, cell.loss, cell.dtype, cell.choice)
        part = path.with_suffix(f'.{os.getpid()}')
        part.write_text(json.dumps(found))
        part.rename(path)
    return json.loads(path.read_text())


def exacter_oracle(folder, cell):
    "The oracle in the precision of EXACTER; the cell's own where a product of it has no fp64."
    exacter = dataclasses.replace(cell, dtype=EXACTER[cell.dtype])
    try:
        return oracle(folder, exacter)
    except RuntimeError:
        if exacter.dtype != 'fp64':
            raise
        return oracle(folder, cell)


# ---- the run of a cell ----

def choice_options(cell):
    "The options of what trains."
    if cell.choice == 'middle':
        return dict(layers='1-2', train_head=False)
    if cell.choice == 'rotate':
        return dict(n_freeze=N_FREEZE, rotate=1, rotate_every=ROTATE_EVERY)
    return dict(n_freeze=N_FREEZE, method=cell.choice)


def run_config(folder, cell, resume=False):
    "The cell's options as the package wants them; the run folder is `run` in the working directory."
    return alpaca_ft.RunConfig(
        model=str(folder/'models'/cell.family/cell.generation),
        data=str(folder/'train.jsonl'),
        eval_data=str(folder/'test.jsonl'),
        out='run',
        **choice_options(cell),
        seq_len=SEQ_LEN,
        batch_size=BATCH_SIZE,
        micro_batch_size=cell.micro,
        epochs=EPOCHS,
        lr=LR,
        warmup=WARMUP,
        loss_on=cell.loss,
        eval_every=EVAL_EVERY,
        n_samples=1,
        max_new_tokens=4,
        dtype=cell.dtype,
        activation_checkpointing=bool(cell.ac),
        prefix_cache=cell.prefix,
        save_every=SAVE_EVERY if cell.killed else None,
        resume=resume,
        seed=SEED)


def kill_at(step):
    "Have this process killed before an optimizer step."
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.optim.optimizer import register_optimizer_step_pre_hook
    steps = itertools.count(1)

    def before_step(optimizer, args, kwargs):
        weight = optimizer.param_groups[0]['params'][0]
        if not isinstance(weight, FakeTensor) and next(steps) == step:  # memory is counted on tensors without contents
            os.kill(os.getpid(), signal.SIGKILL)
    register_optimizer_step_pre_hook(before_step)


def train_in_all(folder, cell, resume=False):
    "Train in the cell's number of processes: this one is the first, and the others are its children."
    port = several.free_port()
    os.environ |= FSDP if cell.spread else {}

    def other(number):
        several.member(number, cell.processes, port)
        if cell.killed and not resume:
            kill_at(KILLED_AT)
        try:
            alpaca_ft.train(run_config(folder, cell, resume))
        except alpaca_ft.Refused:
            return 3
    others = [fork(functools.partial(other, number)) for number in range(1, cell.processes)]
    if others:
        several.member(0, cell.processes, port)
    run = alpaca_ft.train(run_config(folder, cell, resume))
    for pid in others:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code:
            raise RuntimeError(f'another process ended with exit code {code}')
    return run


def killed_run(folder, cell):
    "Run a cell in a child that is killed. Where the run ends before, by a refusal or an error, that is raised here."
    report = Path('..').resolve()/'killed.txt'

    def work():
        kill_at(KILLED_AT)
        try:
            train_in_all(folder, cell)
            report.write_text('the run that was to be killed ended by itself')
        except alpaca_ft.Refused as e:
            report.write_text(str(e))
            return 3
        except Exception as e:
            report.write_text(first_line(e))
            raise
    code = os.waitstatus_to_exitcode(os.waitpid(fork(work), 0)[1])
    if code == 3:
        raise alpaca_ft.Refused(report.read_text())
    if code != -signal.SIGKILL:
        ended = f'the run that was to be killed ended with exit code {code}'
        raise RuntimeError(report.read_text() if report.exists() else ended)


def first_line(error):
    "The kind of an exception and what it says first."
    return f'{type(error).__name__}: {(str(error).strip().splitlines() or [""])[0]}'


def try_cell(folder, cell):
    "Run a cell in the working directory: ('ended', ''), ('refused', the line) or ('FAILED', what is wrong)."
    text = promised(cell)
    before = set(os.listdir())
    resume = False
    try:
        if cell.killed:
            killed_run(folder, cell)
            resume = True
        run = train_in_all(folder, cell, resume)
    except alpaca_ft.Refused as e:
        left = sorted(set(os.listdir()) - before)
        problems = []
        if text is None:
            problems.append('refused')
        elif text not in str(e):
            problems.append(f'refused without the words {text!r}')
        if resume:
            problems.append('not resumed')
        if '\n' in str(e):
            problems.append('refused in more than one line')
        if left and not resume:
            problems.append(f'refused, and left {", ".join(left)}')
        return ('FAILED', f'{"; ".join(problems)}: {e}') if problems else ('refused', str(e))
    if text is not None:
        return 'FAILED', f'ended, but a refusal was promised: {text}'
    right, exact = oracle(folder, cell), exacter_oracle(folder, cell)
    problems = compare_losses(right, exact, cell) + compare_models(folder, right, exact, cell, run)
    return ('FAILED', '; '.join(problems)) if problems else ('ended', '')


# ---- what must be true at the end of a run ----

def furthest(found, right):
    "By how much two lists differ, relative to the second, and at which place; what is no number is furthest of all."
    differences = []
    for a, b in zip(found, right):
        is_number = isinstance(a, float) and math.isfinite(a)
        differences.append(abs(a - b)/abs(b) if is_number else math.inf)
    place = max(range(len(differences)), key=differences.__getitem__)
    return differences[place], place


def precision(cell):
    "The key of LOSS, NORM and SIZE for a cell."
    if cell.dtype == 'fp32':
        return 'fp32'
    return 'experts' if cell.family in WITH_EXPERTS else 'bf16'


def allowed(fixed, found, exact):
    """A bound, or twice what rounding does to the oracle itself, where that is more; `exact` is the oracle in the
    precision of EXACTER."""
    return max(fixed, 2*furthest(found, exact)[0])


def compare_losses(right, exact, cell):
    "The lines of metrics.jsonl against the oracle: lines about what differs."
    lines = [json.loads(line) for line in Path('run/metrics.jsonl').read_text().splitlines()]
    steps = [line for line in lines if 'loss' in line]
    evaluations = [line for line in lines if 'eval_loss' in line]
    n = len(right['losses'])
    places = evaluated(n)
    bound = precision(cell)
    kink = cell.family == 'opt' and cell.dtype == 'fp32' and cell.choice != 'freeze'
    problems = []
    if [line['step'] for line in steps] != list(range(1, n + 1)):
        return [f'steps {[line["step"] for line in steps]}, not 1 to {n}']
    if [line['step'] for line in evaluations] != places:
        return [f'evaluations after steps {[line["step"] for line in evaluations]}, not {places}']

    def held_out(oracle, k):
        return [losses[k] for losses in oracle['held_out']]

    compared = [('loss', steps, right['losses'], exact['losses'], LOSS[bound]),
                ('grad_norm', steps, right['norms'], exact['norms'], NORM['relu' if kink else bound]),
                ('eval_loss', evaluations, held_out(right, 0), held_out(exact, 0), LOSS[bound]),
                ('eval_response_loss', evaluations, held_out(right, 1), held_out(exact, 1), LOSS[bound])]
    for name, lines, expected, in_fp32, fixed in compared:
        limit = allowed(fixed, expected, in_fp32)
        difference, i = furthest([line.get(name) for line in lines], expected)
        print(f'{name}: differs by {difference:.2g} at most')
        if not difference <= limit:
            problems.append(f'{name} of step {lines[i]["step"]} is {lines[i].get(name)}, not {expected[i]:.7g}')
    samples = Path('run/samples.jsonl').read_text().splitlines()
    if len(samples) != len(places):
        problems.append(f'{len(samples)} samples, not {len(places)}')
    return problems


def some(names):
    "A few names of many."
    names = sorted(names)
    return ', '.join(names[:3]) + f' and {len(names) - 3} more'*(len(names) > 3)


def compare_models(folder, right, exact, cell, run):
    "The run's model in memory and on the disk against the model that it began with: lines about what is wrong."
    from_pretrained = transformers.AutoModelForCausalLM.from_pretrained
    began = from_pretrained(folder/'models'/cell.family/'new', dtype=torch.float32)
    if cell.choice == 'lora':
        add_lora(began)
    began = began.state_dict()
    saved_model = from_pretrained('run/model').eval()
    saved, memory = saved_model.state_dict(), run.model.cpu().state_dict()
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    kept = torch.bfloat16 if cell.dtype == 'bf16' else torch.float32  # the precision of what is frozen
    problems = []

    def wrong(what, names):
        if names:
            problems.append(f'{what}: {some(names)}')

    wrong('trains, or does not, unlike in the oracle', trained ^ set(right['trained']))
    wrong('in the model or in RUN/model only', began.keys() ^ saved.keys())
    names = began.keys() & saved.keys() & memory.keys()
    trained &= names
    tensors = [memory[k].data_ptr() for k in trained]
    frozen = {k for k in names - trained if memory[k].data_ptr() not in tensors}  # one may have a second name (Zamba 2)
    for where, tensors in (('in memory', memory), ('in RUN/model', saved)):
        wrong(f'trained, but not fp32 {where}', {k for k in trained if tensors[k].dtype != torch.float32})
        same = {k for k in frozen if torch.equal(tensors[k].to(kept), began[k].to(kept))}
        wrong(f'frozen, but changed {where}', frozen - same)
    wrong('trained, but did not move', {k for k in trained & set(right['moved']) if torch.equal(saved[k], began[k])})
    difference, _ = furthest([size(p for p in run.model.parameters() if p.requires_grad)], [right['size']])
    limit = allowed(SIZE[precision(cell)], [right['size']], [exact['size']])
    print(f'size: differs by {difference:.2g}, at most {limit:.2g}')
    if not difference <= limit:
        problems.append(f'the norm of the trained weights differs by {difference:.2g} of it')
    wrong('trained, but not in RUN/model as in memory', {k for k in trained if not torch.equal(saved[k], memory[k])})
    for name, p in saved_model.named_parameters():
        if name in frozen:  # the base model of an adapter has not lost what was rounded away in the run
            p.data = p.data.to(kept)
    return problems + compare_logits(saved_model, run.model)


def compare_logits(saved, memory):
    "The run's model on the disk against that in memory, both in fp32: a line, if they differ."
    ids = torch.arange(2, 102)[None]
    with torch.no_grad():
        a = saved.float()(input_ids=ids, use_cache=False).logits
        b = memory.float().eval()(input_ids=ids, use_cache=False).logits
    if torch.equal(a, b):
        return []
    return [f'RUN/model is not the model in memory: logits differ by {(a - b).abs().max():.2g}']


# ---- children ----

def fork(work):
    "Run a function in a forked child, which ends when LIMIT is over; its process id."
    pid = os.fork()
    if pid:
        return pid
    code = 1
    gc.freeze()  # what was there before need not be looked through, nor copied
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(LIMIT)
        torch.set_num_threads(1)  # PyTorch's thread pool is new after a fork; threads would race for it
        code = work() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def begin(folder, cell):
    "Try a cell in a child of its own, in a new folder with a log; the process id."
    place = folder/'cells'/cell.id
    place.mkdir(parents=True)

    def work():
        log = open(place/'log', 'w', buffering=1)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout = sys.stderr = log
        (place/'work').mkdir()
        os.chdir(place/'work')
        os.environ |= dict(ALPACA_FT_CACHE=str(place/'cache'), TOKENIZERS_PARALLELISM='false')
        torch.set_num_threads(1)
        alpaca_ft.report.render = lambda *args, **kw: 'not drawn'  # drawings would take longer than all the rest
        try:
            result = try_cell(folder, cell)
        except Exception as e:
            traceback.print_exc()
            result = 'FAILED', first_line(e)
        (place/'result.json').write_text(json.dumps(result))
    return fork(work)


def result(folder, cell, status):
    "How a cell's child ended: (outcome, words, log). Its folder is removed."
    place = folder/'cells'/cell.id
    path = place/'result.json'
    if path.exists():
        outcome, words = json.loads(path.read_text())
    else:
        outcome, words = 'FAILED', f'the process ended with exit code {os.waitstatus_to_exitcode(status)}'
    log = (place/'log').read_text() if (place/'log').exists() else ''
    shutil.rmtree(place)
    return outcome, words, log


def one(folder, cell):
    "Try a cell, and wait: (outcome, words, log)."
    return result(folder, cell, os.waitpid(begin(folder, cell), 0)[1])


def warm_up():
    "Import what runs import, so that the children need not."
    import accelerate, datasets, safetensors.torch, trl, yaml  # noqa
    for module in pkgutil.iter_modules(alpaca_ft.__path__):
        if module.name != '__main__':
            importlib.import_module(f'alpaca_ft.{module.name}')
    trl.SFTTrainer  # its module is imported at the first use


def main(argv=None):
    "Try cells and print how each of them ends."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--workers', type=int, default=2, help='cells tried at once')
    parser.add_argument('--only', default='', metavar='REGEX', help='the cells whose name this finds')
    parser.add_argument('--pairs', action='store_true', help='each pair of choices once at least, not the product')
    parser.add_argument('--more', action='store_true', help='the families of the table MORE too')
    parser.add_argument('--two', action='store_true', help='in two processes, DDP and FSDP2: the table TWO, and each '
                                                           'pair of choices once at least')
    parser.add_argument('--logs', type=Path, metavar='FOLDER', help='keep there what failed cells printed')
    args = parser.parse_args(argv)
    families = list(FAMILIES | MORE) if args.more else list(FAMILIES)
    if args.two:
        cells = TWO + pairs(families, IN_TWO, refused=False)
    else:
        cells = (pairs if args.pairs else product)(families)
    cells = [cell for cell in cells if re.search(args.only, str(cell))]
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    warm_up()
    counts = dict(ended=0, refused=0, FAILED=0)
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp).resolve()
        os.waitpid(fork(functools.partial(make_parts, folder, sorted({cell.family for cell in cells}))), 0)
        todo, busy = cells[::-1], {}
        while todo or busy:
            while todo and len(busy) < args.workers:
                cell = todo.pop()
                busy[begin(folder, cell)] = cell, time.time()
            pid, status = os.wait()
            cell, began = busy.pop(pid)
            outcome, words, log = result(folder, cell, status)
            counts[outcome] += 1
            print(f'{cell}  {outcome}{": " if words else ""}{words} {time.time() - began:.1f} s', flush=True)
            if outcome == 'FAILED' and args.logs:
                args.logs.mkdir(parents=True, exist_ok=True)
                (args.logs/f'{cell.id}.log').write_text(log)
    ended, refused, failed = counts.values()
    print(f'{len(cells)} cells: {ended} ended, {refused} refused as promised, {failed} failed')
    return 1 if counts['FAILED'] else 0


if __name__ == '__main__':
    sys.exit(main())
