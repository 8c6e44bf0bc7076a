"A whole run on a tiny model: what is promised of the folder, the weights and the numbers."
import json
import shutil
from pathlib import Path

import pytest
import torch

from alpaca_ft import RunConfig, load_model, train


@pytest.fixture(scope='module')
def done(tiny, rows, tmp_path_factory):
    out = tmp_path_factory.mktemp('runs')/'run'
    return train(RunConfig(model=str(tiny), data=str(rows), out=str(out), n_freeze=2, seq_len=256, batch_size=4,
                           epochs=2, n_samples=3, max_new_tokens=8, lr=1e-3, dtype='fp32'))


def read(path): return [json.loads(l) for l in path.read_text().splitlines()]


def test_moved_and_frozen(done, tiny):
    old = dict(load_model(str(tiny)).named_parameters())
    for k, p in done.model.named_parameters():
        assert torch.equal(p, old[k]) != p.requires_grad, k


def test_metrics(done):
    rows = read(done.out/'metrics.jsonl')
    steps = [r['step'] for r in rows if 'loss' in r]
    assert steps == list(range(1, done.report['steps']+1)) and done.trainer.state.global_step == done.report['steps']
    evals = [r for r in rows if 'eval_loss' in r]
    assert evals[0]['step'] == 0 and evals[-1]['step'] == steps[-1] and all('eval_response_loss' in r for r in evals)
    assert [r for r in rows if 'loss' in r][-1]['tokens'] == 2*done.report['train']['packed_tokens']
    samples = read(done.out/'samples.jsonl')
    assert len(samples) == 3*len(evals)
    assert all(s['reference'] and s['prompt'].endswith('### Response:\n') for s in samples)


def test_saved_model(done):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    again = AutoModelForCausalLM.from_pretrained(done.out/'model').eval()
    ids = torch.tensor([done.train[0]['input_ids'][:50]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, done.model.eval()(ids).logits)
    assert again.generation_config.eos_token_id == done.tokenizer.eos_token_id
    assert AutoTokenizer.from_pretrained(done.out/'model')('Hi')['input_ids'] == done.tokenizer('Hi')['input_ids']


def test_config(done):
    import yaml
    cfg = yaml.safe_load((done.out/'config.yaml').read_text())
    assert cfg['n_freeze'] == 2 and cfg['versions']['trl'] and len(cfg['manifest']['weights']) == 16
    assert json.loads((done.out/'preflight.json').read_text())['isolated'] is True


def test_no_leftovers(done): assert sorted(p.name for p in done.out.iterdir()) == ['config.yaml', 'metrics.jsonl',
        'model', 'preflight.json', 'report.html', 'samples.jsonl']


def test_diverged(here, tiny, rows, command):
    code, out, err = command('train', '--model', tiny, '--data', rows, '--n-freeze', 2, '--seq-len', 256, '--lr',
                             '1e30', '--warmup', '0', '--out', 'run', '--n-samples', 0)
    assert code == 3 and 'the step was not taken' in err.splitlines()[-1]
    assert not (here/'run'/'model').exists()


def test_defaults_are_numbered(here, tiny, rows):
    for name in ('tiny', 'tiny-2'):
        run = train(RunConfig(model=str(tiny), data=str(rows), n_freeze=2, seq_len=256, max_steps=1, n_samples=0))
        assert run.out.name == name and (run.out/'model').is_dir()


def test_a_config_alone(here, tiny, rows, command):
    "A config without weights and tokenizer is enough to count memory; no hub is asked for the file's name."
    shutil.copy(Path(tiny)/'config.json', 'config.json')
    code, out, err = command('check', '--model', 'config.json', '--data', rows, '--memory', '8GB')
    assert code == 0 and '.: no tokenizer; put its files beside config.json' in out, err
    assert 'trains    layer 3 of 0-3, the head' in out and 'fits into 7.45 GiB' in out  # the upper fifth


def with_token(tiny, tokenizer, folder, **kw):
    "The tiny model, its tokenizer with one token more than it has embeddings."
    import copy
    from tokenizers import AddedToken
    tok = copy.deepcopy(tokenizer)
    tok.add_tokens([AddedToken('<image_soft_token>', **kw)], special_tokens=kw.get('special', False))
    shutil.copytree(tiny, folder)
    tok.save_pretrained(folder)
    return tok


def test_special_token_without_an_embedding(here, tiny, rows, tokenizer, command):
    "Gemma 3 has one for images, which its text models never see. In a row it is text; where it is used, it is refused."
    tok = with_token(tiny, tokenizer, here/'soft', special=True)
    assert tok.convert_tokens_to_ids('<image_soft_token>') == 600
    (here/'named.jsonl').write_text(rows.read_text() + json.dumps(
        dict(instruction='Name it.', input='', output='It is <image_soft_token>.')) + '\n')
    common = ['--n-freeze', 2, '--seq-len', 256, '--dtype', 'fp32']
    code, out, err = command('check', '--model', './soft', '--data', 'named.jsonl', *common)
    assert code == 0, err
    (here/'turns.jinja').write_text("{% for m in messages %}{{ m.role + m.content }}<image_soft_token>{% endfor %}"
                                    "{% if add_generation_prompt %}assistant{% endif %}")
    code, out, err = command('check', '--model', './soft', '--data', rows, '--template', 'turns.jinja', *common)
    assert code == 2 and '601 tokens, the model 600' in err and len(err.splitlines()) == 1, err
    tok.pad_token = '<image_soft_token>'
    tok.save_pretrained(here/'soft')
    code, out, err = command('check', '--model', './soft', '--data', rows, *common)
    assert code == 2 and '601 tokens, the model 600' in err and len(err.splitlines()) == 1, err
    with_token(tiny, tokenizer, here/'plain')
    code, out, err = command('check', '--model', './plain', '--data', rows, *common)
    assert code == 2 and '601 tokens, the model 600' in err and len(err.splitlines()) == 1, err


def test_refused_after_the_first_step(here, tiny, rows):
    "What was trained stays, and the run goes on; without a checkpoint nothing is left."
    from transformers import TrainerCallback
    from alpaca_ft import Refused

    class No(TrainerCallback):
        def on_step_end(self, args, state, control, **kw):
            if state.global_step == 3:
                raise Refused('a file is damaged')
    common = dict(model=str(tiny), data=str(rows), n_freeze=2, seq_len=256, max_steps=4, n_samples=0, dtype='fp32')
    for name, every in (('none', None), ('kept', 2)):
        with pytest.raises(Refused, match='a file is damaged'):
            train(RunConfig(out=name, save_every=every, **common), [No()])
    assert not Path('none').exists()
    assert sorted(p.name for p in Path('kept/checkpoints').iterdir()) == ['step-2']
    train(RunConfig(out='kept', save_every=2, resume=True, **common))
    assert Path('kept/model').is_dir()


def test_order_is_drawn_once(monkeypatch):
    "It was drawn for each step, which takes 0.15 s with a million rows."
    from alpaca_ft.trainer import rows_of_step
    n, per_epoch, drawn, randperm = 100_000, 50_000, [], torch.randperm
    monkeypatch.setattr(torch, 'randperm', lambda *args, **kw: drawn.append(args) or randperm(*args, **kw))
    ahead = []
    for step in range(per_epoch - 10, per_epoch + 10):  # over the end of an epoch
        ahead.append(rows_of_step(step + 1, n, 2, 1234))
        rows_of_step(step, n, 2, 1234)
    assert len(drawn) == 2
    fresh = randperm(n, generator=torch.Generator().manual_seed(1235)).tolist()
    assert ahead[9:] == [fresh[i:i + 2] for i in range(0, 22, 2)]
    ahead[9].clear()  # what a caller does with its rows changes none of them
    assert rows_of_step(per_epoch, n, 2, 1234) == fresh[:2]


def test_a_config_with_code_of_its_own(here, tiny, rows, command):
    "With --trust-remote-code, a config alone is counted by the code that comes with it."
    config = json.loads((tiny/'config.json').read_text()) | dict(
        model_type='own', auto_map=dict(AutoConfig='own.OwnConfig', AutoModelForCausalLM='own.OwnModel'))
    (here/'own').mkdir()
    (here/'own'/'config.json').write_text(json.dumps(config))
    (here/'own'/'own.py').write_text("""from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig): model_type = 'own'
class OwnModel(LlamaForCausalLM): config_class = OwnConfig
""")
    flags = ['check', '--model', 'own/config.json', '--data', rows, '--n-freeze', 2]
    code, out, err = command(*flags, '--trust-remote-code')
    assert code == 0 and 'trains    layers 2-3 of 0-3, the head' in out, err
    code, out, err = command(*flags)
    assert code == 2 and len(err.splitlines()) == 1, err


def test_a_config_of_codes(here, tiny, rows, command):
    "A config alone does not say whether quantised weights become numbers in loading."
    config = json.loads((tiny/'config.json').read_text()) | dict(quantization_config=dict(quant_method='fp8'))
    (here/'config.json').write_text(json.dumps(config))
    code, out, err = command('check', '--model', 'config.json', '--data', rows, '--n-freeze', 2)
    assert code == 0 and 'whether it can be trained: its weights are quantised (fp8)' in out, err
