"The memory of a step, counted without contents: to the byte what real tensors take."
import pytest
import torch

from alpaca_ft import RunConfig
from alpaca_ft.data import Refused
from alpaca_ft.memory import as_bytes, fit_lines, fitting, memory_plan, memory_table, moments, twin, worst
from alpaca_ft.model import Place, apply_choice, resolve_choice

CPU = torch.device('cpu')


def model_of(kind):
    import transformers
    shape = dict(vocab_size=608, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
    config = dict(llama=lambda: transformers.LlamaConfig(**shape, num_key_value_heads=2),
                  tied=lambda: transformers.LlamaConfig(**shape, tie_word_embeddings=True),
                  qwen2=lambda: transformers.Qwen2Config(**shape, num_key_value_heads=2),
                  neox=lambda: transformers.GPTNeoXConfig(**shape, attention_dropout=0., hidden_dropout=0.))
    config['neo'] = lambda: transformers.GPTNeoConfig(
        vocab_size=608, hidden_size=32, num_layers=4, num_heads=4, max_position_embeddings=512, window_size=64,
        attention_types=[[['global', 'local'], 2]], bos_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config[kind]())


@pytest.mark.parametrize('kind', ['llama', 'tied', 'qwen2', 'neox'])
@pytest.mark.parametrize('options',
                         [dict(n_freeze=2), dict(n_freeze=0, method='lora', activation_checkpointing=True),
                          dict(method='full', batch_size=2),
                                     dict(n_freeze=1, rotate=1, batch_size=4, micro_batch_size=2)],
                         ids=lambda o: '-'.join(o))
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['fp32', 'bf16'])
def test_counted_is_real(kind, options, dtype):
    cfg = RunConfig(seq_len=64, **options)
    model = model_of(kind)
    choice = resolve_choice(cfg, model)
    apply_choice(model, choice, dtype)
    for first in {0, choice.first}:
        counted, real = moments(cfg, model, first), moments(cfg, twin(model, 'cpu'), first, real=True)
        # torch 2.13 calls the two numbers that a layer norm keeps of a token bf16; they are fp32
        if kind == 'neox' and dtype == torch.bfloat16:
            step, found = counted['a training step'], real['a training step']
            norms, rest = divmod(found['activations'] - step['activations'], 4*64*cfg.micro_batch_size)
            assert rest == 0 and 0 <= norms <= 9  # two a layer and the last one
            step['activations'] = found['activations']
        assert counted == real


@pytest.mark.parametrize('text', ['24', 'much', '-1GB', '0GB', 'GB', '24 GBit', '', '1e3GB'])
def test_no_size(text):
    with pytest.raises(Refused, match='as in 24GB or 22.5GiB'):
        as_bytes(text)


def test_fitting():
    "What is named takes what is said, fits, and leaves the rest of the options as it is; lines fit a terminal."
    shape, place, cfg = twin(model_of('llama'), 'meta'), Place(CPU, torch.float32), RunConfig(n_freeze=0, seq_len=128,
            batch_size=4, micro_batch_size=4)
    sums, by = memory_plan(cfg, shape, place)
    now = max(sums.values())
    assert sum(by.values()) == sums['a training step']
    for part in (0.5, 0.01):
        found = fitting(cfg, shape, place, int(part*now))
        assert found and all(worst(cfg, changes, shape, place) == n for changes, n, _ in found)
        assert all(n <= part*now for _, n, _ in found) or part == 0.01 and len(found) == 1
        lines = fit_lines(found, now, int(part*now)) + memory_table(sums, by, place)
        assert all(len(line) <= 80 for line in lines)
    assert 'nothing that was tried fits' in '\n'.join(fit_lines(found, now, int(part*now)))


def test_every_way_is_counted():
    "Also those of a GPU, and documents in rows of their own."
    from alpaca_ft.memory import planned
    from alpaca_ft.speed import ALONE, MASKED, Step, by_own_mask
    shape, cfg = twin(model_of('llama'), 'meta'), RunConfig(n_freeze=2, seq_len=64)
    choice = resolve_choice(cfg, shape)
    for step in (Step(), Step(MASKED), Step(ALONE), Step(by_own_mask(shape.config))):
        assert planned(cfg, shape, Place(CPU, torch.float32), choice, step=step, keep='off')[2] is None


def test_what_cannot_be_counted():
    "An attention whose package is not there, and a model that cannot be cut: a formula, or nothing, and no error."
    from alpaca_ft.memory import planned
    from alpaca_ft.speed import FLASH, Step
    cfg, place = RunConfig(n_freeze=2, seq_len=64), Place(CPU, torch.float32)
    shape = twin(model_of('llama'), 'meta')
    choice = resolve_choice(cfg, shape)
    assert planned(cfg, shape, place, choice, step=Step(FLASH), keep='off')[2]
    neo = twin(model_of('neo'), 'meta')
    assert worst(cfg, {}, neo, place) is None and worst(cfg, {}, neo, place, keep='off') > 0
    assert fitting(cfg, neo, place, 10**6) is not None
    assert fitting(cfg, neo, place, 10**6, keep='off', large=False)


def test_check_of_a_model_that_cannot_be_cut(here, rows, tokenizer, command):
    "It is told what would fit, as any other."
    model_of('neo').save_pretrained(here/'neo')
    tokenizer.save_pretrained(here/'neo')
    code, out, err = command('check', '--model', 'neo', '--data', rows, '--n-freeze', 2, '--seq-len', 128, '--memory',
                             '20MB')
    assert code == 0 and 'too much for' in out and not out.rstrip().endswith('the least:'), err


def test_experts_are_no_noise(here, rows, tokenizer, command, caplog):
    "What cannot be counted without contents is said in a line and not logged; what bf16 does not reach is said too."
    import matrix
    matrix.MORE['qwen3-moe']().save_pretrained(here/'moe')
    tokenizer.save_pretrained(here/'moe')
    kw = ['--data', rows, '--n-freeze', 2, '--seq-len', 256, '--dtype', 'bf16']
    code, out, err = command('check', '--model', 'moe', *kw)
    assert code == 0 and 'Traceback' not in err and 'fake_tensor' not in err, err
    assert not [r for r in caplog.records if 'fake_tensor' in r.name]
    assert '--train-dtype bf16' in out and 'experts' in out
    code, out, err = command('check', '--model', 'moe', *kw, '--train-dtype', 'bf16')
    assert code == 0 and '--train-dtype bf16 computes' not in out


def test_advice_names_the_states():
    "After memory ran out: what no longer keeps the states in memory helps most, if they are large."
    from alpaca_ft.memory import counted_advice
    from alpaca_ft.speed import Step
    shape, place, cfg = twin(model_of('llama'), 'meta'), Place(CPU, torch.float32), RunConfig(n_freeze=2, seq_len=64)
    known = dict(step=Step(), states=3*10**9, process=0, large=False)
    says = counted_advice(cfg, shape, place, keep='memory', **known)
    best, *_ = says.partition('what helps most: ')[2].split(', --')
    assert best.startswith('--prefix-cache disk (2.79 GiB less') or best.startswith('--layer-by-layer (2.79'), says
    assert '--prefix-cache disk (2.79 GiB less' in says
    says = counted_advice(cfg, shape, place, keep='off', **known)
    assert '--prefix-cache' not in says and '--layer-by-layer' not in says


def test_fitting_with_spectrum():
    "The choice that was made by the weights is taken along, for a shape has none to choose by."
    cfg = RunConfig(layers='spectrum:0.25', seq_len=64)
    model, place = model_of('llama'), Place(CPU, torch.float32)
    choice = resolve_choice(cfg, model)
    found = fitting(cfg, twin(model, 'meta'), place, 10**5, choice)
    assert found and found[0][1] > 10**5
    lines = fit_lines([], 10**9, 10**6)
    assert 'the least:' not in lines[-1] and '--micro-batch-size' in '\n'.join(lines)
    assert all(len(line) <= 80 for line in lines)


def test_a_slow_scan_is_not_waited_for():
    "A model that goes through rows token by token: whatever the row's length, a formula after a second or two."
    import matrix
    from alpaca_ft.memory import TOO_LONG, planned
    from alpaca_ft.speed import ALONE, Step
    options = dict(vocab_size=608, hidden_size=32, num_hidden_layers=2, state_size=8)
    shape = twin(matrix.model_of('MambaConfig', options), 'meta')
    for seq_len in (512, 4096):
        cfg = RunConfig(n_freeze=1, seq_len=seq_len)
        choice = resolve_choice(cfg, shape)
        assert planned(cfg, shape, Place(CPU, torch.float32), choice, step=Step(ALONE), keep='off')[2] == TOO_LONG
