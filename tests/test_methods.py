"Which parameters train, and how: each choice against a loop in plain PyTorch (and peft), kept states against none."
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import matrix
from alpaca_ft import Refused, RunConfig, load_alpaca, train
from alpaca_ft.model import apply_choice, drawn, resolve_choice

SEQ_LEN, BATCH_SIZE, EPOCHS, LR = 256, 2, 2, 1e-3


@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    "Twenty of the built-in rows as a file: eight steps an epoch."
    path = tmp_path_factory.mktemp('rows')/'rows.jsonl'
    some = load_alpaca()['train'].select(range(20))
    path.write_text(''.join(json.dumps(r) + '\n' for r in some))
    return path


def run_config(model, rows, out, **kw):
    "A short run in fp32."
    common = dict(model=str(model), data=str(rows), out=str(out), n_freeze=2, seq_len=SEQ_LEN, batch_size=BATCH_SIZE,
                  epochs=EPOCHS, n_samples=0, dtype='fp32', lr=LR, eval_every=3)
    if 'layers' in kw or kw.get('method') == 'full':
        common.pop('n_freeze')
    return RunConfig(**common | kw)


def logged(out, *keys):
    "What metrics.jsonl says of some numbers."
    lines = [json.loads(line) for line in Path(out, 'metrics.jsonl').read_text().splitlines()]
    return [(line['step'], key, line[key]) for line in lines for key in keys if key in line]


def losses(out):
    "All losses of a run, training and held out."
    return logged(out, 'loss', 'eval_loss', 'eval_response_loss')


def close(one, other, limit=1e-5):
    "Two lists of losses, step by step."
    assert [line[:2] for line in one] == [line[:2] for line in other] and len(one) > 6
    for a, b in zip(one, other):
        assert abs(a[2] - b[2]) < limit, (a, b)


def plain_losses(model, rows):
    "The losses of a loop in plain PyTorch over packed rows, each document run alone; what requires a gradient trains."
    trained = [p for p in model.parameters() if p.requires_grad]
    order = []
    for epoch in range(EPOCHS):
        numbers = torch.randperm(len(rows), generator=torch.Generator().manual_seed(42 + epoch)).tolist()
        order += [numbers[i:i + BATCH_SIZE] for i in range(0, len(numbers), BATCH_SIZE)]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, round(len(order)*0.1), len(order))
    found = []
    for step, numbers in enumerate(order, 1):
        sums = [matrix.loss_and_tokens(model, rows[i], 'all', 'fp32') for i in numbers]
        loss = sum(loss for loss, n in sums)/sum(n for loss, n in sums)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found.append((step, 'loss', loss.item()))
    return found


def load(folder):
    "A model as plain transformers loads it."
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model):
    "Of a few tokens."
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 102)[None], use_cache=False).logits


@pytest.fixture(scope='module')
def tied(tmp_path_factory, tokenizer):
    "A tiny model whose head is its embedding."
    from conftest import tiny_model
    folder = tmp_path_factory.mktemp('tied')
    tiny_model(tie_word_embeddings=True).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# the head

def test_frozen_head_stays_tied(here, tied, rows):
    """Without --train-head a tied head stays the embedding, and both stay as they were; the layers train as in plain
    PyTorch."""
    run = train(run_config(tied, rows, 'run', train_head=False, prefix_cache='memory'))
    saved, began = load('run/model'), load(tied)
    assert saved.lm_head.weight is saved.model.embed_tokens.weight and saved.config.tie_word_embeddings
    assert torch.equal(saved.lm_head.weight, began.lm_head.weight)
    assert not torch.equal(saved.model.layers[3].mlp.up_proj.weight, began.model.layers[3].mlp.up_proj.weight)
    began.requires_grad_(False)
    began.model.layers[2:].requires_grad_(True)
    close(logged('run', 'loss'), plain_losses(began, list(run.train)))
    assert run.report['trains'] == 'layers 2-3 of 0-3' and run.step.head is not None


def test_frozen_head_gets_no_gradient():
    "And no work is done for one: the same gradient of the states, and none of the weight."
    from alpaca_ft.speed import linear_loss, torch_linear_loss
    torch.manual_seed(0)
    h, w, t = torch.randn(300, 16), torch.randn(500, 16), torch.randint(500, (300,))

    def gradient(head, trains):
        x, weight = h.clone().requires_grad_(), w.clone().requires_grad_(trains)
        loss = head(x, weight, t, 1/300)
        loss.backward()
        assert (weight.grad is not None) == trains
        return loss.item(), x.grad
    for head in (linear_loss, torch_linear_loss):
        (a, one), (b, other) = gradient(head, True), gradient(head, False)
        assert a == b and torch.equal(one, other)


# which layers

@pytest.mark.parametrize('kw', [dict(layers='1-2'), dict(layers='1-2', train_head=False)])
def test_middle_layers(kw, here, tied, rows):
    "Frozen layers above those that train belong to the tail: with kept states the same, and as in plain PyTorch."
    a = train(run_config(tied, rows, 'off', prefix_cache='off', **kw))
    b = train(run_config(tied, rows, 'memory', prefix_cache='memory', **kw))
    close(losses('off'), losses('memory'))
    assert b.trainer.model.tail.n_freeze == 1 and a.trainer.model.tail.n_freeze == 0
    plain = load(tied)
    head = kw.get('train_head', True)
    if head:
        plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.detach().clone())
    plain.requires_grad_(False)
    plain.model.layers[1:3].requires_grad_(True)
    plain.lm_head.requires_grad_(head)
    close(logged('memory', 'loss'), plain_losses(plain, list(a.train)))
    saved, began = load('memory/model'), load(tied)
    for i, layer in enumerate(saved.model.layers):
        was = began.model.layers[i].mlp.up_proj.weight
        assert torch.equal(layer.mlp.up_proj.weight, was) == (i in (0, 3)), i


def test_recomputed_above_the_cut(here, tied, rows):
    "Activation checkpointing takes in the frozen layers above those that train; the losses are the same."
    for name, again in (('kept', False), ('again', True)):
        train(run_config(tied, rows, name, layers='1-2', activation_checkpointing=again))
    close(losses('kept'), losses('again'))


def test_part_and_auto(here, tiny, rows):
    "0.75 and auto freeze three of four layers, as 3 does."
    for name, n_freeze in (('three', 3), ('part', 0.75), ('auto', 'auto')):
        train(run_config(tiny, rows, name, n_freeze=n_freeze, max_steps=2))
    assert losses('three') == losses('part') == losses('auto')


def slow_ratio(weight):
    "The signal-to-noise ratio of a matrix, from its singular values one by one."
    import numpy as np
    w = weight.detach().double().numpy()
    values = np.sqrt(np.clip(np.sort(np.linalg.eigvalsh(w@w.T if w.shape[0] < w.shape[1] else w.T@w))[::-1], 0, None))
    q75, q25 = np.percentile(values, [75, 25])
    sigma, beta = (q75 - q25)/1.349, min(w.shape)/max(w.shape)
    limit = sigma*math.sqrt((1 + math.sqrt(beta))**2)
    signal, noise = 0., 0.
    for s in values:
        if s > limit:
            signal += s
        else:
            noise += s
    return signal/noise/values[0]


def test_spectrum(here, tied, rows):
    "Its matrices are those of a slow computation of our own; the lowest one's layer decides what is kept."
    from alpaca_ft.model import signal_to_noise
    model = load(tied)
    with torch.no_grad():
        for i, scale in enumerate((10., 1., 1., 2.)):  # the ratio falls with the size, so layer 0 is not among them
            for m in model.model.layers[i].modules():
                if isinstance(m, torch.nn.Linear):
                    m.weight *= scale
    model.save_pretrained('model')
    transformers.AutoTokenizer.from_pretrained(tied).save_pretrained('model')
    expected = set()
    for kind in [k for k, m in model.model.layers[0].named_modules() if isinstance(m, torch.nn.Linear)]:
        names = [f'model.layers.{i}.{kind}' for i in range(4)]
        ratios = {k: slow_ratio(model.get_submodule(k).weight) for k in names}
        for k in names:
            assert signal_to_noise(model.get_submodule(k).weight) == pytest.approx(ratios[k], rel=1e-3), k
        expected |= set(sorted(names, key=lambda k: -ratios[k])[:2])
    run = train(run_config('./model', rows, 'run', layers='spectrum:0.5', prefix_cache='memory'))
    assert set(run.choice.matrices) == expected and len(expected) == 14
    lowest = min(int(k.split('.')[2]) for k in expected)
    assert run.choice.first == lowest and run.trainer.model.tail.n_freeze == lowest
    moved = {k for k, p in load('run/model').named_parameters() if not torch.equal(p, model.get_parameter(k))}
    assert moved == {f'{k}.weight' for k in expected} | {'lm_head.weight'}
    train(run_config('./model', rows, 'off', layers='spectrum:0.5', prefix_cache='off'))
    close(losses('run'), losses('off'))


# LoRA

def plain_lora(folder, layers, seed=42, rank=16, alpha=32):
    "A model with LoRA on every linear module of some layers, by plain transformers and peft."
    from peft import LoraConfig
    model = load(folder)
    names = []
    for name, m in model.named_modules():
        found = [i for i in layers if f'.{i}.' in name]
        if found and type(m).__name__ in ('Linear', 'Conv1D'):
            names.append(name)
    conv = type(model.get_submodule(names[0])).__name__ == 'Conv1D'
    torch.manual_seed(seed)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, task_type='CAUSAL_LM',
                                 fan_in_fan_out=conv))
    return model


@pytest.fixture(scope='module')
def gpt2(tmp_path_factory, tokenizer):
    "A tiny GPT-2, whose linear modules are Conv1D."
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('gpt2')
    transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=600, n_embd=32, n_layer=4, n_head=4, n_positions=512, resid_pdrop=0., embd_pdrop=0., attn_pdrop=0.,
        bos_token_id=0, eos_token_id=1)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize('which', ['tied', 'gpt2'])
@pytest.mark.parametrize('n_freeze', [2, 0])
def test_lora(which, n_freeze, request, here, rows):
    "On the tail: kept states, recomputed ones and plain PyTorch with peft on the whole model give the same losses."
    folder = request.getfixturevalue(which)
    a = train(run_config(folder, rows, 'off', method='lora', n_freeze=n_freeze, prefix_cache='off'))
    plain = plain_lora(folder, range(n_freeze, 4))
    close(logged('off', 'loss'), plain_losses(plain, list(a.train)))
    assert all(not p.requires_grad for k, p in a.model.named_parameters() if '.lora_' not in k)
    if not n_freeze:
        return
    b = train(run_config(folder, rows, 'memory', method='lora', prefix_cache='memory'))
    close(losses('off'), losses('memory'))
    assert b.trainer.model.tail.n_freeze == 2 and b.report['trainable'] < b.report['parameters']/4
    assert {p.dtype for p in b.trainer.model.tail.trained().values()} == {torch.float32}


@pytest.mark.parametrize('family', ['deepseek-v3', 'afmoe'])
def test_lora_stays_in_its_layers(family):
    "peft takes the names of shared experts for the experts of all layers: they are left out, and refused by name."
    model = matrix.MORE[family]()
    choice = resolve_choice(RunConfig(method='lora', n_freeze=2), model)
    assert {name.split('.')[2] for name in choice.matrices} == {'2', '3'}
    apply_choice(model, choice, torch.float32)
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {name.split('.')[2] for name in trains} == {'2', '3'}
    assert len(trains) == 2*len(choice.matrices)
    with pytest.raises(Refused, match="peft would add 'up_proj' to the experts of every layer"):
        resolve_choice(RunConfig(method='lora', n_freeze=2, lora_targets='up_proj'), matrix.MORE[family]())


def test_lora_is_drawn_from_the_seed_alone(tiny):
    """Whatever was drawn before, the matrices are the same, and the next random number is the one that it would have
    been."""
    from alpaca_ft.model import apply_choice, load_model, resolve_choice
    drawn = []
    for before, seed in ((0, 1), (7, 1), (0, 2)):
        model = load_model(str(tiny))
        torch.manual_seed(before)
        expected = torch.randn(3)
        torch.manual_seed(before)
        apply_choice(model, resolve_choice(RunConfig(method='lora', n_freeze=2, seed=seed), model), torch.float32)
        assert torch.equal(torch.randn(3), expected)
        drawn.append(model.get_parameter('model.layers.3.mlp.up_proj.lora_A.default.weight'))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize('which', ['tied', 'gpt2'])
def test_adapter(which, request, here, rows):
    "RUN/model is an adapter that plain transformers and peft load; merged by export it is the same model."
    from peft import PeftModel
    from alpaca_ft import export, load_model
    folder = request.getfixturevalue(which)
    run = train(run_config(folder, rows, 'run', method='lora', prefix_cache='memory', lr=1e-2))
    names = {p.name for p in Path('run/model').iterdir()}
    assert {'adapter_config.json', 'adapter_model.safetensors', 'tokenizer.json'} <= names
    assert 'config.json' not in names
    about = json.loads(Path('run/model/adapter_config.json').read_text())
    assert about['base_model_name_or_path'] == str(folder)
    assert about['target_modules'] == sorted(about['target_modules'])
    right = logits(run.model.eval())
    assert (logits(load(folder)) - right).abs().max() > 0.01  # it was trained
    assert torch.equal(logits(load('run/model')), right)
    assert torch.equal(logits(PeftModel.from_pretrained(load(folder), 'run/model')), right)
    assert torch.equal(logits(load_model('run/model')), right)
    assert transformers.AutoTokenizer.from_pretrained('run/model').chat_template
    export('run', 'merged', dtype='fp32')
    merged = load('merged')
    assert not getattr(merged, 'peft_config', None) and (logits(merged) - right).abs().max() < 1e-4
    assert 'LoRA of rank 16 on layers 2-3' in Path('merged/README.md').read_text()


def test_adapter_in_the_commands(here, tied, rows, command):
    "sample, evaluate and report take a run of LoRA like any other; export in bf16 too."
    options = ['--method', 'lora', '--lora-rank', 4, '--lora-targets', 'q_proj,v_proj', '--n-freeze', 2]
    code, out, err = command('train', '--model', tied, '--data', rows, '--seq-len', SEQ_LEN, '--max-steps', 3,
                             '--n-samples', 1, '--max-new-tokens', 4, '--out', 'run', *options)
    assert code == 0 and 'LoRA of rank 4 on layers 2-3 of 0-3 (4 matrices)' in err, err
    for line in (['sample', 'run', '--instruction', 'Name a tree.', '--max-new-tokens', 4],
                 ['evaluate', 'run', '--against', '--n-samples', 1, '--max-new-tokens', 4], ['report', 'run'],
                 ['export', 'run', '--to', 'out'], ['sample', 'out', '--instruction', 'Hi.', '--max-new-tokens', 2]):
        code, out, err = command(*line)
        assert code == 0, (line, err)
    assert load('out').dtype == torch.bfloat16
    assert 'LoRA of rank 4' in Path('run/report.html').read_text()
    code, out, err = command('train', '--model', 'run/model', '--data', rows, '--n-freeze', 2, '--seq-len', SEQ_LEN)
    assert code == 2 and 'an adapter, not a model of its own' in err and len(err.splitlines()) == 1, err
    code, out, err = command('check', '--model', tied, '--data', rows, '--seq-len', SEQ_LEN, *options)
    assert code == 0 and 'trains    LoRA of rank 4' in out, err


def test_adapter_without_its_base(here, tied, rows, command):
    shutil.copytree(tied, 'base')
    train(run_config('./base', rows, 'run', method='lora', max_steps=2))
    shutil.rmtree('base')
    code, out, err = command('sample', 'run', '--instruction', 'Hi.')
    assert code == 2 and 'which is not there' in err and len(err.splitlines()) == 1, err


def test_saving_an_adapter_is_tried_at_the_start(here, tied, rows, monkeypatch):
    from peft import LoraConfig

    def broken(self, *args, **kw):
        raise OSError('no adapter today')
    monkeypatch.setattr(LoraConfig, 'save_pretrained', broken)
    with pytest.raises(Refused, match='could not be saved .no adapter today'):
        train(run_config(tied, rows, 'run', method='lora'))
    assert not Path('run').exists()


@pytest.mark.parametrize('method', ['freeze', 'lora', 'full', 'rotate'])
@pytest.mark.parametrize('cache', ['off', 'memory'])
def test_killed_and_resumed(method, cache, here, tied, rows):
    "Killed before the fourth step, resumed from the second: the same losses and the same files, to the last bit."
    import os
    if method == 'full' and cache == 'memory':
        pytest.skip('nothing is kept where everything trains')
    kw = dict(method=method, prefix_cache=cache, save_every=2)
    if method == 'rotate':
        kw.update(method='freeze', rotate=1, rotate_every=3)
    train(run_config(tied, rows, 'whole', **kw))

    def work():
        matrix.kill_at(4)
        train(run_config(tied, rows, 'killed', **kw))
    code = os.waitstatus_to_exitcode(os.waitpid(matrix.fork(work), 0)[1])
    assert code == -9 and not Path('killed/model').exists()
    train(run_config(tied, rows, 'killed', resume=True, **kw))
    assert losses('killed') == losses('whole')
    for path in Path('whole/model').iterdir():
        assert (Path('killed/model')/path.name).read_bytes() == path.read_bytes(), path.name


def test_resumed_with_as_many_matrices_as_vectors(here, rows, tokenizer):
    "The optimizer's two groups, with weight decay and without, are of one length: seven and seven in a layer here."
    torch.manual_seed(0)
    transformers.StableLmForCausalLM(transformers.StableLmConfig(
        vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, use_qkv_bias=True, bos_token_id=0, eos_token_id=1,
        pad_token_id=1)).save_pretrained('stablelm')
    tokenizer.save_pretrained('stablelm')
    kw = dict(method='full', save_every=2, max_steps=4)
    run = train(run_config('./stablelm', rows, 'whole', **kw))
    assert len({len(group['params']) for group in run.trainer.optimizer.param_groups}) == 1
    shutil.copytree('whole', 'again')
    shutil.rmtree('again/model')
    shutil.rmtree('again/checkpoints/step-4')
    train(run_config('./stablelm', rows, 'again', resume=True, **kw))
    assert losses('again') == losses('whole')
    assert Path('again/model/model.safetensors').read_bytes() == Path('whole/model/model.safetensors').read_bytes()


def test_rotate(here, tied, rows):
    "The optimizer knows of the head and of the layer at work alone; what is saved holds all layers."
    every = 2
    run = train(run_config(tied, rows, 'run', rotate=1, rotate_every=every, save_every=1, keep=100))
    seen = []
    for folder in sorted(Path('run/checkpoints').iterdir(), key=lambda p: int(p.name[5:])):
        names = load_file(folder/'optimizer.safetensors')
        layers = {int(name.split('.')[2]) for name in names if name.startswith('model.layers.')}
        (number,) = drawn((int(folder.name[5:]) - 1)//every, 2, 1, 42)
        assert layers == {2 + number} and any(name.startswith('lm_head.') for name in names)
        trained = {int(name.split('.')[2]) for name in load_file(folder/'weights.safetensors') if '.layers.' in name}
        assert trained == {2, 3}
        seen.append(number)
    assert len(seen) == run.report['steps'] and set(seen) == {0, 1}
    assert '1 of the layers at a time' in run.report['trains']
    m = run.report['memory_bytes']
    counts = m['optimizer'] - 2*m['gradients']  # of steps: a number for each tensor at work
    assert m['gradients'] < m['trained'] == 4*run.report['trainable'] and 0 <= counts <= 4*30


def test_resume_with_another_rank(here, tied, rows, command):
    train(run_config(tied, rows, 'run', method='lora', save_every=2, max_steps=4))
    shutil.rmtree('run/model')
    with pytest.raises(Refused, match='lora_rank was 16 and is 8'):
        train(run_config(tied, rows, 'run', method='lora', save_every=2, max_steps=4, lora_rank=8, resume=True))


# everything

@pytest.mark.parametrize('which', ['tied', 'tiny'])
def test_full(which, request, here, rows):
    "All weights train, the final norm too; a tied head stays the embedding."
    folder = request.getfixturevalue(which)
    run = train(run_config(folder, rows, 'run', method='full'))
    plain = load(folder)
    close(logged('run', 'loss'), plain_losses(plain.requires_grad_(True), list(run.train)))
    saved, began = load('run/model'), dict(load(folder).named_parameters())
    assert (saved.lm_head.weight is saved.model.embed_tokens.weight) == (which == 'tied')
    assert all(not torch.equal(p, began[k]) for k, p in saved.named_parameters())
    assert run.report['trainable'] == run.report['parameters'] and run.report['prefix_cache'] == 'off'
    assert torch.equal(logits(saved), logits(run.model.eval()))


@pytest.mark.parametrize('method', ['lora', 'full'])
def test_bf16(method, here, tied, rows):
    "Products are rounded to bf16, what trains is fp32, also where nothing is frozen."
    for dtype in ('fp32', 'bf16'):
        run = train(run_config(tied, rows, dtype, method=method, dtype=dtype, epochs=1))
        assert {p.dtype for p in run.trainer.model.tail.trained().values()} == {torch.float32}
    assert run.trainer.model.tail.bf16
    one, other = losses('fp32'), losses('bf16')
    assert one != other
    close(one, other, 0.05)


def test_memory_estimate(tied):
    "Gradients and optimizer for what trains, activations for the layers above the cut."
    from alpaca_ft.model import apply_choice, load_model, memory_estimate, resolve_choice
    found = {}
    for name, kw in dict(last=dict(n_freeze=2), middle=dict(layers='1-2'), lora=dict(method='lora', n_freeze=2),
                         full=dict(method='full')).items():
        model = load_model(str(tied))
        apply_choice(model, resolve_choice(RunConfig(**kw), model), torch.float32)
        found[name] = memory_estimate(model, 256)
        trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert found[name]['gradients'] == 4*trains and found[name]['optimizer'] == 8*trains
    layer = found['last']['activations']/2
    assert [found[name]['activations']/layer for name in ('last', 'middle', 'lora', 'full')] == [2, 3, 2, 4]
    assert found['full']['frozen'] == 0


# the best, not the last

@pytest.fixture(scope='module')
def few(tmp_path_factory):
    "Six rows to know by heart, four others to evaluate on, and a model whose held-out loss rises again soon."
    from alpaca_ft import load_alpaca
    folder, all_rows = tmp_path_factory.mktemp('few'), list(load_alpaca()['train'])
    matrix.FAMILIES['llama-tied']().save_pretrained(folder/'model')
    matrix.make_tokenizer().save_pretrained(folder/'model')
    for name, some in dict(train=all_rows[:6], test=all_rows[30:34]).items():
        (folder/f'{name}.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in some))
    return folder


def best_config(few, out, method='freeze', **kw):
    "A run that overfits."
    rate = dict(freeze=0.05, lora=0.02)[method]
    common = dict(eval_data=str(few/'test.jsonl'), final='best', method=method, lr=rate, loss_on='response',
                  eval_every=1, warmup=0., epochs=None, max_steps=8)
    return run_config(few/'model', few/'train.jsonl', out, **common | kw)


def killed(step, **kw):
    "Train in a child that is killed before a step; the process's exit code."
    import os

    def work():
        matrix.kill_at(step)
        train(best_config(**kw))
    return os.waitstatus_to_exitcode(os.waitpid(matrix.fork(work), 0)[1])


def held_out(out, key='eval_loss'):
    "The held-out losses by step."
    return {step: value for step, _, value in logged(out, key)}


def same_files(one, other):
    "Two folders with the same names and bytes."
    names = sorted(p.name for p in Path(one).iterdir())
    assert names == sorted(p.name for p in Path(other).iterdir())
    for name in names:
        assert Path(one, name).read_bytes() == Path(other, name).read_bytes(), name


@pytest.mark.parametrize('method, cache, loss_on', [('freeze', 'off', 'all'), ('freeze', 'memory', 'all'),
                                                    ('freeze', 'memory', 'response'), ('lora', 'memory', 'response')])
def test_best(method, cache, loss_on, here, few, capfd):
    "RUN/model is the model of the best evaluation, by the loss that is trained on: what evaluates to just that loss."
    run = train(best_config(few, 'run', method, prefix_cache=cache, loss_on=loss_on))
    key = 'eval_loss' if loss_on == 'all' else 'eval_response_loss'
    found = held_out('run', key)
    step = min(found, key=found.get)
    assert 0 < step < 8 and found[8] > found[step]  # the case is one
    assert f'final: the model of step {step}' in capfd.readouterr().err
    about = json.loads(Path('run/best.json').read_text())
    assert about == dict(measure=key, step=step, loss=found[step], evaluations_since=8 - step)
    again = matrix.mean_loss(load('run/model'), list(run.test), loss_on, 'fp32')
    assert abs(again - found[step]) < 1e-5 and not Path('run/best').exists()
    page = Path('run/report.html').read_text()
    assert 'best, saved' in page and f'step {step}: {found[step]:.3f} on' in page


def test_last_is_the_default(here, few):
    run = train(best_config(few, 'run', final='last'))
    found = held_out('run')
    assert abs(matrix.mean_loss(load('run/model'), list(run.test), 'all', 'fp32') - found[8]) < 1e-5
    assert not Path('run/best').exists() and not Path('run/best.json').exists()


@pytest.mark.parametrize('method', ['freeze', 'lora'])
def test_best_of_a_killed_run(method, here, few):
    """Killed at several steps, each time resumed: the same best model, stopped after the same step, as the run left
    alone."""
    kw = dict(few=few, method=method, prefix_cache='memory', save_every=2, patience=3, max_steps=12)
    train(best_config(out='whole', **kw))
    found = held_out('whole', 'eval_response_loss')
    step = min(found, key=found.get)
    last = max(found)
    assert last == step + 3 < 12
    for first in range(2, last + 1, 2 if method == 'freeze' else 3):
        out = f'killed-{first}'
        assert killed(first, out=out, **kw) == -9 and not Path(out, 'model').exists()
        if first > 3:  # and once more, two steps behind the checkpoint that it goes on from
            again = killed(2, out=out, resume=True, **kw)
            assert again in (-9, 0)
        if not Path(out, 'model').exists():
            train(best_config(out=out, resume=True, **kw))
        assert losses(out) == losses('whole'), first
        same_files(f'{out}/model', 'whole/model')
        assert Path(out, 'best.json').read_bytes() == Path('whole/best.json').read_bytes()
        assert [p.name for p in sorted(Path(out, 'best').iterdir())] == [p.name
                                                                         for p in sorted(Path('whole/best').iterdir())]


def test_best_weights_stay_while_a_checkpoint_needs_them(here, few):
    "Where the newest checkpoint is damaged, the one before it is gone on from, with the best one that it knew."
    kw = dict(few=few, save_every=1, keep=8, max_steps=6)
    train(best_config(out='run', **kw))
    names = {p.name for p in Path('run/best').iterdir()}
    known = set()
    for p in Path('run/checkpoints').iterdir():
        known.add(f"step-{json.loads((p/'state.json').read_text())['best']['step']}")
    assert names == known and len(known) > 1
    shutil.copytree('run', 'again')
    shutil.rmtree('again/model')
    for i in range(3, 7):
        (Path('again/checkpoints')/f'step-{i}'/'weights.safetensors').write_bytes(b'torn')
    train(best_config(out='again', resume=True, **kw))
    same_files('again/model', 'run/model')
    assert losses('again') == losses('run')


def test_checkpoint_whose_best_is_gone(here, few, capfd):
    kw = dict(few=few, save_every=1, keep=8, max_steps=6)
    train(best_config(out='run', **kw))
    shutil.copytree('run', 'again')
    shutil.rmtree('again/model')
    about = json.loads(Path('again/checkpoints/step-6/state.json').read_text())['best']
    shutil.rmtree(f"again/best/step-{about['step']}")
    train(best_config(out='again', resume=True, **kw))
    assert 'its best weights so far' in capfd.readouterr().err
    same_files('again/model', 'run/model')


def test_patience(here, few, command):
    "A clean end, said in one line, with the result saved; no checkpoints are needed."
    options = ['--n-freeze', 2, '--seq-len', 256, '--batch-size', 2, '--n-samples', 0, '--dtype', 'fp32', '--lr',
               '0.05',
               '--eval-every', 1, '--warmup', 0, '--max-steps', 12, '--patience', 2]
    code, out, err = command('train', '--model', few/'model', '--data', few/'train.jsonl', '--eval-data',
                             few/'test.jsonl', '--out', 'run', *options)
    found = held_out('run')
    best, last = min(found, key=found.get), max(found)
    assert code == 0 and last == best + 2 < 12, err
    line = f'patience: no evaluation since step {best} was better, so the run ends after step {last} of 12'
    assert [x for x in err.splitlines() if x.startswith('patience')] == [line], err
    assert Path('run/model/model.safetensors').exists() and not Path('run/checkpoints').exists()
    assert 'best</' in Path('run/report.html').read_text() and not Path('run/best').exists()


def test_resumed_where_patience_had_ended(here, few):
    "Killed between the last step and the writing of the result: no step more is taken."
    kw = dict(few=few, save_every=1, patience=2, max_steps=12)
    train(best_config(out='run', **kw))
    last = max(held_out('run'))
    assert last < 12 and Path(f'run/checkpoints/step-{last}').exists()
    shutil.copytree('run', 'again')
    shutil.rmtree('again/model')
    train(best_config(out='again', resume=True, **kw))
    same_files('again/model', 'run/model')
    assert losses('again') == losses('run')


def test_signal_keeps_the_best(here, few):
    "Stopped by a signal and resumed: the same best model."
    import os
    import signal
    from alpaca_ft import Stopped
    train(best_config(few, 'whole'))

    class Stop(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kw):
            if state.global_step == 5:
                os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped):
        train(best_config(few, 'run'), [Stop()])
    assert not Path('run/model').exists() and list(Path('run/best').iterdir())
    train(best_config(few, 'run', resume=True))
    same_files('run/model', 'whole/model')


# refusals

REFUSED = {
    'layers that are not there': (['--layers', '2-4'], 'the layers of LlamaForCausalLM are 0 to 3'),
    'too many of the last': (['--layers', 'last:5'], 'give last:1 to last:4'),
    'no layers': (['--layers', 'top'], "layers is 'top'; give numbers"),
    'layers and n_freeze': (['--layers', '2-3', '--n-freeze', 2], 'give one of them'),
    'nothing': (['--n-freeze', 4, '--no-train-head'], 'nothing of LlamaForCausalLM would train'),
    'no part': (['--n-freeze', '1.5'], 'give a whole number, a part such as 0.75, or auto'),
    'more layers than there are': (['--n-freeze', 5], 'give 0 to 4'),
    'lora and the head': (['--method', 'lora', '--train-head', '--n-freeze', 2],
                          'leaves head and embedding as they are'),
    'lora on nothing': (['--method', 'lora', '--n-freeze', 4], 'no linear module of LlamaForCausalLM is chosen'),
    'no such target': (['--method', 'lora', '--n-freeze', 2, '--lora-targets', 'q_proj,w9'],
                       "'w9' is no linear module"),
    'rank without lora': (['--lora-rank', 4, '--n-freeze', 2], 'lora_rank is 4, but method is freeze'),
    'full of some layers': (['--method', 'full', '--layers', '1-2'], 'which trains all layers'),
    'full without head': (['--method', 'full', '--no-train-head'], 'which trains the head too'),
    'no such method': (['--method', 'qlora'], "method is 'qlora'; use freeze or lora or full"),
    'full and kept states': (['--method', 'full', '--prefix-cache', 'memory'], 'the embedding is trained'),
    'none that rests': (['--n-freeze', 2, '--rotate', 2], 'rotate is 2, but 2 layers of LlamaForCausalLM train'),
    'nothing that rotates': (['--n-freeze', 2, '--rotate-every', 5], 'nothing rotates; give --rotate too'),
    'no such end': (['--final', 'first'], "final is 'first'; use last or best"),
    'no patience': (['--patience', 0], 'patience is 0; give at least 1'),
    'a tied head': (['--no-freeze-embed', '--no-train-head', '--n-freeze', 2], 'is its head too'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_refused(name, here, tied, rows, command):
    options, part = REFUSED[name]
    code, out, err = command('train', '--model', tied, '--data', rows, '--seq-len', SEQ_LEN, '--out', 'run', *options)
    assert code == 2 and part in err and len(err.splitlines()) == 1, err
    assert not Path('run').exists()


def with_routers(folder, tokenizer):
    "An Ernie in bf16 whose routers are fp32, as their makers keep them."
    model = matrix.model_of('Ernie4_5_MoeConfig', matrix.COMMON | dict(vocab_size=600), moe_num_experts=4, moe_k=2,
                            moe_intermediate_size=32)
    for name, p in model.named_parameters():
        if 'gate.weight' in name or 'moe_statics' in name:
            p.data = torch.randn(p.shape)*0.1
        else:
            p.data = p.data.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder/'config.json').read_text()) | dict(dtype='bfloat16')
    (folder/'config.json').write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize('method', ['freeze', 'lora'])
def test_fp32_beside_bf16_stays(method, here, tokenizer):
    "What a model keeps in fp32 is not rounded in a bf16 run; a second choice changes nothing of that."
    from alpaca_ft.model import load_model
    model = load_model(str(with_routers(here/'ernie', tokenizer)))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert {p.dtype for p in before.values()} == {torch.bfloat16, torch.float32}
    for n_freeze in (3, 2):
        if method == 'freeze' or n_freeze == 2:
            apply_choice(model, resolve_choice(RunConfig(n_freeze=n_freeze, method=method), model), torch.bfloat16)
    for name, p in model.named_parameters():
        was = before.get(name.replace('.base_layer', ''))
        if p.requires_grad:
            assert p.dtype == torch.float32
        else:
            assert torch.equal(p.to(was.dtype), was) and p.dtype == was.dtype, name


def test_all_is_frozen_in_bf16(tiny):
    "A model in fp32, and one in bf16: what stays is bf16."
    from alpaca_ft.model import load_model
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(str(tiny), dtype=dtype)
        apply_choice(model, resolve_choice(RunConfig(n_freeze=2), model), torch.bfloat16)
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


FEW_EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
SCANS = dict(vocab_size=608, hidden_size=32, num_hidden_layers=4, state_size=8)
JAMBA = dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=4,
             mamba_d_state=8)


def test_lora_that_peft_refuses():
    "A matrix that Mamba's kernels do not ask for: said in a line; others do."
    kw = dict(method='lora', n_freeze=2)
    model = matrix.model_of('MambaConfig', SCANS | matrix.TOKENS)
    with pytest.raises(Refused, match='LoRA: .*out_proj.*lora_targets'):
        apply_choice(model, resolve_choice(RunConfig(**kw), model), torch.float32)
    model = matrix.model_of('MambaConfig', SCANS | matrix.TOKENS)
    apply_choice(model, resolve_choice(RunConfig(lora_targets='in_proj,x_proj', **kw), model), torch.float32)


@pytest.mark.parametrize('family', ['PhimoeConfig', 'Llama4TextConfig'])
def test_lora_leaves_routers_out(family):
    "A linear module that hands on more than a tensor takes no matrices."
    from alpaca_ft.speed import choose_step
    more = dict(head_dim=8, attention_chunk_size=64, intermediate_size_mlp=64) if family.startswith('Llama') else {}
    model = matrix.model_of(family, matrix.COMMON, **FEW_EXPERTS, **more)
    choice = resolve_choice(RunConfig(method='lora', n_freeze=2), model)
    assert choice.matrices and not any('router' in name for name in choice.matrices)
    apply_choice(model, choice, torch.float32)
    row = dict(input_ids=list(range(2, 98)), completion_mask=[1]*96, seq_lengths=[50, 46])
    assert choose_step(model, [row], 1, 50)


def test_falcon_keeps_its_matrices():
    "Its linear modules have a forward of their own, which hands on a tensor."
    choice = resolve_choice(RunConfig(method='lora', n_freeze=2), matrix.falcon())
    assert len(choice.matrices) == 2*4


def test_lora_without_gradient(here, rows, tokenizer, command):
    "A matrix that the model reads past its module: the refusal names the option, and without it the run goes."
    matrix.model_of('JambaConfig', matrix.COMMON | dict(num_hidden_layers=2), **JAMBA).save_pretrained(here/'jamba')
    tokenizer.save_pretrained(here/'jamba')
    argv = ['check', '--model', 'jamba', '--data', rows, '--n-freeze', 0, '--seq-len', 256, '--method', 'lora']
    code, out, err = command(*argv)
    assert code == 2 and 'dt_proj' in err and '--lora-targets' in err, err
    code, out, err = command(*argv, '--lora-targets', 'in_proj,q_proj,v_proj')
    assert code == 0, err


def test_lora_that_would_be_lost(rows, tmp_path):
    "transformers gives Laguna's shared experts another name when it reads them: their LoRA is refused at the start."
    from families import small_model
    folder, out = tmp_path/'laguna', tmp_path/'run'
    small_model('laguna').save_pretrained(folder)
    matrix.make_tokenizer().save_pretrained(folder)
    options = dict(method='lora', max_steps=2, epochs=None, batch_size=1)
    with pytest.raises(Refused, match='would not find the LoRA of .*shared_experts.*--lora-targets') as e:
        train(run_config(folder, rows, out, **options))
    assert '\n' not in str(e.value) and not out.exists()
    run = train(run_config(folder, rows, out, lora_targets='q_proj,v_proj', **options))
    saved = transformers.AutoModelForCausalLM.from_pretrained(out/'model').eval()
    assert not matrix.compare_logits(saved, run.model)


def test_weights_that_layers_share(rows, tmp_path):
    "Zamba 2's layers share weights, which transformers ties only where the head may be tied: refused, or kept."
    from families import small_model
    folder, out = tmp_path/'zamba2', tmp_path/'run'
    small_model('zamba2').save_pretrained(folder)
    matrix.make_tokenizer().save_pretrained(folder)
    options = dict(max_steps=2, epochs=None, batch_size=1)
    with pytest.raises(Refused, match='could not be saved .*shared_transformer') as e:
        train(run_config(folder, rows, out, **options))
    assert '\n' not in str(e.value) and not out.exists()
    run = train(run_config(folder, rows, out, train_head=False, **options))
    saved = transformers.AutoModelForCausalLM.from_pretrained(out/'model').eval()
    assert not matrix.compare_logits(saved, run.model)
