"Ten thousand rows and a thousand config files that nobody would write: an answer or one line, never a traceback."
import json

from hypothesis import HealthCheck, given, settings, strategies as st

from alpaca_ft import Refused, RunConfig, clean_rows, read_config, read_rows, row_problem, tokenize

fixed = dict(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
texts = st.one_of(st.text(max_size=40),
                  st.sampled_from(['', ' ', 'Say hi.', '</s>', '### Response:\n', '\x00', '\ud83d', '﻿', '\u202e',
                                   'é'*30, '{}', 'null']))
values = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
                      lambda v: st.lists(v, max_size=3) | st.dictionaries(texts, v, max_size=3), max_leaves=4)
keys = st.sampled_from(['instruction', 'input', 'output'])
rows = st.one_of(st.fixed_dictionaries(dict(instruction=texts, input=texts, output=texts)),
                 st.dictionaries(keys, st.one_of(texts, values), max_size=3), values)
seen = dict(rows=0, good=0)


def one_line(e): assert str(e) and len(str(e).splitlines()) == 1, repr(str(e))


@settings(max_examples=700, **fixed)
@given(st.lists(rows, min_size=15, max_size=18), st.booleans())
def check_rows(tmp, tokenizer, batch, as_list):
    "Rows written as JSON, read back, cleaned, tokenized."
    seen['rows'] += len(batch)
    for r in batch:
        assert row_problem(r) is None or isinstance(row_problem(r), str)
    text = json.dumps(batch) if as_list else ''.join(json.dumps(r) + '\n' for r in batch)
    path = tmp/'rows.jsonl'
    path.write_text(text, encoding='utf-8')
    bad = []
    try:
        good = clean_rows(read_rows(path), path, True, bad)
    except Refused as e:
        one_line(e)
        return
    assert len(good) + len(bad) == len(batch) and all(set(map(type, r.values())) == {str} for r in good)
    for b in bad:
        one_line(Refused(b))
    seen['good'] += len(good)
    if seen['rows'] % 5 == 0:
        from datasets import Dataset
        tok = tokenize(Dataset.from_list(good), tokenizer)
        for ids, mask in zip(tok['input_ids'], tok['completion_mask']):
            assert len(ids) == len(mask) and ids.count(tokenizer.eos_token_id) == 1
            assert ids[-1] == tokenizer.eos_token_id and mask[-1]


def test_rows(tmp_path, tokenizer):
    import datasets
    datasets.disable_progress_bars()
    check_rows(tmp_path, tokenizer)
    assert seen['rows'] >= 10_000 and seen['good'] > 500, seen


@settings(max_examples=500, **fixed)
@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda s: s.encode('utf-8', 'surrogatepass')),
       st.sampled_from(['.json', '.jsonl', '.ndjson', '.parquet', '.csv', '']))
def check_files(tmp, data, suffix):
    path = tmp/f'file{suffix}'
    path.write_bytes(data)
    try:
        clean_rows(read_rows(path), path)
    except Refused as e:
        one_line(e)


def test_files(tmp_path): check_files(tmp_path)


names = st.sampled_from([*RunConfig.__dataclass_fields__, 'n-freeze', 'seq_length', '', 'batch size'])
scalars = st.one_of(values,
                    st.sampled_from(['1e3', '-1', 'nan', 'inf', 'yes', '0x10', '1_000', 'none', '1e999', 10**400]))


@settings(max_examples=800, **fixed)
@given(st.dictionaries(names, scalars, max_size=5))
def check_options(tmp, options):
    path = tmp/'config.yaml'
    path.write_text(json.dumps(options), encoding='utf-8')
    try:
        cfg = read_config(path)
    except Refused as e:
        one_line(e)
        return
    assert isinstance(cfg, RunConfig) and cfg.batch_size % cfg.micro_batch_size == 0


def test_options(tmp_path): check_options(tmp_path)


@settings(max_examples=500, **fixed)
@given(st.one_of(st.binary(max_size=80), st.text(alphabet='ab:-[]{}#&*!|>\'"%@`\n \t1', max_size=60).map(str.encode)))
def check_yaml(tmp, data):
    path = tmp/'config.yaml'
    path.write_bytes(data)
    try:
        read_config(path)
    except Refused as e:
        one_line(e)


def test_yaml(tmp_path): check_yaml(tmp_path)
