"Other optimizers by transformers' names, and trained weights in bf16: resumed, they end as without a stop."
import json
import shutil

import pytest
import torch

from alpaca_ft import Refused, RunConfig, train
from alpaca_ft.trainer import check_optim


def losses(run):
    return [
        (l['step'], l[k])
        for l in map(json.loads, open(run.out / 'metrics.jsonl'))
        for k in ('loss', 'eval_loss')
        if k in l
    ]


@pytest.mark.parametrize(
    'optim, precision',
    [
        ('adafactor', 'bf16'),
        ('adafactor', 'fp32'),
        ('sgd', 'fp32'),
        ('adagrad', 'fp32'),
        ('rmsprop', 'bf16'),
        ('adamw_torch', 'bf16'),
        ('adamw_torch_fused', 'bf16'),
    ],
)
def test_resumed(optim, precision, tiny, rows, tmp_path):
    kw = dict(
        model=str(tiny),
        data=str(rows),
        n_freeze=3,
        seq_len=256,
        batch_size=2,
        max_steps=6,
        n_samples=0,
        lr=1e-3,
        dtype='bf16',
        save_every=2,
        optim=optim,
        train_dtype=precision,
    )
    whole = train(RunConfig(out=str(tmp_path/'whole'), **kw))
    dtype = torch.bfloat16 if precision == 'bf16' else torch.float32
    assert {p.dtype for p in whole.model.parameters() if p.requires_grad} == {
        dtype
    } and whole.trainer.args.optim == optim
    first, last = losses(whole)[0][1], losses(whole)[-1][1]
    assert last < first and (last < first - 0.01 or optim == 'sgd')
    shutil.copytree(tmp_path/'whole', tmp_path/'killed')
    shutil.rmtree(tmp_path/'killed'/'model')
    shutil.rmtree(tmp_path/'killed'/'checkpoints'/'step-6')
    again = train(RunConfig(out=str(tmp_path/'killed'), resume=True, **kw))
    assert losses(again) == losses(whole)
    for p, q in zip(whole.model.parameters(), again.model.parameters()):
        assert torch.equal(p, q)
    about = json.loads((tmp_path/'whole'/'model'/'config.json').read_text())
    assert about['dtype'] == ('bfloat16' if precision == 'bf16' else 'float32')


@pytest.mark.parametrize(
    'name, part',
    [
        ('adamw', 'did you mean'),
        ('adalomo', 'needs more than an optimizer'),
        ('schedule_free_adamw', 'needs more'),
        ('adamw_torch_npu_fused', 'cannot be used here'),
    ],
)
def test_refused(name, part, tiny, rows, here):
    with pytest.raises(Refused, match=part):
        check_optim(name)
    with pytest.raises(Refused, match=part):
        train(RunConfig(model=str(tiny), data=str(rows), out='run', optim=name))
    assert not (here/'run').exists()


def test_bf16_needs_bf16(tiny, rows, here):
    with pytest.raises(Refused, match='give --dtype bf16'):
        train(RunConfig(model=str(tiny), data=str(rows), out='run', train_dtype='bf16', dtype='fp32'))
