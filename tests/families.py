"""Every causal language model that transformers knows, as a tiny random model, through two cells of the matrix.

What the libraries lack: they test the models that they list. Here the list is transformers' own, so that a family which
nobody has thought of is met as well. Each must end as matrix.py asks for, or be refused in one line that leaves nothing
behind. A family whose config cannot be made small by the names below is listed as not made.

usage: python tests/families.py [--out RESULT.json] [--only REGEX] [--cells AB]
       (stopped, it goes on by the same command; about three quarters of an hour on one core)

cell A: the last layers and the head, states kept where that goes, loss on responses, two packed rows at once, fp32
cell B: LoRA, states kept where that goes, activation checkpointing, loss on all, bf16, killed and resumed
Exit code 0 if no cell failed.
"""
import argparse
import functools
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import matrix

LARGEST = 3e7  # parameters of a model that counts as tiny
CELLS = dict(A=('auto', 0, 'response', 2, 'fp32', False, 'new', 'freeze'),
             B=('auto', 1, 'all', 1, 'bf16', True, 'new', 'lora'))  # the choices of a matrix.Cell behind its family
SMALL = {
    608: 'vocab_size vocab_size_per_layer_input',
    32: 'hidden_size d_model n_embd word_embed_proj_dim embedding_size lru_width moe_intermediate_size '
        'shared_expert_intermediate_size expert_ffn_hidden_size conv_dim',
    64: 'intermediate_size ffn_dim ffn_hidden_size d_ff decoder_ffn_dim sliding_window attention_window block_ff_dim',
    16: 'q_lora_rank kv_lora_rank',
    8: 'qk_rope_head_dim qk_nope_head_dim v_head_dim query_pre_attn_scalar state_size mamba_d_state mamba_n_heads '
       'mamba_d_head linear_key_head_dim linear_value_head_dim hidden_size_per_layer_input',
    4: 'num_hidden_layers num_layers n_layer n_layers decoder_layers num_attention_heads n_head n_heads num_heads '
       'decoder_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts rotary_dim '
       'linear_num_value_heads mamba_dt_rank time_step_rank',
    2: 'num_key_value_heads num_experts_per_tok moe_topk moe_k linear_num_key_heads max_window_layers',
    1: 'n_shared_experts num_shared_experts first_k_dense_replace num_dense_layers n_group topk_group eos_token_id '
       'pad_token_id',
    0: 'bos_token_id num_kv_shared_layers',
    512: 'max_position_embeddings n_positions context_length seq_length max_seq_len',
}  # value: names of a config that get it, where the config has them
HYBRID = dict(layer_types=['mamba', 'attention']*2)  # half of the layers attend
SPECIAL = {
    'bailing_hybrid': dict(layer_group_size=2),
    'bamba': dict(attn_layer_indices=[1, 3]),
    'falcon_h1': dict(mamba_d_ssm=64),
    'gpt_neo': dict(attention_types=[[['global', 'local'], 2]]),
    'granitemoehybrid': HYBRID,
    'jamba': dict(attn_layer_period=2, attn_layer_offset=1),
    'lfm2_moe': dict(layer_types=['conv', 'full_attention']*2),
    'mamba2': dict(head_dim=16),
    'zamba2': dict(layers_block_type=['linear_attention', 'hybrid']*2, hybrid_layer_ids=[1, 3]),
    'zaya': dict(num_experts_per_tok=1),
}  # what else a family needs


def knows(config, key):
    "Whether a config has an option that can be set; one that may differ from layer to layer cannot be asked for."
    if isinstance(rule := getattr(type(config), key, None), property) and rule.fset is None:
        return False
    try:
        return hasattr(config, key)
    except Exception:
        return True


def small_options(default):
    "The options that make a config small: its own, and those of the configs within it."
    options = dict(output_router_logits=False) if knows(default, 'output_router_logits') else {}
    for value, names in SMALL.items():
        options |= {key: value for key in names.split() if knows(default, key)}
    if knows(default, 'kv_lora_rank'):  # keys and values come out of one narrow layer, for all heads
        options['num_key_value_heads'] = 4
    elif knows(default, 'head_dim'):
        options['head_dim'] = 8
    for key, value in default.to_dict().items():
        if any(word in key for word in ('dropout', 'pdrop', 'jitter')) and isinstance(value, float):
            options[key] = 0.
    for key in default.sub_configs:
        if inner := getattr(default, key, None):
            options[key] = small_options(inner) | dict(model_type=inner.model_type)
    return options | SPECIAL.get(default.model_type, {})


def small_config(name):
    "A family's config, made small by the names of SMALL."
    return CONFIG_MAPPING[name](**small_options(CONFIG_MAPPING[name]()))


def small_model(name):
    "A random model of a family, see `matrix.model_of`."
    config = small_config(name)
    with torch.device('meta'):
        n = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
    if n > LARGEST:
        raise ValueError(f'{n/1e6:.0f}M parameters')
    torch.manual_seed(0)
    model = matrix.scaled(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    words = model.get_input_embeddings().weight.data
    rows = words.abs().sum(1) == 0  # EOS, which pads here too: a norm of nothing would make roundings a thousandfold
    words[rows] = torch.randn_like(words[rows])*words.std()
    return model


def has_experts(name):
    "Whether a family's small config names experts."
    return any('expert' in key and value for key, value in small_config(name).to_dict().items())


def made(folder, name):
    "Make a family's model folder in a child, and say what is wrong if it cannot be made."
    path = folder/f'{name}.txt'

    def work():
        try:
            matrix.make_parts(folder, [name])
            path.write_text(str(has_experts(name)))
        except Exception as e:
            path.write_text(matrix.first_line(e)[:200])
            return 3
    pid = matrix.fork(work)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    said = path.read_text() if path.exists() else f'the process ended with exit code {code}'
    if code:
        return said
    if said == 'True':
        matrix.WITH_EXPERTS.append(name)
    return None


def refused_well(words):
    "Whether a cell that the matrix calls failed was only a refusal that it has not promised."
    return words.startswith('refused: ')


def outcome_of(folder, name, letter, logs):
    "How a cell of a family ends: (outcome, words)."
    outcome, words, log = matrix.one(folder, matrix.Cell(name, *CELLS[letter]))
    if refused_well(words):
        return 'refused', words.removeprefix('refused: ').replace(str(folder), 'FOLDER')
    if outcome == 'FAILED' and logs:
        logs.mkdir(parents=True, exist_ok=True)
        (logs/f'{name}-{letter}.log').write_text(log)
    return outcome, words.replace(str(folder), 'FOLDER')


def main(argv=None):
    "Try the families, and print how each cell ends."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, help='keep the outcomes in this file, and go on with it')
    parser.add_argument('--only', default='', metavar='REGEX', help='the families whose name this finds')
    parser.add_argument('--cells', default='AB', help='letters of the cells [AB]')
    parser.add_argument('--logs', type=Path, metavar='FOLDER', help='keep there what failed cells printed')
    args = parser.parse_args(argv)
    found = json.loads(args.out.read_text())['cells'] if args.out and args.out.exists() else {}
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    matrix.warm_up()
    matrix.EXACTER['fp32'] = 'fp64'  # some of these random models round more than those of the matrix
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        todo = [letter for letter in args.cells if f'{name} {letter}' not in found]
        if not re.search(args.only, name) or not todo:
            continue
        matrix.FAMILIES[name] = functools.partial(small_model, name)
        with tempfile.TemporaryDirectory() as tmp:
            folder = Path(tmp).resolve()
            why = made(folder, name)
            for letter in todo:
                outcome = ('not made', why) if why else outcome_of(folder, name, letter, args.logs)
                found[f'{name} {letter}'] = outcome
                print(f'{name} {letter}', *outcome, flush=True)
        if args.out:
            about = dict(transformers=transformers.__version__, torch=torch.__version__, cells=found)
            args.out.write_text(json.dumps(about, indent=0))
    return summary(found)


def summary(found):
    "Print how many cells ended in which way; the exit code."
    counts = {}
    for outcome, _ in found.values():
        counts[outcome] = counts.get(outcome, 0) + 1
    print(', '.join(f'{n} {outcome}' for outcome, n in sorted(counts.items())))
    return 1 if 'FAILED' in counts else 0


if __name__ == '__main__':
    sys.exit(main())
