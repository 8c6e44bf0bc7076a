"Which parameters train, and how: each choice against a loop in plain PyTorch (and peft), kept states against none."
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers

import matrix
from alpaca_ft import Refused, RunConfig, train

SEQ_LEN, BATCH_SIZE, EPOCHS, LR = 256, 2, 2, 1e-3


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
    "Without --train-head a tied head stays the embedding, and both stay as they were; the layers train as in plain PyTorch."
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
        expected |= set(sorted(names, key=lambda k: -ratios[k])[:2])
    run = train(run_config('./model', rows, 'run', layers='spectrum:0.5', prefix_cache='memory'))
    assert set(run.choice.matrices) == expected and len(expected) == 14
    lowest = min(int(k.split('.')[2]) for k in expected)
    assert run.choice.first == lowest and run.trainer.model.tail.n_freeze == lowest
    moved = {k for k, p in load('run/model').named_parameters() if not torch.equal(p, model.get_parameter(k))}
    assert moved == {f'{k}.weight' for k in expected} | {'lm_head.weight'}
    train(run_config('./model', rows, 'off', layers='spectrum:0.5', prefix_cache='off'))
    close(losses('run'), losses('off'))


# refusals

REFUSED = {
    'layers that are not there': (['--layers', '2-4'], 'the layers of LlamaForCausalLM are 0 to 3'),
    'too many of the last': (['--layers', 'last:5'], 'give last:1 to last:4'),
    'no layers': (['--layers', 'top'], "layers is 'top'; give numbers"),
    'layers and n_freeze': (['--layers', '2-3', '--n-freeze', 2], 'give one of them'),
    'nothing': (['--n-freeze', 4, '--no-train-head'], 'nothing of LlamaForCausalLM would train'),
    'no part': (['--n-freeze', '1.5'], 'give a whole number, a part such as 0.75, or auto'),
    'more layers than there are': (['--n-freeze', 5], 'give 0 to 4'),
    'a tied head': (['--no-freeze-embed', '--no-train-head', '--n-freeze', 2], 'is its head too'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_refused(name, here, tied, rows, command):
    options, part = REFUSED[name]
    code, out, err = command('train', '--model', tied, '--data', rows, '--seq-len', SEQ_LEN, '--out', 'run', *options)
    assert code == 2 and part in err and len(err.splitlines()) == 1, err
    assert not Path('run').exists()
