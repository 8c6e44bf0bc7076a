"""Read layer by layer, a model's states, losses and result are bit for bit those of the ordinary way; killed, the
pass goes on where it stood."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import several
import torch

from alpaca_ft import Refused, RunConfig, train
from alpaca_ft.layers import checksum, header, read_weights, shards, write_shard

root = Path(__file__).parent.parent
SHAPE = dict(
    vocab_size=600,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=512,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
)


def shape_of(kind):
    import transformers as t

    return dict(
        llama=lambda: t.LlamaConfig(**SHAPE, num_key_value_heads=2),
        qwen3=lambda: t.Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True),
        gemma3=lambda: t.Gemma3TextConfig(
            **SHAPE,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=64,
            layer_types=['sliding_attention', 'full_attention'] * 2,
        ),
        neox=lambda: t.GPTNeoXConfig(**SHAPE, attention_dropout=0.0, hidden_dropout=0.0),
        phi3=lambda: t.Phi3Config(**SHAPE, num_key_value_heads=2),
        gpt2=lambda: t.GPT2Config(
            vocab_size=600,
            n_embd=32,
            n_layer=4,
            n_head=4,
            n_positions=512,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=1,
        ),
    )[kind]()


@pytest.fixture(scope='module')
def folder_of(tmp_path_factory, tokenizer):
    made = {}

    def get(kind, size='20KB'):
        from transformers import AutoModelForCausalLM
        if kind not in made:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(shape_of(kind)).to(torch.bfloat16)
            made[kind] = tmp_path_factory.mktemp('models')/kind
            model.save_pretrained(made[kind], max_shard_size=size)
            tokenizer.save_pretrained(made[kind])
        return made[kind]
    return get


def options(folder, rows, **more):
    return (
        dict(
            model=str(folder),
            data=str(rows),
            n_freeze=3,
            seq_len=256,
            batch_size=2,
            max_steps=4,
            n_samples=0,
            lr=1e-3,
            prefix_cache='disk',
        )
        | more
    )


def losses(run):
    return [
        (l['step'], l[k])
        for l in map(json.loads, open(run.out / 'metrics.jsonl'))
        for k in ('loss', 'grad_norm', 'eval_loss', 'eval_response_loss')
        if k in l
    ]


def weights(folder):
    from safetensors.torch import load_file
    return {k: t for f in Path(folder).glob('*.safetensors') for k, t in load_file(f).items()}


def kept(cache): return {p.name: p.read_bytes() for p in (cache/'prefix').glob('*.bin')}


@pytest.mark.parametrize(
    'kind, dtype, more',
    [
        ('llama', 'fp32', {}),
        ('llama', 'bf16', dict(method='lora')),
        ('qwen3', 'bf16', {}),
        ('gemma3', 'fp32', {}),
        ('gemma3', 'bf16', {}),
        ('neox', 'fp32', {}),
        ('phi3', 'bf16', dict(train_dtype='bf16')),
        ('gpt2', 'fp32', {}),
    ],
    ids=lambda x: x if isinstance(x, str) else '-'.join(map(str, x.values())) or 'freeze',
)
def test_same(kind, dtype, more, folder_of, rows, tmp_path, monkeypatch):
    "States, losses and the result, and a config that transformers loads."
    folder, runs, states = folder_of(kind), {}, {}
    for way in (False, True):
        monkeypatch.setenv('ALPACA_FT_CACHE', str(tmp_path/f'cache{way}'))
        runs[way] = train(
            RunConfig(out=str(tmp_path / f'run{way}'), layer_by_layer=way, **options(folder, rows, dtype=dtype, **more))
        )
        states[way] = kept(tmp_path/f'cache{way}')
    assert len(shards(folder)) > 3 and runs[True].large and not runs[False].large
    assert len(states[True]) == 1 and states[True] == states[False]
    assert losses(runs[True]) == losses(runs[False]) and len(losses(runs[True])) > 8
    a, b = (weights(tmp_path/f'run{way}'/'model') for way in (False, True))
    assert a.keys() == b.keys() and all(torch.equal(t.float(), b[k].float()) for k, t in a.items())
    one, other = (
        json.loads(
            (
                tmp_path / f'run{way}' / 'model' / ('adapter_config.json' if more.get('method') else 'config.json')
            ).read_text()
        )
        for way in (False, True)
    )
    assert one == other
    from transformers import AutoModelForCausalLM
    AutoModelForCausalLM.from_pretrained(tmp_path/'runTrue'/'model')


def test_memory_and_cache(folder_of, rows, tmp_path, monkeypatch, capsys):
    "Kept in memory, the same; what one way left on the disk, the other way finds."
    monkeypatch.setenv('ALPACA_FT_CACHE', str(tmp_path/'cache'))
    runs = [
        train(
            RunConfig(
                out=str(tmp_path / f'run{i}'),
                layer_by_layer=way,
                **options(folder_of('llama'), rows, prefix_cache=where),
            )
        )
        for i, (way, where) in enumerate([(True, 'memory'), (False, 'disk'), (True, 'disk')])
    ]
    assert 'is there from an earlier run' in capsys.readouterr().err and len(kept(tmp_path/'cache')) == 1
    assert losses(runs[0]) == losses(runs[1]) == losses(runs[2])


def slow_at_a_row():
    "In a child: a long rest in the middle of the second layer."
    from alpaca_ft import layers
    plain = layers.OnDisk.write
    def write(self, stage, row, out):
        plain(self, stage, row, out)
        if stage == 2 and row == 17:
            Path('there').touch()
            time.sleep(60)
    layers.OnDisk.write = write


def test_killed(folder_of, rows, here, tmp_path, monkeypatch, capsys):
    """Killed in the middle of a layer, resumed there; what a broken disk changed meanwhile is noticed, and all begins
    again."""
    folder, cache = folder_of('qwen3'), tmp_path/'cache'
    monkeypatch.setenv('ALPACA_FT_CACHE', str(tmp_path/'other'))
    whole = train(RunConfig(out=str(tmp_path/'whole'), layer_by_layer=False, **options(folder, rows)))
    wanted = kept(tmp_path/'other')
    monkeypatch.setenv('ALPACA_FT_CACHE', str(cache))
    kw = options(folder, rows) | dict(out=str(tmp_path/'run'), layer_by_layer=True)
    def first():
        slow_at_a_row()
        train(RunConfig(**kw))
    pid = several.fork(first, str(tmp_path/'log'))
    several.until(Path('there').exists)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    [part] = (cache/'prefix').glob('*.layers')
    before = part.read_bytes()
    with open(part.with_suffix('.layers.jsonl'), 'a') as f:
        f.write('[2, 3')  # a line that the kill cut
    capsys.readouterr()
    again = train(RunConfig(resume=True, **kw))
    said = capsys.readouterr().err
    assert 'going on in layer 1' in said and kept(cache) == wanted and losses(again) == losses(whole)
    assert sorted(p.suffix for p in (cache/'prefix').iterdir()) == ['.bin', '.json', '.lock']
    [done] = (cache/'prefix').glob('*.bin')
    log = ''  # once more, from what was there at the kill, but for a byte
    done.unlink()
    part.write_bytes(before[:5000] + bytes([before[5000] ^ 1]) + before[5001:])
    for stage in (0, 1):
        for row in range(len(again.train) + len(again.test)):
            log += json.dumps([stage, row, checksum(b'')]) + '\n'
    part.with_suffix('.layers.jsonl').write_text(log)
    third = train(RunConfig(out=str(tmp_path/'third'), **{k: v for k, v in kw.items() if k != 'out'}))
    assert 'going on' not in capsys.readouterr().err and kept(cache) == wanted and losses(third) == losses(whole)


@pytest.mark.parametrize(
    'more, part',
    [
        (dict(n_freeze=0), 'no frozen layers'),
        (dict(prefix_cache='off'), 'prefix_cache is off'),
        (dict(layers='spectrum:0.5', n_freeze=0.8), 'spectrum looks at all weights'),
        (dict(freeze_embed=False), 'embedding is trained'),
    ],
)
def test_refused(more, part, folder_of, rows, here):
    with pytest.raises(Refused, match=part):
        train(RunConfig(out='run', layer_by_layer=True, **options(folder_of('llama'), rows, **more)))
    assert not (here/'run').exists()


def test_auto(folder_of, rows, here, monkeypatch, command):
    """Where memory is short, the model is read layer by layer by itself; where it is not, it is loaded. What does not
    fit is not loaded to be asked."""
    from alpaca_ft import layers
    monkeypatch.setenv('ALPACA_FT_CACHE', str(here/'cache'))
    model = folder_of('llama')
    flags = [
        '--model',
        model,
        '--data',
        rows,
        '--n-freeze',
        3,
        '--seq-len',
        256,
        '--max-steps',
        2,
        '--max-new-tokens',
        4,
    ]
    code, out, err = command('train', *flags, '--out', 'plain')
    assert code == 0 and 'one by one' not in err
    monkeypatch.setattr(layers, 'available_memory', lambda: 400_000)
    monkeypatch.setattr('alpaca_ft.use.available_memory', lambda: 400_000)
    code, out, err = command('train', *flags, '--out', 'large')
    assert (
        code == 0
        and 'frozen layers: read one by one, each once; states kept on disk' in err
        and 'samples: left out' in err
    )
    assert 'model in large/model' in out
    monkeypatch.setattr('alpaca_ft.use.available_memory', lambda: 40_000)
    for argv in (
        ['sample', 'large', '--instruction', 'Say yes.'],
        ['chat', 'large'],
        ['export', 'large', '--to', 'there'],
    ):
        code, out, err = command(*argv)
        assert code == 2 and 'large/model: takes about' in err and 'are free' in err, err
    assert not list(here.glob('there*'))


def test_shard(tmp_path):
    """A file with one tensor replaced by another type and one added is what safetensors reads; the rest is byte for
    byte what it was."""
    from safetensors.torch import load_file, save_file
    torch.manual_seed(0)
    old = dict(a=torch.randn(3, 5).bfloat16(), b=torch.randn(7), c=torch.arange(9), d=torch.randn(2, 2).half())
    save_file(old, tmp_path/'old.safetensors', metadata=dict(format='pt'))
    new = dict(b=torch.randn(7).bfloat16(), e=torch.randn(11))
    write_shard(tmp_path/'old.safetensors', tmp_path/'new.safetensors', new)
    found = load_file(tmp_path/'new.safetensors')
    assert found.keys() == old.keys() | new.keys() and all(
        torch.equal(found[k], t) and found[k].dtype == t.dtype for k, t in (old | new).items()
    )
    assert header(tmp_path/'new.safetensors')[1] % 8 == 0


@pytest.mark.parametrize('kind', ['llama', 'qwen3'])
def test_gguf(kind, tokenizer, rows, tmp_path, monkeypatch, command):
    """A quantised file, read a layer at a time, gives the states and losses of the model that transformers turns into
    numbers as a whole."""
    from copy import deepcopy

    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from alpaca_ft.gguf_file import write_gguf
    config, tokenizer = shape_of(kind), deepcopy(tokenizer)
    tokenizer.add_special_tokens(dict(unk_token='<|endoftext|>'))  # transformers adds it to a file without one
    config.vocab_size = len(tokenizer)
    if kind == 'qwen3':
        config.head_dim = 128  # transformers reads no other from a file
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / kind)
    tokenizer.save_pretrained(tmp_path / kind)
    file = tmp_path / 'one.gguf'
    write_gguf(tmp_path / kind, file, 'q8_0')
    whole = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    whole.save_pretrained(tmp_path / 'whole')
    AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name).save_pretrained(tmp_path / 'whole')
    runs, states = {}, {}
    for model, way in ((tmp_path / 'whole', False), (file, True)):
        monkeypatch.setenv('ALPACA_FT_CACHE', str(tmp_path / f'cache{way}'))
        runs[way] = train(
            RunConfig(out=str(tmp_path / f'run{way}'), layer_by_layer=way, **options(model, rows, dtype='fp32'))
        )
        states[way] = kept(tmp_path / f'cache{way}')
    assert len(shards(Path(runs[True].cfg.model))) == 5 and runs[True].large
    assert list(states[True].values()) == list(states[False].values())
    assert losses(runs[True]) == losses(runs[False])
    a, b = (weights(tmp_path / f'run{way}' / 'model') for way in (False, True))
    assert a.keys() == b.keys() and all(torch.equal(t, b[k]) for k, t in a.items())
    file.write_bytes(file.read_bytes()[:200])
    code, out, err = command('train', '--model', file, '--data', rows, '--out', tmp_path / 'no')
    assert code == 2 and 'one.gguf: cannot be read' in err and len(err.splitlines()) == 2, err
    assert not (tmp_path / 'no').exists() and not list((tmp_path / 'cacheTrue' / 'gguf').glob('*.part'))


def coded(folder, source, method, code):
    """A model's folder with the matrices of its layers quantised: `code` gives the codes of a matrix, and a scale under
    a name of its own."""
    from safetensors.torch import load_file, save_file
    shutil.copytree(source, folder)
    weights = {}
    for key, t in load_file(folder/'model.safetensors').items():
        weights |= code(key, t) if t.dim() == 2 and '.layers.' in key else {key: t}
    save_file(weights, folder/'model.safetensors', metadata=dict(format='pt'))
    config = json.loads((folder/'config.json').read_text()) | dict(quantization_config=method)
    (folder/'config.json').write_text(json.dumps(config))
    return folder


def fp8(key, t):
    scale = t.abs().max()/448
    name = key.replace('.weight', '.weight_scale_inv')
    return {key: (t/scale).to(torch.float8_e4m3fn), name: scale.float().reshape(1, 1)}


def ternary(key, t):
    from transformers.integrations.bitnet import pack_weights
    scale = t.abs().mean()
    codes = pack_weights((t/scale).round().clamp(-1, 1))
    return {key: codes, key.replace('.weight', '.weight_scale'): scale.float().reshape(1)}


def test_quantised(tiny, rows, here, monkeypatch):
    """Codes whose scales have no name in the model are not taken for weights, asked for or where memory is short;
    transformers turns them into numbers on a CPU, so a run that loads them as a whole is one like another."""
    from alpaca_ft import layers
    from alpaca_ft.run import prepare
    monkeypatch.setenv('ALPACA_FT_CACHE', str(here/'cache'))
    folder = coded(here/'fp8', tiny, dict(quant_method='fp8', weight_block_size=[128, 128]), fp8)
    with pytest.raises(Refused, match=r'quantised \(fp8\), .*give the unquantised model, or use --no-layer-by-layer'):
        train(RunConfig(out='run', layer_by_layer=True, **options(folder, rows)))
    monkeypatch.setattr(layers, 'available_memory', lambda: 400_000)
    with pytest.raises(Refused, match=r'quantised \(fp8\)'):
        train(RunConfig(out='run', **options(folder, rows)))
    assert not (here/'run').exists()
    found = prepare(RunConfig(layer_by_layer=False, **options(folder, rows, dtype='fp32'))).model
    right = weights(tiny)
    for key, p in found.named_parameters():
        if key in right:  # the head was tied
            assert (p - right[key]).abs().max() < 0.05*right[key].abs().max(), key


def test_quantised_as_a_whole(tiny, rows, here, monkeypatch):
    "Codes that transformers computes with on this machine, so that it leaves them: nothing is written."
    from alpaca_ft import freeze, load_model
    monkeypatch.setenv('ALPACA_FT_CACHE', str(here/'cache'))
    method = dict(quant_method='bitnet', linear_class='bitlinear', quantization_mode='offline')
    folder = coded(here/'bitnet', tiny, method, ternary)
    with pytest.raises(Refused, match=r'bitnet: its weights are quantised \(bitnet\) .*give the unquantised model'):
        train(RunConfig(out='run', **options(folder, rows)))
    assert not (here/'run').exists()
    with pytest.raises(Refused, match='quantised'):
        freeze(load_model(str(folder)), 2)


def test_a_file_larger_than_memory(tmp_path):
    "One weight is read from a file that this machine's memory could not hold."
    import psutil
    n = psutil.virtual_memory().total + psutil.swap_memory().total + 2**33
    small, scalar = torch.arange(6, dtype=torch.bfloat16).view(2, 3), torch.tensor(7)
    about = dict(
        rest=dict(dtype='U8', shape=[n], data_offsets=[0, n]),
        small=dict(dtype='BF16', shape=[2, 3], data_offsets=[n, n + 12]),
        scalar=dict(dtype='I64', shape=[], data_offsets=[n + 12, n + 20]),
    )
    text = json.dumps(about).encode()
    file = tmp_path/'model.safetensors'
    with open(file, 'wb') as f:
        f.write(len(text).to_bytes(8, 'little') + text)
        f.truncate(8 + len(text) + n)  # without contents, it takes no room
        f.seek(8 + len(text) + n)
        f.write(small.view(torch.uint8).numpy().tobytes() + scalar.numpy().tobytes())
    found = read_weights(dict(a=(file, 'small'), b=(file, 'scalar')))
    assert torch.equal(found['a'], small) and found['a'].dtype == small.dtype and torch.equal(found['b'], scalar)
    os.truncate(file, file.stat().st_size - 9)
    with pytest.raises(Refused, match='ends before the whole of small'):
        read_weights(dict(a=(file, 'small')))


def test_unfinished_pass_of_another_run(tmp_path, monkeypatch):
    """A run that needs room deletes neither the pass that another one is in the middle of nor states that it has just
    begun to use; one that nobody holds goes, and so does what is left of the run's own."""
    from filelock import FileLock

    from alpaca_ft.layers import OnDisk
    from alpaca_ft.prefix import make_room, room_for_states, there_already
    folder = tmp_path/'prefix'
    folder.mkdir()
    monkeypatch.setenv('ALPACA_FT_CACHE', str(tmp_path))
    def free(path): return SimpleNamespace(free=200_000 - sum(p.stat().st_size for p in folder.glob('*.*')))
    monkeypatch.setattr(shutil, 'disk_usage', free)
    def left(): return sorted(p.name for p in folder.iterdir() if p.suffix != '.lock')
    def fill(name, n): (folder/name).write_bytes(b'x'*n)
    fill('old.bin', 1000)
    fill('old.json', 2)
    fill('used.bin', 500)
    rows = [torch.randn(n, 4) for n in (3, 2)]
    with FileLock(folder/'other.bin.lock'), FileLock(folder/'used.bin.lock'):
        other = OnDisk(folder/'other.bin', [3, 2], 4, torch.float32, 1)
        other.write(0, 1, rows[1])
        assert room_for_states()['disk'] == free(folder).free + 1000
        make_room(folder, 10**6)
        assert left() == ['other.layers', 'other.layers.jsonl', 'used.bin']
        other.write(0, 0, rows[0])
        states = other.finish()
    assert torch.equal(states[0], rows[0]) and torch.equal(states[1], rows[1])
    make_room(folder, 10**6)
    assert left() == []
    fill('killed.layers', 50_000)
    fill('killed.layers.jsonl', 10)
    make_room(folder, 10**6)
    assert left() == []
    fill('old.bin', 40_000)
    os.utime(folder/'old.bin', (1e9, 1e9))
    with FileLock(folder/'own.bin.lock'):
        fill('own.layers', 50_000)  # without a log, no pass can go on
        OnDisk(folder/'own.bin', [1500, 400], 4, torch.float32, 1).file.close()
        assert 'old.bin' in left()
        there_already(folder/'own.bin', 30_400)
        assert left() == ['old.bin']


def test_fp32_beside_bf16(folder_of):
    "A layer's weights are read in the precision of the run, but for what the model keeps in fp32."
    from safetensors.torch import load_file, save_file

    from alpaca_ft.layers import large_model, one_stage
    from alpaca_ft.model import Place
    folder, name = folder_of('llama'), 'model.layers.1.input_layernorm.weight'
    [file] = [f for f in shards(folder) if name in header(f)[0]]
    plain = file.read_bytes()
    save_file(load_file(file) | {name: torch.randn(32)}, file, metadata=dict(format='pt'))
    place = Place(torch.device('cpu'), torch.bfloat16)
    large = large_model(RunConfig(model=str(folder), n_freeze=3, layer_by_layer=True), place)
    for wide, dtype in ((set(), torch.bfloat16), ({name}, torch.float32)):
        large.model.wide = wide
        layer = one_stage(large, 2, None, place).last
        assert layer.input_layernorm.weight.dtype == dtype
        assert {p.dtype for k, p in layer.named_parameters() if k != 'input_layernorm.weight'} == {torch.bfloat16}
    file.write_bytes(plain)
