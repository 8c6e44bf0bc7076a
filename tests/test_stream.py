"Rows that stream: the same rows, the same steps, the same end after a kill; what cannot serve is refused early."
import json
import os
import shlex
from pathlib import Path

import pytest

import matrix
import several

COMMON = ['--stream', '--stream-window', 60, '--n-freeze', 2, '--seq-len', 256, '--batch-size', 4, '--dtype', 'fp32',
          '--lr', '1e-3', '--max-steps', 14, '--eval-every', 7, '--n-samples', 2, '--max-new-tokens', 4]


@pytest.fixture(scope='module')
def made():
    "Two hundred rows of the demo: a pass is some twenty steps."
    from alpaca_ft import load_alpaca
    return [dict(row) for row in load_alpaca('demo')['train'].select(range(200))]


@pytest.fixture
def argv(here, tiny, made, ready, monkeypatch):
    "A short run's command line."
    monkeypatch.setenv('ALPACA_FT_CACHE', str(here/'cache'))
    write('my.jsonl', made)
    return lambda out, *more: ['train', '--model', tiny, '--data', 'my.jsonl', *COMMON, '--out', out, *more]


def write(path, rows):
    "JSON lines."
    Path(path).write_text(''.join(json.dumps(row) + '\n' for row in rows))


def metrics(out):
    "The log, but for the speed."
    lines = [json.loads(line) for line in Path(out, 'metrics.jsonl').read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != 'tokens_per_second'} for line in lines]


def model(out):
    "The bytes of the result."
    return Path(out, 'model', 'model.safetensors').read_bytes()


def good(codes, logs):
    "All processes ended well."
    assert not any(codes), (codes, *logs)
    return logs[0]


def killed(at):
    "What has each process killed before a step."
    return lambda number: matrix.kill_at(at)


def test_killed_in_its_middle(argv):
    "In the second pass, over a window's end: the losses, the answers and the bytes of the model are the same."
    save = ['--save-every', 5, '--max-steps', 50, '--eval-every', 25]
    said = good(*several.run(1, argv('whole', *save)))
    assert 'begins anew where it ends before' in said and 'computed each time (rows of a stream are seen once)' in said
    assert 1 < metrics('whole')[-1]['epoch'] < 3
    assert several.run(1, argv('killed', *save), before=killed(44))[0] == [-9]
    said = good(*several.run(1, argv('killed', *save, '--resume')))
    assert 'going on from killed/checkpoints/step-40' in said
    assert metrics('whole') == metrics('killed') and model('whole') == model('killed')
    assert Path('whole/samples.jsonl').read_text() == Path('killed/samples.jsonl').read_text()
    changed = Path('my.jsonl').read_text().replace('a', 'e', 1)
    Path('my.jsonl').write_text(changed)
    codes, logs = several.run(1, ['evaluate', 'whole', '--n-samples', 1])
    assert codes == [2] and 'the rows are not those of the run any more' in logs[0]


def test_two_processes(argv):
    "The same steps in two processes as in one; killed, they go on to the same end."
    good(*several.run(1, argv('one')))
    good(*several.run(2, argv('two', '--save-every', 4)))
    largest = 0.
    for a, b in zip(metrics('one'), metrics('two'), strict=True):
        assert a.keys() == b.keys() and a['epoch'] == b['epoch'] and a.get('tokens') == b.get('tokens')
        largest = max(largest, *(abs(a[k] - b[k]) for k in a if isinstance(a[k], float)))
    assert largest < 1e-5
    assert several.run(2, argv('killed', '--save-every', 4), before=killed(11))[0] == [-9, -9]
    codes, logs = several.run(2, argv('killed', '--save-every', 4, '--resume'))
    assert 'going on from killed/checkpoints/step-8' in good(codes, logs) and logs[1].strip() == ''
    assert metrics('two') == metrics('killed') and model('two') == model('killed')


def test_counted(argv, command):
    "Without --max-steps a pass is counted first, once, and the steps are those of the ordinary run on these rows."
    argv('')
    words = [str(a) for a in argv('run', '--epochs', 2) if a not in ('--max-steps', 14)]
    code, out, err = command('check', *words[1:])
    assert code == 0 and 'rows counted in' in err
    code, out, err = command(*words)
    assert code == 0 and 'rows counted' not in err and 'not counted' not in err, err
    about = json.loads(Path('run/preflight.json').read_text())
    assert about['steps'] == 2*about['steps_per_epoch'] and about['train']['examples'] == 180
    lines = metrics('run')
    assert lines[-1]['step'] == about['steps'] and lines[-1]['epoch'] == 2
    per_pass = about['steps_per_epoch']
    assert {line['epoch'] for line in lines if line['step'] == per_pass} == {1.}
    seen = [line['tokens'] for line in lines if line['step'] in (per_pass, 2*per_pass) and 'tokens' in line]
    assert seen[1] == 2*seen[0] == 2*about['train']['packed_tokens']  # each row once a pass


@pytest.mark.parametrize('kind', ['half a line', 'not for the template'])
def test_a_bad_row_in_its_middle(kind, argv, made, command):
    "Its line is named, what was computed is kept, and the run goes on without it."
    bad, why, more = '{"instruction": "half a li', 'not a JSON object', []
    if kind == 'not for the template':
        bad, more = json.dumps(made[0] | dict(output='a </s> b')), ['--template', 'own.jinja']
        why = "the assistant's text holds the special token"
        Path('own.jinja').write_text("{% for m in messages %}{{ m.role + ':' + m.content }}"
                                     "{{ eos_token if m.role == 'assistant' }}{% endfor %}"
                                     "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}")
    rows = [json.dumps(row) + '\n' for row in made]
    words = argv('bad')  # writes the file
    words += ['--max-steps', 24, '--eval-data', 'eval.jsonl', *more]
    write('eval.jsonl', made[:10])
    Path('my.jsonl').write_text(''.join(rows[:150]) + f'\n{bad}\n' + ''.join(rows[150:]))
    code, out, err = command(*words)
    said = err.splitlines()[-1]
    assert code == 1 and f'my.jsonl: row 152: {why}' in said, said
    at, = Path('bad/checkpoints').iterdir()
    assert f'the last checkpoint is {at}' in said and '--skip-bad-rows' in said, said
    code, out, err = command(*shlex.split(said.split('go on with: alpaca_ft ')[1]))
    assert code == 0 and '1 bad rows are left out, the first: my.jsonl: row 152' in err, err
    code, out, err = command(*words, '--skip-bad-rows', '--out', 'whole')
    assert code == 0 and metrics('whole') == metrics('bad') and model('whole') == model('bad')
    command('sample', 'bad', '--instruction', 'Hello?', '--max-new-tokens', 2)
    code, out, err = command('evaluate', 'bad', '--n-samples', 1, '--max-new-tokens', 2)
    assert code == 0 and 'loss, response tokens' in out, err


def test_refused(argv, command, here, made):
    "In one line, before any work, with nothing left behind."
    before = sorted(here.iterdir())

    def why(*more, rows=None):
        words = argv('no', *more)
        if rows is not None:
            Path('my.jsonl').write_text(rows)
        code, out, err = command(*words)
        assert code == 2 and not Path('no').exists(), (code, err)
        return err.splitlines()[-1]

    for option, word in (('--prefix-cache=disk', 'seen once'), ('--prefix-cache=memory', 'seen once'),
                         ('--layer-by-layer', 'which a stream does not have'),
                         ('--near-duplicates=0.8', 'compares all rows')):
        assert word in why(option)
    assert 'a JSON list' in why(rows=json.dumps(made))
    assert 'my.jsonl: row 3: output is missing' in why(rows=''.join(
        json.dumps(row) + '\n' for row in [*made[:2], dict(instruction='a'), *made[2:]]))
    assert 'no usable rows' in why(rows='\n\n')
    assert 'no row is left to train on' in why(rows=json.dumps(made[0]))
    Path('my.jsonl.gz').write_bytes(b'')
    assert "'.gz' is not streamed" in why('--data=my.jsonl.gz')
    assert 'no such file or folder' in why('--data=other.jsonl')
    os.remove('my.jsonl.gz')
    assert sorted(here.iterdir()) == sorted({*before, here/'my.jsonl'}), 'something was left'


def test_few_rows(argv, made):
    "Fewer rows than a window has, and fewer packed rows than a batch: the pass is one short step."
    write('my.jsonl', made[:5])
    good(*several.run(1, argv('few', '--stream-window', 10_000, '--max-steps', 3, '--n-samples', 0)))
    assert [line['epoch'] for line in metrics('few') if 'loss' in line] == [1., 2., 3.]


def test_rows_reach_training_once(here, made, tokenizer):
    "Over windows, files and kinds of files: every row but those held out, each once; a repetition of one never."
    import pyarrow as pa
    import pyarrow.parquet as pq
    from alpaca_ft import RunConfig
    from alpaca_ft.stream import START, open_stream
    Path('rows').mkdir()
    write('rows/train-a.jsonl', [*made[:40], made[0], *made[40:50]])
    pq.write_table(pa.Table.from_pylist(made[50:]), 'rows/train-b.parquet', row_group_size=30)
    stream, seen, start = open_stream(RunConfig(data='rows', stream=True, stream_window=33)), [], START
    while start:
        portion = stream.portion(start)
        assert stream.portion(start).rows == portion.rows
        seen += portion.rows
        start = portion.next
    held = list(stream.test)
    assert len(held) == 21 and not [row for row in held if row in seen]
    assert {str(row) for row in seen + held} == {str(row) for row in made} and len(seen) == len({*map(str, seen)})


def test_a_changed_file(here, made, tokenizer):
    "A file that is written to while it is read is noticed at the next window."
    from alpaca_ft import Refused, RunConfig
    from alpaca_ft.stream import START, open_stream
    write('my.jsonl', made)
    stream = open_stream(RunConfig(data='my.jsonl', stream=True, stream_window=33))
    following = stream.portion(START).next
    with open('my.jsonl', 'a') as f:
        f.write('\n')
    with pytest.raises(Refused, match='was changed while it was read'):
        stream.portion(following)


def test_a_data_set_of_the_hub(here, made, monkeypatch):
    "Streamed by datasets at the version that the hub names; the test split is loaded, the state is the place."
    import datasets
    import huggingface_hub
    from alpaca_ft import RunConfig
    from alpaca_ft.stream import START, open_stream
    write('train.jsonl', made[:150])
    write('test.jsonl', made[150:])
    local = datasets.load_dataset('json', data_files=dict(train='train.jsonl', test='test.jsonl'), streaming=True,
                                  cache_dir=str(here/'cache'))
    asked = []
    monkeypatch.setattr(datasets, 'load_dataset', lambda name, **kw: asked.append((name, kw)) or local)
    monkeypatch.setattr(huggingface_hub.HfApi, 'dataset_info', lambda self, name: type('Info', (), dict(sha='abc')))
    stream = open_stream(RunConfig(data='someone/rows', stream=True, stream_window=60))
    assert asked == [('someone/rows', dict(revision='abc', streaming=True))]
    assert list(stream.test) == made[150:]
    following = json.loads(json.dumps(stream.portion(START).next))
    assert stream.portion(following).rows == made[60:120]
