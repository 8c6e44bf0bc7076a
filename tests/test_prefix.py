"Trained on kept states, the run is the same: also for a model that adds positions to its inputs, and after a resume."
import json
import sys

import pytest
import torch

from alpaca_ft import RunConfig, train


def losses(run): return [(l['step'], l[k]) for l in map(json.loads, open(run.out/'metrics.jsonl'))
                         for k in ('loss', 'eval_loss', 'eval_response_loss') if k in l]


@pytest.fixture(scope='module')
def gpt2(tmp_path_factory, tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('gpt2')
    GPT2LMHeadModel(GPT2Config(vocab_size=600, n_embd=32, n_layer=4, n_head=4, n_positions=512, resid_pdrop=0.,
                               embd_pdrop=0., attn_pdrop=0., bos_token_id=0, eos_token_id=1)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize('which', ['tiny', 'gpt2'])
@pytest.mark.parametrize('where', ['memory', 'disk'])
def test_same_run(which, where, request, rows, tmp_path, monkeypatch):
    monkeypatch.setenv('ALPACA_FT_CACHE', str(tmp_path/'cache'))
    kw = dict(model=str(request.getfixturevalue(which)), data=str(rows), n_freeze=3, seq_len=256, batch_size=4,
              micro_batch_size=2, epochs=3, n_samples=1,
              max_new_tokens=4, lr=1e-3, dtype='fp32')
    a, b = (train(RunConfig(out=str(tmp_path/w), prefix_cache=w, **kw)) for w in ('off', where))
    assert b.report['prefix_cache'] == where and a.report['prefix_cache'] == 'off'
    for (s, x), (t, y) in zip(losses(a), losses(b), strict=True):
        assert s == t and abs(x - y) < 1e-5
    for p, q in zip(a.model.parameters(), b.model.parameters()):
        assert torch.allclose(p, q, atol=1e-5)
    assert (tmp_path/'a').exists() is False and list((tmp_path/where/'model').iterdir())


def test_resumed(tiny, rows, tmp_path):
    kw = dict(model=str(tiny), data=str(rows), n_freeze=3, seq_len=256, batch_size=2, epochs=2, n_samples=1,
              max_new_tokens=4, lr=1e-3, dtype='fp32', prefix_cache='memory', save_every=2)
    import shutil
    whole = train(RunConfig(out=str(tmp_path/'whole'), **kw))
    shutil.copytree(tmp_path/'whole', tmp_path/'killed')
    shutil.rmtree(tmp_path/'killed'/'model')
    newest = max((tmp_path/'killed'/'checkpoints').iterdir(), key=lambda p: int(p.name.split('-')[1]))
    shutil.rmtree(newest)
    again = train(RunConfig(out=str(tmp_path/'killed'), resume=True, **kw))
    assert losses(again) == losses(whole)
    for p, q in zip(whole.model.parameters(), again.model.parameters()):
        assert torch.equal(p, q)


@pytest.mark.parametrize('kw, part',
                         [(dict(n_freeze=0), 'no frozen layers'), (dict(n_freeze=4), 'no layer is trained'),
                          (dict(freeze_embed=False), 'embedding is trained')])
def test_refused(kw, part, tiny, rows, here):
    from alpaca_ft import Refused
    with pytest.raises(Refused, match=part):
        train(RunConfig(**(dict(model=str(tiny), data=str(rows), n_freeze=2, seq_len=256, out='run',
                                prefix_cache='memory') | kw)))
    assert not (here/'run').exists()


def test_linear_loss_gathers():
    "Over two micro-batches the head's gradient is the sum of both, as PyTorch adds it, in one tensor that stays."
    import torch
    from torch.nn.functional import cross_entropy
    from alpaca_ft.speed import linear_loss
    torch.manual_seed(0)
    w, (h, g), t = torch.randn(5000, 8), torch.randn(2, 6, 8), torch.randint(5000, (2, 6))
    plain, fast = (w.clone().requires_grad_() for _ in range(2))
    for x, y in zip((h, g), t):
        cross_entropy(x @ plain.T, y, reduction='sum').backward()
        linear_loss(x, fast, y, 1.).backward()
        kept = fast.grad if x is h else kept
    assert fast.grad is kept
    torch.testing.assert_close(fast.grad, plain.grad, atol=1e-5, rtol=1e-4)


def test_states_larger_than_memory(tmp_path):
    "A file of states that this machine's memory could not hold is opened, without a warning."
    import warnings
    import psutil
    from alpaca_ft.prefix import map_states
    n = (psutil.virtual_memory().total + psutil.swap_memory().total)//2**13 + 2**20  # rows of 8 KB, and 8 GB more
    last = torch.arange(2048, dtype=torch.float32)
    with open(tmp_path/'states.bin', 'wb') as f:
        f.truncate((n - 1)*2**13)  # without contents, it takes no room
        f.seek((n - 1)*2**13)
        f.write(last.numpy().tobytes())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        states = map_states(tmp_path/'states.bin', [n - 1, 1], torch.float32, 2048)
    states.read_ahead([1])
    assert torch.equal(states[1][0], last) and not states[0][:3].any()


def test_states_in_memory_are_not_pinned():
    "A batch is a copy of its states, so pinning them would serve nothing; and PyTorch pins powers of two."
    from alpaca_ft.prefix import states_in_memory
    states = states_in_memory(None, (), torch.device('cuda'), torch.float32, 8)  # no rows, so no GPU is asked
    assert len(states) == 0 and states.hidden == 8


def refuse_fallocate():
    "From now on this thread finds no file system that can set room aside: the kernel says so (seccomp)."
    import ctypes
    import errno
    import platform
    import struct
    number = dict(x86_64=285, aarch64=47).get(platform.machine())
    lines = [(0x20, 0, 0, 0), (0x15, 0, 1, number or 0), (6, 0, 0, 0x50000 | errno.EOPNOTSUPP), (6, 0, 0, 0x7fff0000)]
    code = b''.join(struct.pack('HBBI', *line) for line in lines)
    class Program(ctypes.Structure):
        _fields_ = [('lines', ctypes.c_ushort), ('code', ctypes.c_char_p)]
    libc = ctypes.CDLL(None)
    return bool(number) and not libc.prctl(38, 1, 0, 0, 0) and not libc.prctl(
        22, 2, ctypes.byref(Program(len(lines), code)), 0, 0)


@pytest.mark.skipif(sys.platform != 'linux', reason='a filter of system calls')
@pytest.mark.parametrize('able', [True, False])
def test_room_is_set_aside(able, tmp_path, monkeypatch):
    "Where a file system cannot set room aside, nothing is written in its place; what is free is looked at first."
    import shutil
    from threading import Thread
    from types import SimpleNamespace
    from alpaca_ft.layers import OnDisk
    from alpaca_ft.prefix import _reserve
    n, found, files = 2**23, {}, [tmp_path/'states.bin.part', tmp_path/'states.layers']
    def go():
        if not able and not refuse_fallocate():
            return
        _reserve(files[0], n)
        OnDisk(tmp_path/'states.bin', [n//8], 4, torch.float16, 1).file.close()  # and as much for a row that moves
        for p in files:
            found[p.suffix] = p.stat().st_size, p.stat().st_blocks*512
        monkeypatch.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=n - 1))
        try:
            _reserve(tmp_path/'large', n)
        except OSError as e:
            found['large'] = e.strerror, (tmp_path/'large').stat().st_size
    thread = Thread(target=go)
    thread.start()
    thread.join()
    if not found and not able:
        pytest.skip('no filter of system calls here')
    (a, taken), (b, taken_too) = found['.part'], found['.layers']
    assert (a, b) == (n, 2*n)
    assert taken >= n and taken_too >= 2*n if able else taken < n//10 and taken_too < n//10
    assert found['large'] == ('No space left on device', 0)


@pytest.mark.parametrize('where', ['disk', 'auto'])
def test_states_that_are_there_are_room(where, tmp_path, monkeypatch):
    "What would be deleted for new states, or is what the run needs, does not count against them."
    import os
    import shutil
    from collections import namedtuple
    from alpaca_ft import Refused
    from alpaca_ft.prefix import decide
    monkeypatch.setenv('ALPACA_FT_CACHE', str(tmp_path))
    monkeypatch.setattr('alpaca_ft.prefix.available_memory', lambda: 0)
    (tmp_path/'prefix').mkdir()
    whole = 200_000
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: namedtuple('Usage', 'total used free')(
        whole, 0, whole - sum(p.stat().st_size for p in (tmp_path/'prefix').iterdir())))
    n_bytes = 110_000 if where == 'disk' else 90_000
    def there(): return decide(RunConfig(prefix_cache=where), n_bytes, 900, 9).where
    assert there() == 'disk'
    for name in ('a.bin', 'b.layers'):
        (tmp_path/'prefix'/name).touch()
        os.truncate(tmp_path/'prefix'/name, n_bytes)
        assert there() == 'disk'
        (tmp_path/'prefix'/name).unlink()
    (tmp_path/'prefix'/'other').touch()
    os.truncate(tmp_path/'prefix'/'other', n_bytes)  # what is nobody's to delete
    if where == 'auto':
        assert there() == 'off'
    else:
        with pytest.raises(Refused, match='90,000 are free'):
            there()


def test_routers_that_draw():
    "Frozen layers whose routers are random in training say something else each time: nothing is kept."
    import matrix
    from alpaca_ft.prefix import drops_out, why_no_states
    experts = dict(num_local_experts=4, num_experts_per_tok=2)
    phimoe = matrix.model_of('PhimoeConfig', matrix.COMMON, **experts)
    assert drops_out(phimoe) and 'random' in why_no_states(RunConfig(n_freeze=2), phimoe)
    assert not drops_out(matrix.model_of('MixtralConfig', matrix.COMMON, **experts))
    assert drops_out(matrix.model_of('MixtralConfig', matrix.COMMON, **experts, router_jitter_noise=0.1))
    ids = torch.arange(2, 98)[None]
    for noise in (0., 0.01):
        model = matrix.model_of('PhimoeConfig', matrix.COMMON, **experts, router_jitter_noise=noise)
        model.train()
        a, b = (model(ids).logits for _ in range(2))
        assert drops_out(model) or torch.equal(a, b)


def test_layers_that_share_weights():
    "Zamba 2 has one attention block in several layers: below the lowest trained layer something trains."
    import matrix
    from alpaca_ft.model import apply_choice, resolve_choice
    from alpaca_ft.prefix import why_no_states
    options = matrix.COMMON | dict(num_hidden_layers=8, num_key_value_heads=4)
    scans = dict(mamba_d_state=8, mamba_headdim=16, n_mamba_heads=4, mamba_ngroups=1)
    model = matrix.model_of('Zamba2Config', options, **scans, num_mem_blocks=1, adapter_rank=4,
                            use_shared_attention_adapter=False, layers_block_type=['mamba', 'hybrid']*4)
    for kw in (dict(), dict(method='lora', lora_targets='q_proj,v_proj,k_proj')):
        cfg = RunConfig(n_freeze=4, **kw)
        choice = resolve_choice(cfg, model)
        assert 'share weights' in why_no_states(cfg, model, choice)
        apply_choice(model, choice, torch.float32)
        assert 'share weights' in why_no_states(cfg, model, choice)
