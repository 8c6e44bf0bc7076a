"A tiny random model with a small tokenizer of its own, made once: real parts, no download."
import dataclasses
import functools
import gc
import hashlib
import json
import os
import re

import pytest
import torch


@pytest.fixture(scope='session', autouse=True)
def imported():
    "What nearly every test needs, imported once; the collector need not look through it after each run."
    import alpaca_ft.evaluate, alpaca_ft.report, alpaca_ft.run, alpaca_ft.use, datasets, trl  # noqa: F401
    trl.SFTTrainer
    gc.collect()
    gc.freeze()


@pytest.fixture(scope='module')
def ready():
    "Modules are imported once, so that the children need not."
    import matrix
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    matrix.warm_up()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    "Reports without their drawings, which take longer than the runs themselves; test_report.py draws them."
    if request.module.__name__ not in ('test_report', 'test_article'):
        monkeypatch.setattr('alpaca_ft.report._svg', lambda draw, height, label: '')


ELSEWHERE = {'model', 'out', 'data', 'eval_data', 'epochs', 'max_steps', 'eval_every', 'save_every', 'keep', 'resume',
             'lr', 'seed', 'n_samples', 'max_new_tokens', 'final', 'patience', 'track'}  # no say in memory


@pytest.fixture(autouse=True)
def counted_once(request, monkeypatch, tmp_path_factory):
    """A step's memory is counted once for a model and its options, which takes half of a tiny run's time; forked
    children find it too. test_memory.py counts each time."""
    import alpaca_ft.memory
    if request.module.__name__ == 'test_memory':
        return
    folder, count = tmp_path_factory.getbasetemp()/'counted', alpaca_ft.memory.moments
    folder.mkdir(exist_ok=True)

    @functools.wraps(count)
    def moments(cfg, model, first=0, device=torch.device('cpu'), step=None, real=False):
        options = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in ELSEWHERE}
        weights = [(k, p.shape, p.dtype, p.requires_grad) for k, p in model.named_parameters()]
        config = model.config.to_dict() | dict(_name_or_path='')
        about = repr((options, config, weights, first, str(device), step, real))
        path = folder/hashlib.sha256(re.sub(' at 0x[0-9a-f]+', '', about).encode()).hexdigest()
        if not path.exists():
            part = path.with_suffix(f'.{os.getpid()}')
            part.write_text(json.dumps(count(cfg, model, first, device, step, real)))
            part.rename(path)
        return json.loads(path.read_text())
    monkeypatch.setattr(alpaca_ft.memory, 'moments', moments)


@pytest.fixture(scope='session')
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from alpaca_ft import create_prompt, load_alpaca
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.train_from_iterator([create_prompt(r) for r in load_alpaca()['train']], trainers.BpeTrainer(
        vocab_size=600, special_tokens=['<s>', '</s>'], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=t, bos_token='<s>', eos_token='</s>', pad_token='</s>')


def tiny_model(vocab=600, **kw):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**dict(vocab_size=vocab, hidden_size=32, intermediate_size=64,
                                               num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=1) | kw))


@pytest.fixture(scope='session')
def tiny(tmp_path_factory, tokenizer):
    "A folder that from_pretrained reads."
    folder = tmp_path_factory.mktemp('models')/'tiny'
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope='session')
def rows(tmp_path_factory):
    "Forty of the built-in rows as a file."
    from alpaca_ft import load_alpaca
    path = tmp_path_factory.mktemp('rows')/'rows.jsonl'
    path.write_text(''.join(json.dumps(r) + '\n' for r in load_alpaca()['train'].select(range(40))))
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    "An empty working directory."
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(capfd):
    "Run the command in this process: (exit code, stdout, stderr)."
    def run(*argv):
        from alpaca_ft.cli import main
        capfd.readouterr()
        try:
            code = main([str(a) for a in argv])
        except SystemExit as e:
            code = e.code
        out, err = capfd.readouterr()
        return code, out, err
    return run


CHROMIUM = ('--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
            '--disable-component-update --disable-sync')


@pytest.fixture(scope='module')
def browser():
    "Chromium, or a skip that says what is missing."
    import shutil
    chromium = shutil.which('chromium') or shutil.which('chromium-browser')
    if not chromium:
        pytest.skip('no Chromium here; on Debian: apt-get install chromium')
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.skip('playwright is not installed; pip install playwright')
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium,
                              args=CHROMIUM.split())
        yield b
        b.close()
