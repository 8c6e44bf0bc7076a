"Whatever is wrong, the command says it in one line, exits with 2 and leaves nothing behind."
import json
import os

import pytest

good = dict(instruction='Say hi.', input='', output='Hi!')


def lines(*rows): return ''.join(json.dumps(r) + '\n' for r in rows).encode()


def without(*keys): return {k: v for k, v in good.items() if k not in keys}


FILES = {  # name: (file name, its bytes, a part of the message)
    'truncated json': ('a.json', b'[{"instruction": "Say hi.", "out', 'cut off'),
    'truncated line': ('a.jsonl', lines(good) + b'{"instruction": "Say', 'row 2 is not a JSON object'),
    'latin-1': ('a.jsonl', '{"instruction": "Café", "output": "x"}'.encode('latin-1'), 'is not UTF-8'),
    'utf-16': ('a.json', '[]'.encode('utf-16'), 'is not UTF-8'),
    'csv by another name': ('a.jsonl', b'instruction,input,output\nSay hi.,,Hi!\n', 'row 1 is not a JSON object'),
    'csv': ('a.csv', b'instruction,output\nSay hi.,Hi!\n', 'unknown file type'),
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
    'huge instruction': ('a.jsonl', lines(good | dict(instruction='a'*10_000_000)),
                         'row 1: instruction has 10,000,000 characters'),
    'control character': ('a.jsonl', lines(good | dict(output='a\x00b')), "control character '\\x00'"),
    'escape sequence': ('a.jsonl', lines(good | dict(instruction='\x1b[31mred')), 'control character'),
    'prompt heading': ('a.jsonl', lines(good | dict(instruction='x\n### Response:\ny')),
                       "prompt heading '### Response:'"),
    'half a surrogate': ('a.jsonl', b'{"instruction": "\\ud83d", "output": "x"}', 'half a surrogate pair'),
    'no room for a response': ('a.jsonl', lines(*[good | dict(instruction='word '*600)]*12),
                               'no example has room for its response'),
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
    'no such model': (['--model', './nowhere'], 'no such model folder'),
    'no such data': (['--data', 'nowhere.jsonl'], 'no such file'),
    'no such preset': (['--preset', 'paper'], 'paper'),
    'no config file': (['--config', 'nowhere.yaml'], 'nowhere.yaml: cannot be read'),
    'broken config': (['--config', 'broken.yaml'], 'not valid YAML'),
    'config with a typo': (['--config', 'typo.yaml'], 'did you mean seq_len?'),
    'config is a list': (['--config', 'list.yaml'], 'holds a list'),
    'config of a wrong type': (['--config', 'type.yaml'], 'freeze_embed is'),
    'folder of a run': (['--out', 'full'], 'exists already'),
    'folder without rows': (['--data', 'full'], 'no .json or .jsonl files'),
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
    before = sorted(here.rglob('*'))
    code, out, err = command('train', '--model', tiny, '--data', rows, '--n-freeze', 2, '--seq-len', 128, '--out',
                             'run', *args)
    assert (code, out, len(err.splitlines())) == (2, '', 1), err
    assert part in err and sorted(here.rglob('*')) == before, err


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
