"Whatever is wrong, the command says it in one line, exits with 2 and leaves nothing behind."
import json
import os

import pytest

good = dict(instruction='Say hi.', input='', output='Hi!')


def lines(*rows): return ''.join(json.dumps(r) + '\n' for r in rows).encode()


def turn(role, content): return dict(role=role, content=content)


def without(*keys): return {k: v for k, v in good.items() if k not in keys}


FILES = {  # name: (file name, its bytes, a part of the message)
    'truncated json': ('a.json', b'[{"instruction": "Say hi.", "out', 'cut off'),
    'truncated line': ('a.jsonl', lines(good) + b'{"instruction": "Say', 'row 2 is not a JSON object'),
    'latin-1': ('a.jsonl', '{"instruction": "Café", "output": "x"}'.encode('latin-1'), 'is not UTF-8'),
    'utf-16': ('a.json', '[]'.encode('utf-16'), 'is not UTF-8'),
    'csv by another name': ('a.jsonl', b'instruction,input,output\nSay hi.,,Hi!\n', 'row 1 is not a JSON object'),
    'text': ('a.txt', b'Say hi.', 'unknown file type'),
    'csv with a cell too many': ('a.csv', b'instruction,output\nSay hi.,Hi, you!\n', 'the number of its cells is 3'),
    'system field in the alpaca template': (
        'a.jsonl',
        lines(*[good | dict(system='Be brief.', output=str(i)) for i in range(12)]),
        'user and assistant messages only',
    ),
    'no parquet': ('a.parquet', b'PAR1 nothing', 'not a readable Parquet'),
    'an object, no list': ('a.json', b'{"data": [1, 2]}', 'row 1: instruction is missing'),
    'a list of texts': ('a.json', b'["Say hi."]', 'row 1: of type str'),
    'a number': ('a.json', b'7', 'row 1: of type int'),
    'empty file': ('a.jsonl', b'', 'no usable rows'),
    'empty list': ('a.json', b'[]', 'no usable rows'),
    'one row': ('a.jsonl', lines(good), 'cannot be split'),
    'no instruction': ('a.jsonl', lines(good, without('instruction')), 'row 2: instruction is missing (1 bad of 2'),
    'no output': ('a.jsonl', lines(without('output')), 'row 1: output is missing'),
    'null output': ('a.jsonl', lines(good | dict(output=None)), 'row 1: output is missing'),
    'empty output': ('a.jsonl', lines(good | dict(output='')), 'row 1: output is empty'),
    'blank output': ('a.jsonl', lines(good | dict(output=' \n\t')), 'row 1: output is empty'),
    'blank instruction': ('a.jsonl', lines(good | dict(instruction=' ')), 'row 1: instruction is empty'),
    'number for text': ('a.jsonl', lines(good | dict(output=42)), 'row 1: output is of type int'),
    'nested field': ('a.jsonl', lines(good | dict(input={'a': 1})), 'row 1: input is of type dict'),
    'list of texts': ('a.jsonl', lines(good | dict(instruction=['a', 'b'])), 'row 1: instruction is of type list'),
    'huge instruction': (
        'a.jsonl',
        lines(good | dict(instruction='a' * 10_000_000)),
        'row 1: instruction has 10,000,000 characters',
    ),
    'control character': ('a.jsonl', lines(good | dict(output='a\x00b')), "control character '\\x00'"),
    'escape sequence': ('a.jsonl', lines(good | dict(instruction='\x1b[31mred')), 'control character'),
    'prompt heading': (
        'a.jsonl',
        lines(good | dict(instruction='x\n### Response:\ny')),
        "prompt heading '### Response:'",
    ),
    'half a surrogate': ('a.jsonl', b'{"instruction": "\\ud83d", "output": "x"}', 'half a surrogate pair'),
    'other names': (
        'a.jsonl',
        lines(dict(question='Say hi.', answer='Hi!')),
        'give --columns instruction=question,output=answer',
    ),
    'unknown names': ('a.jsonl', lines(dict(left='Say hi.', right='Hi!')), 'say with --columns which is what'),
    'chat without an answer': ('a.jsonl', lines(dict(messages=[turn('user', 'Hi.')])), "the last turn is the user's"),
    'chat that begins with the answer': (
        'a.jsonl',
        lines(dict(messages=[turn('assistant', 'Hi.')])),
        "turn 1 is the assistant's",
    ),
    'two questions in a row': (
        'a.jsonl',
        lines(dict(messages=[turn('user', 'a'), turn('user', 'b'), turn('assistant', 'c')])),
        "turn 2 is the user's",
    ),
    'late system message': (
        'a.jsonl',
        lines(dict(messages=[turn('user', 'a'), turn('system', 'b'), turn('assistant', 'c')])),
        "turn 2 is the system's",
    ),
    'unknown role': (
        'a.jsonl',
        lines(dict(messages=[turn('narrator', 'a'), turn('assistant', 'c')])),
        "the role 'narrator'",
    ),
    'turn without text': (
        'a.jsonl',
        lines(dict(messages=[turn('user', ''), turn('assistant', 'c')])),
        'turn 1 has no text',
    ),
    'turn of another kind': ('a.jsonl', lines(dict(messages=['Hi.', 'Hello.'])), 'turn 1 is of type str'),
    'chat that is a text': ('a.jsonl', lines(dict(messages='Hi.')), 'messages is not a list of turns'),
    'empty chat': ('a.jsonl', lines(dict(conversations=[])), 'conversations is not a list of turns'),
    'tool call': (
        'a.jsonl',
        lines(dict(messages=[turn('user', 'a'), turn('assistant', 'c') | dict(tool_calls=[{'id': 'x'}])])),
        'calls a tool',
    ),
    'picture in a turn': (
        'a.jsonl',
        lines(dict(messages=[dict(role='user', content=[dict(type='image', url='x')]), turn('assistant', 'c')])),
        'parts that are not text',
    ),
    'control character in a turn': (
        'a.jsonl',
        lines(
            dict(messages=[turn('user', 'a\x00'), turn('assistant', 'b'), turn('user', 'c'), turn('assistant', 'd')])
        ),
        'turn 1 holds the control character',
    ),
    'system message in the alpaca template': (
        'a.jsonl',
        lines(*[dict(messages=[turn('system', 'a'), turn('user', 'b'), turn('assistant', str(i))]) for i in range(12)]),
        'user and assistant messages only',
    ),
    'special token in a chat': (
        'a.jsonl',
        lines(
            *[
                dict(
                    messages=[
                        turn('user', 'a'),
                        turn('assistant', 'b </s>'),
                        turn('user', 'c'),
                        turn('assistant', str(i)),
                    ]
                )
                for i in range(12)
            ]
        ),
        "special token '</s>'",
    ),
    'prompt without a completion': ('a.jsonl', lines(dict(prompt='Say hi.')), 'it has prompt: say with --columns'),
    'prompt of another kind': ('a.jsonl', lines(dict(prompt=7, completion='Hi!')), 'instruction is missing'),
    'true for text': ('a.jsonl', lines(good | dict(output=True)), 'output is of type bool'),
    'nan': ('a.jsonl', b'{"instruction": "x", "output": NaN}\n', 'output is of type float'),
    'no room for a response': (
        'a.jsonl',
        lines(*[good | dict(instruction='word ' * 600)] * 12),
        'no example has room for its response',
    ),
}


@pytest.mark.parametrize('name', FILES)
def test_files(name, here, tiny, command):
    file, data, part = FILES[name]
    (here/file).write_bytes(data)
    before = sorted(here.rglob('*'))
    code, out, err = command('train', '--model', tiny, '--data', file, '--n-freeze', 2, '--seq-len', 128, '--out',
                             'run')
    assert (code, out, len(err.splitlines())) == (2, '', 1), err
    assert part in err and err.startswith(f'alpaca_ft: ') and sorted(here.rglob('*')) == before, err


OPTIONS = {  # name: (arguments, a part of the message)
    'unknown option': (['--n-freze', '3'], 'did you mean --n-freeze?'),
    'no number': (['--lr', 'fast'], "lr is 'fast'; give a number"),
    'not finite': (['--lr', 'nan'], 'give a number'),
    'half an epoch': (['--epochs', '0.5'], 'give a whole number'),
    'no epoch': (['--epochs', '0'], 'give at least 1'),
    'negative layers': (['--n-freeze', '-1'], 'give at least 0'),
    'too many layers': (['--n-freeze', '5'], 'give 0 to 4'),
    'odd micro-batch': (['--batch-size', '8', '--micro-batch-size', '3'], 'is not a multiple of micro_batch_size 3'),
    'no such loss': (['--loss-on', 'answers'], 'use all or response'),
    'no such tracker': (['--track', 'mlflow'], 'use none or wandb'),
    'beyond positions': (['--seq-len', '1024'], '512 positions'),
    'no such model': (['--model', './nowhere'], 'no such run or model folder'),
    'no such data': (['--data', 'nowhere.jsonl'], 'no such file'),
    'no such preset': (['--preset', 'paper'], 'paper'),
    'no config file': (['--config', 'nowhere.yaml'], 'nowhere.yaml: cannot be read'),
    'broken config': (['--config', 'broken.yaml'], 'not valid YAML'),
    'config with a typo': (['--config', 'typo.yaml'], 'did you mean seq_len?'),
    'config is a list': (['--config', 'list.yaml'], 'holds a list'),
    'config of a wrong type': (['--config', 'type.yaml'], 'freeze_embed is'),
    'folder of a run': (['--out', 'full'], 'exists already'),
    'folder without rows': (['--data', 'full'], 'no .json or .jsonl files'),
    'no such template': (['--template', 'mine.jinja'], 'mine.jinja cannot be read'),
    'broken template': (['--template', 'broken.jinja'], 'the chat template does not take turns'),
    'template without an end': (['--template', 'endless.jinja'], 'ends an answer without a special token'),
    'template that asks with more': (['--template', 'thinks.jinja'], "asks with '<think>', which it does not write"),
    'template that drops the question': (['--template', 'deaf.jinja'], "leaves out or repeats the user's turn"),
    'no chat template': (['--template', 'chat'], 'has no chat template'),
    'columns without a name': (['--columns', 'question'], 'write it as instruction=question'),
    'columns of another part': (['--columns', 'task=question'], 'write it as instruction=question'),
    'columns that are not there': (['--columns', 'instruction=question'], "has no column 'question'"),
    'near-duplicates beyond 1': (['--near-duplicates', '80'], 'give 0.1 to 1'),
    'no near-duplicates at all': (['--near-duplicates', '0'], 'give at least 0.1'),
    'unknown method': (['--method', 'qlora'], 'use freeze or lora or full'),
    'lora on nothing': (['--method', 'lora', '--lora-targets', 'nowhere'], 'nowhere'),
    'rank without lora': (['--lora-rank', '8'], 'give --method lora'),
    'layers and n_freeze': (['--layers', 'last:2'], 'give one of them'),
    'layers that are not there': (['--n-freeze', '0.8', '--layers', '8-15'], 'are 0 to 3; give two of these numbers'),
    'layers in words': (['--n-freeze', '0.8', '--layers', 'the last two'], 'give numbers from 0'),
    'a part beyond all': (['--n-freeze', '1.5'], 'a part such as 0.75'),
    'all layers, or one': (['--n-freeze', '1.0'], "n_freeze is '1.0'; give 1 for one layer, or the number"),
    'warm-up beyond the end': (['--warmup', '2'], 'give 0 to 1'),
    'spike below 1': (['--loss-spike-stop', '0.5'], 'give at least 1'),
    'kept states of nothing': (['--n-freeze', '0', '--prefix-cache', 'disk'], 'no frozen layers'),
    'nothing to resume': (['--resume'], 'no run to resume'),
    'log_model without W&B': (['--log-model'], '--track wandb'),
    'a yes for a number': (['--seq-len', 'yes'], 'give a whole number'),
    'a seed that NumPy does not take': (['--seed', str(2**32)], 'seed is 4294967296; give at most 4294967295'),
    'too short a row': (['--seq-len', '4'], 'give at least 8'),
    'evaluation rows that are not there': (['--eval-data', 'nowhere.jsonl'], 'no such file'),
    'empty model folder': (['--model', 'empty'], 'not a model folder'),
}


@pytest.mark.parametrize('name', OPTIONS)
def test_options(name, here, tiny, rows, command):
    args, part = OPTIONS[name]
    for d in ('full', 'empty'):
        (here/d).mkdir()
    (here/'full'/'notes.txt').write_text('mine')
    for f, text in dict(broken='a: [', typo='seq_length: 3', list='- 1', type='freeze_embed: 3').items():
        (here/f'{f}.yaml').write_text(text)
    for f, text in dict(
        broken='{% for m in',
        endless='{% for m in messages %}{{ m.content }}{% endfor %}',
        deaf='{{ messages[-1].content }}</s>',
        thinks='{% for m in messages %}{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<think>{% endif %}',
    ).items():
        (here/f'{f}.jinja').write_text(text)
    before = sorted(here.rglob('*'))
    code, out, err = command('train', '--model', tiny, '--data', rows, '--n-freeze', 2, '--seq-len', 128, '--out',
                             'run', *args)
    assert (code, out, len(err.splitlines())) == (2, '', 1), err
    assert part in err and sorted(here.rglob('*')) == before, err


def test_options_of_other_types(tmp_path, monkeypatch):
    "Paths, a home folder and a number of layers, as they are written in Python, YAML and on the command line."
    from pathlib import Path
    from alpaca_ft import Refused, RunConfig, cache_dir
    monkeypatch.setenv('HOME', str(tmp_path))
    cfg = RunConfig(data=Path('a.jsonl'), out='~/runs/x', model=Path('~/m'), eval_data='~/e', template='~/t', layers=3)
    assert (cfg.data, cfg.layers) == ('a.jsonl', '3')
    assert (cfg.out, cfg.model) == (f'{tmp_path}/runs/x', f'{tmp_path}/m')
    assert (cfg.eval_data, cfg.template) == (f'{tmp_path}/e', f'{tmp_path}/t')
    assert RunConfig(tags='~', data='a~').tags == '~'
    monkeypatch.setenv('ALPACA_FT_CACHE', '~/cache')
    assert cache_dir() == tmp_path/'cache'
    for wrong in (True, 1.5, None, b'a'):
        with pytest.raises(Refused, match='give a text'):
            RunConfig(data=wrong)
    with pytest.raises(Refused, match='n_freeze is 1.0'):
        RunConfig(n_freeze=1.0)
    assert RunConfig(n_freeze='1').n_freeze == RunConfig(n_freeze=1).n_freeze == 1
    assert RunConfig(n_freeze=24.).n_freeze == 24


def test_unreadable_folder(here, tiny, command):
    (here/'shut').mkdir(mode=0)
    if os.access(here/'shut', os.R_OK):
        pytest.skip('root reads everything')
    code, out, err = command('train', '--model', tiny, '--data', 'shut', '--out', 'run')
    assert code == 2 and 'cannot be read' in err


def test_pickled_weights(here, tiny, rows, command):
    import shutil, torch
    shutil.copytree(tiny, here/'pickled')
    (here/'pickled'/'model.safetensors').unlink()
    torch.save({}, here/'pickled'/'pytorch_model.bin')
    code, out, err = command('train', '--model', './pickled', '--data', rows, '--seq-len', 128, '--out', 'run')
    assert code == 2 and len(err.splitlines()) == 1 and 'pickle' in err and not (here/'run').exists(), err


def test_no_causal_model(here, rows, tiny, command):
    import shutil
    shutil.copytree(tiny, here/'t5')
    config = json.loads((here/'t5'/'config.json').read_text()) | dict(model_type='t5',
                                                                      architectures=['T5ForConditionalGeneration'])
    (here/'t5'/'config.json').write_text(json.dumps(config))
    code, out, err = command('train', '--model', './t5', '--data', rows, '--seq-len', 128, '--out', 'run')
    assert code == 2 and len(err.splitlines()) == 1 and not (here/'run').exists(), err


def test_foreign_tokenizer(here, rows, tiny, command):
    from conftest import tiny_model
    import shutil
    shutil.copytree(tiny, here/'small')
    tiny_model(vocab=500).save_pretrained(here/'small')
    code, out, err = command('train', '--model', './small', '--data', rows, '--seq-len', 128, '--n-freeze', 2, '--out',
                             'run')
    assert code == 2 and len(err.splitlines()) == 1 and '600 tokens, the model 500' in err, err
    assert not (here/'run').exists()


def test_skip_bad_rows(here, tiny, rows, command):
    (here/'mixed.jsonl').write_bytes(rows.read_bytes() + lines(dict(instruction='x'), 7))
    code, out, err = command('check', '--model', tiny, '--data', 'mixed.jsonl', '--n-freeze', 2, '--seq-len', 256,
                             '--skip-bad-rows')
    assert code == 0 and 'left out  2 bad rows, the first: mixed.jsonl: row 41: output is missing' in out, out + err


@pytest.mark.parametrize('shared', [2, 4])
def test_evaluation_rows_that_were_trained_on(shared, here, tiny, rows, command):
    "Some of them: a warning with their number. All of them: refused."
    train = rows.read_bytes().splitlines(keepends=True)
    (here/'eval.jsonl').write_bytes(b''.join(train[:shared])
                                    + lines(*[good | dict(input=str(i)) for i in range(4 - shared)]))
    code, out, err = command('check', '--model', tiny, '--data', rows, '--eval-data', 'eval.jsonl', '--n-freeze', 2,
                             '--seq-len', 256)
    if shared == 2:
        assert code == 0 and 'warning   2 of the evaluation rows are training rows too' in out, out + err
    else:
        assert code == 2 and 'all 4 evaluation rows are training rows too' in err and len(err.splitlines()) == 1, err


def test_one_row_given_twelve_times(here, tiny, command):
    "Duplicates end up on both sides of the split."
    (here/'a.jsonl').write_bytes(lines(*[good]*12))
    code, out, err = command('check', '--model', tiny, '--data', 'a.jsonl', '--n-freeze', 2, '--seq-len', 256)
    assert code == 2 and 'all 1 evaluation rows are training rows too' in err, out + err


@pytest.mark.parametrize('argv,part', [
    (['sample', 'nowhere', '--instruction', 'x'], 'nowhere'),
    (['sample', './tiny', '--instruction', ' '], 'instruction is empty'),
    (['sample', './tiny', '--file', 'nowhere.jsonl'], 'nowhere.jsonl'),
    (['sample', './tiny', '--file', 'ask.jsonl'], "ask.jsonl: row 2: messages: the last turn is the system's"),
    (['evaluate', './tiny', '--data', 'nowhere.jsonl'], 'nowhere.jsonl'),
    (['evaluate', './tiny', '--data', 'ask.jsonl', '--judge-url', 'ftp://x'], 'judge'),
    (['export', './tiny', '--to', 'x'], 'not a run folder'),
    (['export', './tiny'], 'the following arguments are required: --to'),
    (['report', './tiny'], 'not a run folder'),
    (['split', 'nowhere.jsonl', '--out', 'x'], 'nowhere.jsonl'),
    (['split', 'ask.jsonl', '--out', 'tiny'], 'exists already'),
    (['completion', 'powershell'], 'powershell'),
    (['tune'], 'tune'),
    ([], 'required'),
])
def test_other_commands(argv, part, here, tiny, command, monkeypatch):
    "What sample, evaluate, export and the others refuse: one line, and nothing is written."
    import shutil
    # without a network the library asks for a name that is no folder again and again, for 46 seconds
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    shutil.copytree(tiny, here/'tiny')
    (here/'ask.jsonl').write_bytes(lines(good, dict(messages=[turn('system', 'x')])))
    before = sorted(here.rglob('*'))
    code, out, err = command(*argv)
    assert (code, out, len(err.splitlines())) == (2, '', 1), err
    assert part in err and sorted(here.rglob('*')) == before, err


@pytest.mark.parametrize('argv,part', [
    (['sample', './tiny', '--instruction', 'x', '--max-new-tokens', 0], '--max-new-tokens: is 0; give at least 1'),
    (['sample', './tiny', '--instruction', 'x', '--batch-size', 0], '--batch-size: is 0; give at least 1'),
    (['chat', './tiny', '--temperature', -1], '--temperature: is -1; give at least 0'),
    (['chat', './tiny', '--temperature', 'nan'], '--temperature: is nan; give at least 0'),
    (['chat', './tiny', '--max-new-tokens', 'many'], "--max-new-tokens: invalid int value: 'many'"),
    (['chat', './tiny', '--max-new-tokens', 600], '600 new tokens leave no room for a message'),
    (['evaluate', './tiny', '--max-new-tokens', 0], '--max-new-tokens: is 0; give at least 1'),
    (['evaluate', './tiny', '--n-samples', -1], '--n-samples: is -1; give at least 0'),
    (['check', '--show', -1], '--show: is -1; give at least 0'),
])
def test_numbers(argv, part, here, tiny, command):
    "A number that cannot serve is refused before any work."
    import shutil
    shutil.copytree(tiny, here/'tiny')
    code, out, err = command(*argv)
    assert (code, out, len(err.splitlines())) == (2, '', 1) and part in err, err


def test_places_that_cannot_be(here, tiny, rows, command, monkeypatch):
    "A file where a folder should be; a folder where the lock should be; a cache that cannot be made."
    from alpaca_ft.run import LOCK
    options = ['train', '--model', tiny, '--data', rows, '--seq-len', 256, '--n-freeze', 2]
    (here/'runs').write_text('x')
    (here/'r'/LOCK).mkdir(parents=True)
    (here/'r/config.yaml').write_text('model: x\n')
    monkeypatch.setenv('ALPACA_FT_CACHE', '/dev/null/x')
    for argv, why in ((options, 'runs/tiny: cannot be made (File exists); give another --out'),
                      ([*options, '--out', 'r', '--resume'], 'r: cannot be written to'),
                      (['sample', 'demo', '--instruction', 'x'], 'set ALPACA_FT_CACHE')):
        code, out, err = command(*argv)
        assert code == 2 and why in err and len(err.splitlines()) == 1, err


def test_not_the_weights(here, tiny, rows, command):
    "What git leaves without LFS, and an empty file: one line that says so, from whoever reads it."
    import shutil
    pointer = 'version https://git-lfs.github.com/spec/v1\noid sha256:' + 'a'*64 + '\nsize 269060552\n'
    for i, text in enumerate((pointer, '')):
        shutil.copytree(tiny, here/f'm{i}')
        (here/f'm{i}/model.safetensors').write_text(text)
        for argv in (['sample', f'./m{i}', '--instruction', 'x'],
                     ['train', '--model', f'./m{i}', '--data', rows, '--seq-len', 256, '--n-freeze', 2]):
            code, out, err = command(*argv)
            assert code == 2 and 'LFS' in err and len(err.splitlines()) == 1, err


@pytest.mark.parametrize('shown', [0, 9])
def test_reader_who_leaves(shown, tiny, rows, monkeypatch, capfd):
    "`| head -1`: the shell's code for it and not a word, also where all is printed at the end."
    import os
    import sys
    from alpaca_ft.cli import main
    read, write = os.pipe()
    os.close(read)
    with open(write, 'w') as out:
        monkeypatch.setattr(sys, 'stdout', out)
        code = main(['check', '--model', str(tiny), '--data', str(rows), '--seq-len', '256', '--n-freeze', '2',
                     '--show', str(shown)])
    assert code == 141 and 'alpaca_ft' not in capfd.readouterr().err


def test_output_in_another_encoding(tiny, rows, monkeypatch):
    "A character that the terminal does not have is written as an escape."
    import io
    import sys
    from alpaca_ft.cli import main
    out = io.TextIOWrapper(io.BytesIO(), encoding='latin-1')
    monkeypatch.setattr(sys, 'stdout', out)
    assert main(['check', '--model', str(tiny), '--data', str(rows), '--seq-len', '256', '--n-freeze', '2',
                 '--show', '1']) == 0
    assert b'\\u27e6' in out.buffer.getvalue()


def test_one_line_for_a_file():
    "A file that cannot be read or written is named; any other error is a bug, and keeps its traceback."
    from alpaca_ft.cli import foreseen
    assert foreseen(PermissionError(13, 'Permission denied', 'a/b')) == (1, 'a/b: Permission denied')
    assert foreseen(OSError(28, 'No space left on device')) == (1, '[Errno 28] No space left on device')
    assert foreseen(OSError('odd')) == foreseen(KeyError('x')) == (None, None)
