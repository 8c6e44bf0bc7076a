"Folders of rows: every file is read, its name tells the split, and nothing is lost without a word."
import json
import subprocess
import sys

import pytest
import several

from alpaca_ft import Refused, load_alpaca, read_rows

DEEP = '[' * 200_000


def some(first, n=4):
    "Different rows."
    return [dict(instruction=f'Say {i}.', input='', output=f'{i}!') for i in range(first, first + n)]


def write(path, rows):
    "JSON lines, a JSON list or Parquet, as the suffix says."
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == '.parquet':
        import pyarrow as pa
        import pyarrow.parquet as pq
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == '.json':
        path.write_text(json.dumps(rows))
    else:
        path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def loaded(source):
    "Split -> rows."
    return {split: ds.to_list() for split, ds in load_alpaca(source).items()}


def test_the_articles_layout(here):
    write(here/'a/alpaca_gpt4_train.jsonl', some(0))
    write(here/'a/alpaca_gpt4_eval.jsonl', some(4))
    assert loaded('a') == dict(train=some(0), test=some(4))


def test_validation_serves_as_test(here, capsys):
    write(here/'a/train.jsonl', some(0))
    write(here/'a/validation.jsonl', some(4))
    assert loaded('a') == dict(train=some(0), test=some(4))
    assert capsys.readouterr().err == ''


def test_validation_beside_test_is_named(here, capsys):
    write(here/'a/train.jsonl', some(0))
    write(here/'a/test.jsonl', some(4))
    write(here/'a/dev.jsonl', some(8))
    assert loaded('a') == dict(train=some(0), test=some(4))
    out, err = capsys.readouterr()
    assert out == ''
    assert len(err.splitlines()) == 1
    assert 'left out' in err and 'dev.jsonl' in err


def test_a_run_evaluates_on_the_validation_rows(here):
    from alpaca_ft import RunConfig
    from alpaca_ft.run import load_rows
    write(here/'a/train.jsonl', some(0))
    write(here/'a/valid.jsonl', some(4))
    ds, _ = load_rows(RunConfig(data='a'))
    assert ds['train'].to_list() == some(0)
    assert ds['test'].to_list() == some(4)


def test_a_folder_without_training_rows(here):
    "Refused in one line, with rows to evaluate on too."
    from alpaca_ft import RunConfig
    from alpaca_ft.run import load_rows
    write(here/'a/test.jsonl', some(0))
    write(here/'b.jsonl', some(4))
    for more in (dict(), dict(eval_data='b.jsonl')):
        with pytest.raises(Refused, match='a: has test, but no train split'):
            load_rows(RunConfig(data='a', **more))


def test_files_of_one_name(here):
    "train.json beside train.jsonl: both, in sorted order."
    write(here/'a/train.jsonl', some(0))
    write(here/'a/train.json', some(4))
    assert loaded('a') == dict(train=some(4) + some(0))


def test_parquet_and_subfolders(here):
    write(here/'a/train.jsonl', some(0))
    write(here/'a/train2.parquet', some(4))
    write(here/'a/sub/more.ndjson', some(8))
    write(here/'a/sub/sub/eval.parquet', some(12))
    assert loaded('a') == dict(train=some(8) + some(0) + some(4), test=some(12))


def test_a_subfolder_tells_the_split_if_the_file_does_not(here):
    write(here/'a/train/part1.jsonl', some(0))
    write(here/'a/test/part1.jsonl', some(4))
    write(here/'a/test/train.jsonl', some(8))
    assert loaded('a') == dict(train=some(8) + some(0), test=some(4))


def test_no_split_in_the_name(here):
    "A word counts, not a part of one; the folder's own name does not count."
    write(here/'test/detest.jsonl', some(0))
    write(here/'test/latest.jsonl', some(4))
    assert loaded('test') == dict(train=some(0) + some(4))


WORDS = dict(train=['train', 'training'], test=['test', 'testing', 'eval', 'evaluation'],
             validation=['valid', 'validation', 'val', 'dev'])


@pytest.mark.parametrize('split,word', [(split, word) for split in WORDS for word in WORDS[split]])
def test_words_are_those_of_datasets(split, word, here):
    import datasets
    datasets.disable_progress_bars()
    name = f'my_{word}-2.jsonl'
    write(here/'a'/name, some(0))
    theirs = datasets.load_dataset('json', data_dir='a', cache_dir='cache')
    assert list(theirs) == [split]
    assert list(loaded('a')) == ['test' if split == 'validation' else split]


def test_a_name_of_two_splits(here):
    write(here/'a/train_test.jsonl', some(0))
    with pytest.raises(Refused, match='train_test.jsonl: the name says both train and test'):
        load_alpaca('a')


def test_other_files(here):
    write(here/'a/train.jsonl', some(0))
    write(here/'a/.cache/train.jsonl', some(4))
    (here/'a/README.md').write_text('# Rows')
    (here/'a/.train.json').write_text('{}')
    (here/'a/notes.txt').write_text('mine')
    assert loaded('a') == dict(train=some(0))


def test_json_that_is_no_rows(here):
    write(here/'a/train.jsonl', some(0))
    (here/'a/notes.json').write_text('{"default": {"splits": {}}}')
    with pytest.raises(Refused, match='notes.json: row 1: instruction is missing'):
        load_alpaca('a')


def test_what_lies_beside_rows(here):
    "A clone of a data set, and runs in the folder of their rows: neither's own files are taken for rows."
    write(here/'a/data/train.jsonl', some(0))
    (here/'a/dataset_infos.json').write_text('{"default": {"splits": {}}}')
    (here/'a/run/model').mkdir(parents=True)
    for name in ('config.yaml', 'preflight.json', 'metrics.jsonl', 'model/config.json'):
        (here/'a/run'/name).write_text('{"step": 1}')
    assert loaded('a') == dict(train=some(0))
    (here/'b').mkdir()
    write(here/'b/state.json', some(4))
    (here/'b/config.yaml').write_text('mine: true')
    assert loaded('b') == dict(train=some(4))


def test_saved_by_datasets(here):
    "What save_to_disk leaves, of one split and of several: refused with the way to a file that can be read."
    from datasets import Dataset, DatasetDict
    ds = Dataset.from_list(some(0))
    ds.save_to_disk('one')
    DatasetDict(train=ds).save_to_disk('more')
    for name in ('one', 'more'):
        with pytest.raises(Refused, match=f'^{name}: was saved by datasets; .*to_parquet'):
            load_alpaca(name)


HARD = [dict(instruction='Sag "Hallo"; oder, so.', input='', output='Hallo 😀'),
        dict(instruction='Three lines', input='a\n\nb', output='1'),
        dict(instruction=' x ', input='', output="it's; \t, all")]


@pytest.mark.parametrize('name,delimiter,mark,end', [
    ('a.csv', ',', '', '\n'), ('a.csv', ';', '\ufeff', '\r\n'), ('a.CSV', '\t', '', '\r\n'),
    ('a.tsv', '\t', '\ufeff', '\r\n')])
def test_csv(name, delimiter, mark, end, here):
    "As Excel and others write it: the rows of the same JSON lines; numbers are texts."
    import csv
    with open(name, 'w', newline='', encoding='utf-8') as f:
        f.write(mark)
        table = csv.writer(f, delimiter=delimiter, lineterminator=end)
        table.writerow(['id', *HARD[0]])
        table.writerows([i, *row.values()] for i, row in enumerate(HARD))
        f.write(delimiter*3 + end + end)
    assert loaded(name) == dict(train=HARD)
    assert [number for number, _ in read_rows(name)] == [2, 3, 4]
    (here/'folder').mkdir()
    (here/name).rename(here/'folder'/f'train{name[1:]}')
    assert loaded('folder') == dict(train=HARD)


@pytest.mark.parametrize('text,why', [
    (b'instruction,output\nHi,Hello, you.\n', 'a.csv: row 2: the number of its cells is 3, where the first row names'),
    (b'instruction,output\nHi,Hello.\nHi\n', 'a.csv: row 3: the number of its cells is 1, where'),
    (b'instruction,output\nHi,"Hello.\nHi,x\n', 'a.csv: row 2 is not valid CSV (unexpected end of data)'),
    (b'instruction,output\nHi,"a"b\n', 'a.csv: row 2 is not valid CSV'),
    ('instruction,output\nHi,é\n'.encode('latin-1'), 'a.csv: is not UTF-8'),
    ('instruction,output\nHi,x\n'.encode('utf-16'), 'a.csv: is not UTF-8'),
    (b'question;answer\nHi;x\n', 'give --columns instruction=question,output=answer'),
    (b'output,instruction,output\nHi,x,y\n', 'a.csv: names the column output twice'),
    (b'', 'a.csv: no usable rows'),
    (b'instruction,output\n', 'a.csv: no usable rows')])
def test_csv_that_is_none(text, why, here):
    (here/'a.csv').write_bytes(text)
    with pytest.raises(Refused) as e:
        load_alpaca('a.csv')
    assert why in str(e.value) and len(str(e.value).splitlines()) == 1
    assert 'cells' not in why or len(load_alpaca_or_none('a.csv')) == ('row 3' in why)


def load_alpaca_or_none(source):
    "The good rows."
    try:
        return load_alpaca(source, skip_bad=True)['train']
    except Refused:
        return []


def test_csv_is_not_streamed(here):
    from alpaca_ft import RunConfig, open_stream
    (here/'a.csv').write_text('instruction,output\nHi,x\n')
    with pytest.raises(Refused, match=r"a.csv: '.csv' is not streamed"):
        open_stream(RunConfig(data='a.csv', stream=True))
    write(here/'b/train.jsonl', some(0))
    (here/'a.csv').rename(here/'b/train.csv')
    with pytest.raises(Refused, match=r"b/train.csv: '.csv' is not streamed"):
        open_stream(RunConfig(data='b', stream=True))


def test_system_and_history(here):
    "The fields of LLaMA-Factory's rows are turns of the chat; what cannot be one is named."
    from alpaca_ft import as_row
    row = dict(instruction='And now?', input='', output='Arr.')
    assert as_row(row | dict(system='', history=[], tools='[]')) == (row, None)
    pirate = row | dict(system='You are a pirate.', history=[['Hi.', 'Ahoy.']], input='Say it.')
    chat = [dict(role='system', content='You are a pirate.'), dict(role='user', content='Hi.'),
            dict(role='assistant', content='Ahoy.'), dict(role='user', content='And now?\n\nSay it.'),
            dict(role='assistant', content='Arr.')]
    made, problem = as_row(pirate)
    assert problem is None and json.loads(made['messages']) == chat
    turns = [{'from': dict(assistant='gpt').get(turn['role'], 'human'), 'value': turn['content']} for turn in chat[1:]]
    assert as_row(dict(system='You are a pirate.', conversations=turns)) == (made, None)
    brief = as_row(dict(system='Be brief.', prompt='a', completion='b'))[0]
    assert json.loads(brief['messages'])[0] == dict(role='system', content='Be brief.')
    assert as_row(dict(system='Sort.', text='x', output='y'), dict(instruction='system', input='text'))[0] == dict(
        instruction='Sort.', input='x', output='y')
    for more, why in ((dict(history='He fell ill.'), 'history is not a list of'), (dict(history=[['a']]), 'history is'),
                      (dict(system=['x']), 'turn 1 has parts'), (dict(tools=[{'name': 'f'}]), 'tools is not empty'),
                      (dict(history=[['a', '']]), 'turn 2 has no text')):
        assert why in as_row(row | more)[1], more
    assert as_row(row | dict(system='x', instruction=3))[0]['instruction'] == 3  # `row_problem` names it
    write(here/'a.jsonl', [pirate]*3)
    assert 'messages' in load_alpaca('a.jsonl')['train'].column_names


def test_system_and_history_of_questions(here):
    "Rows that are asked keep them too, with an answer or without."
    from alpaca_ft.use import ask_rows
    before = dict(system='You are a pirate.', history=[['Hi.', 'Ahoy.']])
    question = [dict(role='user', content='Hi.'), dict(role='assistant', content='Ahoy.')]
    rows = [before | dict(instruction='And now?', input='Say it.'), before | dict(prompt='And now?', output='Arr.'),
            before | dict(q='And now?'), before | dict(messages=question + [dict(role='user', content='And now?')]),
            dict(instruction='a\r\nb', input='  ', system=' '), dict(instruction='Sort.', system='b')]
    write(here/'a.jsonl', rows[:2] + rows[3:5])
    asked = ask_rows('a.jsonl')
    turns = [[(turn['role'][0], turn['content']) for turn in json.loads(row['messages'])] for row in asked[:3]]
    begin = [('s', 'You are a pirate.'), ('u', 'Hi.'), ('a', 'Ahoy.')]
    assert turns[0][:-1] == [*begin, ('u', 'And now?\n\nSay it.')]
    assert turns[1] == [*begin, ('u', 'And now?'), ('a', 'Arr.')]
    assert turns[2][:-1] == [*begin, *begin[1:], ('u', 'And now?')]
    assert asked[3]['instruction'] == 'a\nb' and asked[3]['input'] == '' and 'messages' not in asked[3]
    write(here/'b.jsonl', [rows[2]])
    assert json.loads(ask_rows('b.jsonl', dict(instruction='q'))[0]['messages'])[-2]['content'] == 'And now?'
    write(here/'b.jsonl', [rows[5]])
    assert 'messages' not in ask_rows('b.jsonl', dict(input='system'))[0]
    write(here/'b.jsonl', [dict(instruction='a', history='He fell ill.')])
    with pytest.raises(Refused, match='b.jsonl: row 1: history is not a list of'):
        ask_rows('b.jsonl')


def test_ends_of_lines_and_blank_inputs(here):
    "A blank is no input, and lines end as everywhere."
    chat = [dict(role='user', content='a\r\nb'), dict(role='assistant', content='c\r\n\r\nd')]
    write(here/'a.jsonl', [dict(instruction='a\r\nb', input=' ', output='c\r\n\r\nd'), dict(messages=chat)])
    assert loaded('a.jsonl')['train'] == [dict(instruction='a\nb', input='', output='c\n\nd')]*2


def test_names_in_other_scripts(here):
    "Column names can be copied from the message; what does not print cannot."
    write(here/'a.jsonl', [{'问题': 'x', 'a\x1b\u202e': 'y'}])
    with pytest.raises(Refused, match=r'it has 问题, a\\x1b\\u202e: say with --columns'):
        load_alpaca('a.jsonl')


def test_a_bad_row_is_found_in_its_file(here):
    write(here/'a/train.jsonl', some(0))
    write(here/'a/sub/train.jsonl', some(4) + [dict(instruction='x')])
    with pytest.raises(Refused, match='sub/train.jsonl: row 5: output is missing'):
        load_alpaca('a')
    bad = []
    assert len(load_alpaca('a', skip_bad=True, bad=bad)['train']) == 8
    assert bad == ['a/sub/train.jsonl: row 5: output is missing']


def test_no_copy_of_a_folder(here, monkeypatch):
    "Rows go straight into the table: no temporary folder, and no cache."
    import tempfile
    write(here/'a/train.jsonl', some(0))
    monkeypatch.setenv('ALPACA_FT_CACHE', str(here/'cache'))
    monkeypatch.setattr(tempfile, 'tempdir', str(here/'no such folder'))
    assert loaded('a') == dict(train=some(0))
    assert sorted(path.name for path in here.rglob('*')) == ['a', 'train.jsonl']


def test_an_unreadable_subfolder(here, monkeypatch):
    import os
    write(here/'a/train.jsonl', some(0))
    (here/'a/shut').mkdir()
    scandir = os.scandir

    def shut(path):
        if str(path).endswith('shut'):
            raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', shut)
    with pytest.raises(Refused, match='a/shut: cannot be read'):
        load_alpaca('a')


@pytest.mark.parametrize('name', ['rows.JSONL', 'rows.Json', 'rows.NDJSON', 'rows.PARQUET'])
def test_suffixes_in_capitals(name, here):
    write(here/name.lower(), some(0))
    (here/name.lower()).rename(here/name)
    assert loaded(name) == dict(train=some(0))
    (here/'a').mkdir()
    (here/name).rename(here/'a'/name)
    assert loaded('a') == dict(train=some(0))


@pytest.mark.parametrize('name,text,row', [
    ('deep.jsonl', json.dumps(some(0)[0]) + '\n{"instruction":' + DEEP, 2),
    ('deep.json', '{"instruction": "x", "output": ' + DEEP + ']' * 200_000 + '}', 1),
    ('list.json', json.dumps(some(0))[:-1] + ', ' + DEEP, 5),
    ('list.json', '[{"instruction": "[{,\\"[", "output": [1, [2]]}, {"a": ' + '{"a":' * 200_000, 2),
])
def test_deep_nesting(name, text, row, here):
    (here/name).write_text(text)
    with pytest.raises(Refused, match=f'^{name}: row {row} is nested too deeply') as e:
        load_alpaca(name)
    assert len(str(e.value).splitlines()) == 1


def test_byte_order_mark(here):
    "It is no part of the first row, and the byte that is named counts it."
    (here/'a.jsonl').write_bytes(b'\xef\xbb\xbf' + json.dumps(some(0)[0]).encode())
    assert read_rows('a.jsonl') == [(1, some(0)[0])]
    (here/'b.jsonl').write_bytes(b'\xef\xbb\xbf"\xe9"')
    with pytest.raises(Refused, match='b.jsonl: byte 5 is not UTF-8'):
        read_rows('b.jsonl')


@pytest.mark.parametrize('splits,used,named', [
    (['train', 'validation'], ['train', 'test'], []),
    (['train', 'test'], ['train', 'test'], []),
    (['train', 'validation', 'test'], ['train', 'test'], ['validation']),
    (['train', 'unsupervised'], ['train'], ['unsupervised']),
])
def test_splits_of_the_hub(splits, used, named, monkeypatch, capsys):
    "The same rule as for folders."
    import datasets
    parts = {split: datasets.Dataset.from_list(some(4*i)) for i, split in enumerate(splits)}
    monkeypatch.setattr(datasets, 'load_dataset', lambda name: datasets.DatasetDict(parts))
    ds = load_alpaca('someone/rows')
    assert list(ds) == used
    if 'test' in used:
        source = 'test' if 'test' in splits else 'validation'
        assert ds['test'].to_list() == parts[source].to_list()
    err = capsys.readouterr().err
    assert len(err.splitlines()) == len(named)
    assert all(name in err for name in named)


def test_an_error_without_words(monkeypatch, here):
    "A library that raises without a message is quoted by the type of its error."
    import wandb

    def nothing(**kw):
        raise AssertionError

    monkeypatch.setattr(wandb, 'Api', nothing)
    monkeypatch.setenv('WANDB_API_KEY', 'x'*40)
    with pytest.raises(Refused, match='not available .AssertionError.'):
        load_alpaca('me/proj/data:v0')


def test_quick_import():
    "The module itself needs none of the large libraries."
    code = ("import sys, alpaca_ft.data; "
            "print([m for m in ('torch', 'datasets', 'pyarrow', 'numpy') if m in sys.modules])")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout == '[]\n', done.stderr


def test_near_duplicates():
    "Pairs of known similarity: those above the threshold are found, and no other; chats by their turns."
    import random
    from alpaca_ft.data import near_duplicates, phrases, similarity
    from datasets import Dataset
    rng, names = random.Random(0), [f'w{i}' for i in range(4000)]
    first, second = [], []
    for _ in range(300):
        words = [rng.choice(names) for _ in range(60)]
        first.append(dict(instruction='Do it', input='', output=' '.join(words)))
        for _ in range(rng.randint(0, 8)):
            words[rng.randrange(60)] = rng.choice(names)
        second.append(dict(instruction='Do it', input='', output=' '.join(words)))
    true = [similarity(phrases(a.values()), phrases(b.values())) for a, b in zip(first, second)]
    for threshold in (.5, .8):
        near = sum(s >= threshold for s in true)
        found = near_duplicates(Dataset.from_list(first), Dataset.from_list(second), threshold)
        assert 50 < near < 300 and (found['train'], found['eval']) == (0, near), (threshold, near, found)
        assert (
            near_duplicates(Dataset.from_list(first + second), Dataset.from_list(first[:1]), threshold)['train'] == near
        )
    chats = [
        dict(
            instruction='b',
            input='',
            output='c',
            messages=json.dumps([dict(role='user', content=c), dict(role='assistant', content='c')]),
        )
        for c in 'abde'
    ]
    assert near_duplicates(Dataset.from_list(chats), Dataset.from_list(chats[:1]), .5)['train'] == 0


def animal_rows():
    "Twelve made rows; none is near another."
    rows = []
    for n in 'cat dog owl fox hen cow pig ant bee elk yak emu'.split():
        rows.append(dict(instruction=f'Say what the {n} does when the {n} is alone.', input='',
                         output=f'The {n} sits by the {n} house and waits until someone calls the {n} back in.'))
    return rows


def test_near_duplicates_in_a_run(here, tiny, command):
    "Lines of check, and the same in preflight.json; made rows, three of them nearly said before."
    from alpaca_ft import RunConfig, train
    base = animal_rows()
    near = [r | dict(output=r['output'] + ' Then it eats.') for r in base[:3]]
    other = [base[5] | dict(output=base[5]['output'][:-1] + ' now.'),
             dict(instruction='Count.', input='', output='One, two.')]
    for name, rows in dict(train=base + near, eval=other).items():
        (here/f'{name}.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    args = ['--model', tiny, '--data', 'train.jsonl', '--eval-data', 'eval.jsonl', '--n-freeze', 2, '--seq-len', 256]
    code, out, err = command('check', *args, '--near-duplicates', 0.7)
    said = ('near      3 training rows nearly repeat an earlier one, 1 evaluation rows a training row '
            '(70% of their phrases or more)')
    assert code == 0 and said in out, out + err
    assert 'near ' not in command('check', *args)[1]
    run = train(RunConfig(model=str(tiny), data='train.jsonl', eval_data='eval.jsonl', n_freeze=2, seq_len=256,
                          max_steps=1, n_samples=0, out='run', near_duplicates=.7))
    said = json.loads((run.out/'preflight.json').read_text())['near_duplicates']
    assert (said['threshold'], said['train'], said['eval']) == (.7, 3, 1)
    assert ['eval', base[5]['instruction'], base[5]['instruction']] in said['pairs']
    code, out, err = command('check', *args, '--near-duplicates', 7)
    assert code == 2 and 'give 0.1 to 1' in err


def test_near_duplicates_without_the_library(here, tiny):
    "Refused in one line before anything is read or written."
    r = several.command('train', '--data', 'builtin', '--near-duplicates', 0.8, '--out', 'run',
                        before=lambda: several.absent('datasketch'))
    assert (r.returncode, r.stdout, len(r.stderr.splitlines())) == (
        2,
        '',
        1,
    ) and 'pip install datasketch' in r.stderr, r.stderr
    assert not list(here.iterdir())
