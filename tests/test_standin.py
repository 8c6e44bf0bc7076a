"""The stand-in accelerator itself.

It cannot be taken back once it is registered, so all checks run in a process of their own, one for all of them, since
the imports take most of the time. It prints what went wrong in each, and the test of that name looks.
"""
import copy
import io
import json
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest


# ---- What runs in the other process

def refused(error, words, action):
    """Raise unless `action` fails in this way."""
    try:
        action()
    except error as e:
        assert words in str(e), f'{e} does not say {words!r}'
    else:
        raise AssertionError(f'no {error.__name__}')


def counted(action):
    """(copies to the host, copies to the device) that an action takes."""
    from standin import copies
    copies.reset()
    action()
    return copies.to_host, copies.to_device


def tiny_llama(**settings):
    """Two layers with random weights, always the same ones."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    shape = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    return LlamaForCausalLM(LlamaConfig(**shape | settings))


def tiny_batch(device):
    """Two rows, one of them padded on the left."""
    import torch
    ids = torch.randint(2, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return dict(input_ids=ids.to(device), attention_mask=mask.to(device))


def check_known_to_the_libraries():
    import torch
    from accelerate import PartialState
    assert torch.accelerator.is_available()
    assert str(torch.accelerator.current_accelerator()) == 'standin'
    assert str(PartialState().device) == 'standin:0'
    torch.accelerator.synchronize()
    torch.accelerator.empty_cache()
    assert torch.accelerator.max_memory_allocated() == torch.standin.max_memory_allocated() == 0


def check_mixing_is_refused():
    import numpy as np
    import torch
    here, there = torch.ones(2, 2), torch.ones(2, 2, device='standin')
    same = 'Expected all tensors to be on the same device'
    refused(RuntimeError, same, lambda: there + here)
    refused(RuntimeError, same, lambda: here @ there)
    refused(RuntimeError, same, lambda: torch.cat([there, here]))
    refused(RuntimeError, same, lambda: torch.stack([there.sum(), here.sum()]))
    refused(RuntimeError, 'indices should be either on cpu', lambda: here[torch.tensor([0], device='standin')])
    refused(RuntimeError, 'for generator', lambda: torch.rand(2, device='standin', generator=torch.Generator()))
    refused(TypeError, 'to numpy', there.numpy)
    refused(TypeError, 'to numpy', lambda: np.asarray(there))
    assert torch.equal((there * torch.tensor(2.)).cpu(), here * 2)  # a number, as on a GPU


def check_copies_are_counted():
    import torch
    from standin import copies
    here, there = torch.arange(4.), torch.arange(4., device='standin')
    mask, places = there > 1, torch.tensor([0, 1])

    def fill(value):
        there.clone()[mask] = value
    one_to_host = dict(
        cpu=there.cpu, to=lambda: there.to('cpu'), to_dtype=lambda: there.to('cpu', torch.float16),
        item=there[0].item, tolist=there.tolist, bool=lambda: bool(there[0]), int=lambda: int(there[0]),
        float=lambda: float(there[0]), format=lambda: f'{there[0]:.1f}', repr=lambda: repr(there),
        equal=lambda: torch.equal(there, there), nonzero=there.nonzero, where=lambda: torch.where(mask),
        mask=lambda: there[mask], masked_select=lambda: there.masked_select(mask), unique=there.unique,
        fill_mask=lambda: fill(there[2:] * 2), copy_=lambda: here.clone().copy_(there))
    assert {name: counted(action) for name, action in one_to_host.items()} == dict.fromkeys(one_to_host, (1, 0))
    one_to_device = dict(
        to=lambda: here.to('standin'), tensor=lambda: torch.tensor([1, 2], device='standin'),
        index=lambda: there[places], copy_=lambda: there.clone().copy_(here))
    assert {name: counted(action) for name, action in one_to_device.items()} == dict.fromkeys(one_to_device, (0, 1))
    none = dict(
        shape=lambda: there.shape, product=lambda: there @ there, where=lambda: torch.where(mask, there, 0.),
        masked_fill=lambda: there.masked_fill(mask, 0.), fill_mask=lambda: fill(0.), same=lambda: there.to('standin'),
        half=there.half, zeros=lambda: torch.zeros(3, device='standin'), like=lambda: torch.ones_like(there))
    assert {name: counted(action) for name, action in none.items()} == dict.fromkeys(none, (0, 0))
    copies.where = True
    try:
        copies.reset()
        there.sum().item()
        place, = copies.places
    finally:
        copies.where = False
    assert (place.direction, place.operation) == ('to_host', '_local_scalar_dense')
    assert (Path(place.file).name, place.function) == ('test_standin.py', 'check_copies_are_counted')


def check_float64_can_be_refused():
    import standin
    import torch
    there = torch.ones(2, device='standin')
    assert there.double().dtype == torch.float64
    standin.register(double=False)
    try:
        for action in (there.double, lambda: there.to(torch.float64), lambda: torch.ones(2).double().to('standin'),
                       lambda: torch.zeros(2, dtype=torch.float64, device='standin'),
                       lambda: torch.ones(2).to('standin', torch.float64)):
            refused(TypeError, "doesn't support float64", action)
        assert (there * 2.5).cpu().double().sum().item() == 5
    finally:
        standin.register(double=True)


def check_autocast():
    import torch
    from torch.nn import functional as F
    torch.manual_seed(0)
    linear = torch.nn.Linear(8, 8).to('standin')
    x = torch.randn(2, 4, 8, device='standin')
    labels = torch.tensor([0, 1, 2, 3], device='standin')
    low, high = torch.bfloat16, torch.float32
    with torch.autocast('standin', dtype=low):
        y = linear(x)
        lower = [y, x @ x.mT, x.bmm(x.mT), x[0].mm(x[1].T), torch.addmm(x[0], x[0], linear.weight),
                 torch.baddbmm(x, x, linear.weight.expand(2, 8, 8)), F.scaled_dot_product_attention(x, x, x)]
        upper = [y.softmax(-1), y.log_softmax(-1), F.cross_entropy(y[0], labels), F.nll_loss(y[0], labels),
                 F.layer_norm(y, [8]), y.exp(), y.pow(2), y.sum(), y.cumsum(-1)]
        same = [F.gelu(y), y + y, y.to(torch.float64) + 1]
    assert [each.dtype for each in lower] == [low] * len(lower)
    assert [each.dtype for each in upper] == [high] * len(upper)
    assert [each.dtype for each in same] == [low, low, torch.float64]
    F.cross_entropy(y[0], labels).backward()
    assert linear.weight.grad.dtype == high
    weight, bias = linear.weight.cpu().to(low), linear.bias.cpu().to(low)
    assert torch.equal(y.cpu(), F.linear(x.cpu().to(low), weight, bias))
    assert linear(x).dtype == high


def check_autocast_lists():
    import standin
    import torch
    header = Path(torch.__file__).parent / 'include/ATen/autocast_mode.h'
    if not header.exists():
        return
    text = header.read_text()
    lists = dict(LOWER_PRECISION_FP=standin.LOWER, FP32=standin.FP32, FP32_SET_OPT_DTYPE=standin.FP32_RESULT,
                 PROMOTE=standin.WIDEST)
    for name, ours in lists.items():
        body = re.search(rf'#define AT_FORALL_{name}\(_\)((?:.*\\\n)*.*)', text)[1]
        theirs = ['.'.join(entry.split(', ')) for entry in re.findall(r'_\(([^)]+)\)', body)]
        assert theirs == ours, name


def check_a_step_is_the_cpus():
    import torch
    from torch.testing import assert_close
    models, losses = [], []
    for device in 'cpu', 'standin':
        model = tiny_llama().to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)  # Adam's own eps enlarges rounding errors
        batch = tiny_batch(device)
        loss = model(**batch, labels=batch['input_ids']).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        models.append(model)
        losses.append(loss.detach().cpu())
    assert_close(losses[1], losses[0], rtol=0, atol=1e-6)
    for start, here, there in zip(*(model.parameters() for model in (tiny_llama(), *models))):
        assert str(there.device) == 'standin:0'
        assert_close(there.grad.cpu(), here.grad, rtol=0, atol=1e-6)
        assert_close(there.detach().cpu(), here.detach(), rtol=0, atol=1e-6)
        assert (here - start).abs().max() > 1e-3


def check_a_step_in_bf16():
    import torch
    model = tiny_llama().to('standin')
    batch = tiny_batch('standin')
    plain = model(**batch, labels=batch['input_ids']).loss
    with torch.autocast('standin', dtype=torch.bfloat16):
        out = model(**batch, labels=batch['input_ids'])
    out.loss.backward()
    assert (out.logits.dtype, out.loss.dtype) == (torch.bfloat16, torch.float32)
    assert 0 < abs(out.loss.item() - plain.item()) < 0.05
    assert all(p.grad.dtype == torch.float32 and bool(p.grad.isfinite().all()) for p in model.parameters())


def check_generate():
    import torch
    ids = []
    for device in 'cpu', 'standin':
        model = tiny_llama().to(device)
        torch.manual_seed(1)
        greedy = model.generate(**tiny_batch(device), max_new_tokens=6, do_sample=False)
        sampled = model.generate(**tiny_batch(device), max_new_tokens=6, do_sample=True)
        assert greedy.device.type == sampled.device.type == device
        ids.append((greedy.tolist(), sampled.tolist()))
    assert ids[0] == ids[1]


def check_tensors_keep_their_nature():
    import torch
    model = torch.nn.Linear(3, 2).to('standin')
    again = copy.deepcopy(model)
    assert isinstance(again.weight, torch.nn.Parameter) and again.weight.requires_grad
    assert again.weight.device.type == 'standin' and again.weight.data_ptr() != model.weight.data_ptr()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file)
    assert torch.equal(loaded['weight'], model.weight)
    model.to(torch.bfloat16)
    assert model.weight.dtype == model.weight.raw.dtype == torch.bfloat16
    model.cpu()
    assert type(model.weight) is torch.nn.Parameter
    x = torch.zeros(3, device='standin')
    x.unsqueeze_(0)
    assert x.shape == (1, 3)
    x[0, 1:].fill_(1.)
    assert x.tolist() == [[0., 1., 1.]]
    with torch.inference_mode():
        assert torch.nn.functional.linear(x, x).item() == 2


def check_random_numbers():
    import torch
    from torch.utils.checkpoint import checkpoint
    state = torch.standin.get_rng_state()
    torch.manual_seed(3)
    first = torch.rand(4, device='standin').tolist()
    torch.manual_seed(3)
    assert torch.rand(4).tolist() == first
    torch.standin.set_rng_state(state)
    weight = torch.ones(100, device='standin', requires_grad=True)
    dropped = checkpoint(torch.nn.functional.dropout, weight, use_reentrant=False)  # drawn again for the backward pass
    dropped.sum().backward()
    assert torch.equal(weight.grad, dropped)


def check_trainer():
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer
    vocabulary = {word: i for i, word in enumerate(['<s>', '</s>', *'abcdef '])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=[])),
                                        bos_token='<s>', eos_token='</s>', pad_token='</s>')
    rows = Dataset.from_list([dict(prompt='abc ' * i, completion='def') for i in range(1, 5)])
    for bf16 in False, True:
        with tempfile.TemporaryDirectory() as folder:
            def make(steps):
                config = SFTConfig(folder, max_steps=steps, bf16=bf16, per_device_train_batch_size=2, report_to=[],
                                   logging_steps=1, save_steps=2, eos_token='</s>', disable_tqdm=True)
                return SFTTrainer(tiny_llama(), config, train_dataset=rows, processing_class=tokenizer)
            trainer = make(2)
            trainer.train()
            assert str(trainer.model.device) == 'standin:0'
            losses = [entry['loss'] for entry in trainer.state.log_history if 'loss' in entry]
            assert len(losses) == 2 and all(3 < loss < 5 for loss in losses)
            if bf16:
                again = make(3)
                again.train(resume_from_checkpoint=True)
                assert again.state.global_step == 3


CHECKS = {name.removeprefix('check_'): value for name, value in list(globals().items()) if name.startswith('check_')}


def run_checks():
    """In the other process: all of them, and what went wrong as JSON in the last line."""
    import standin
    import torch
    torch.set_num_threads(1)
    standin.register()
    outcomes = {}
    for name, check in CHECKS.items():
        try:
            check()
            outcomes[name] = None
        except Exception:
            outcomes[name] = traceback.format_exc()
    print('\n' + json.dumps(outcomes))


# ---- What runs here

@pytest.fixture(scope='module')
def outcomes(tmp_path_factory):
    """What went wrong in each check; None: nothing."""
    code = f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_standin as t; t.run_checks()'
    folder = tmp_path_factory.mktemp('standin')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize('name', CHECKS)
def test_standin(name, outcomes):
    if outcomes[name]:
        pytest.fail(outcomes[name], pytrace=False)
