"The built-in rows keep what is said of them."
import re
from collections import Counter

from alpaca_ft import load_alpaca

rows = list(load_alpaca()['train'])


def test_counts():
    assert len(rows) >= 320
    with_input = sum(bool(r['input']) for r in rows)
    assert 3*with_input >= len(rows)
    words = [len(r['output'].split()) for r in rows]
    assert min(words) == 1
    assert max(words) <= 200
    assert sum(w >= 150 for w in words) >= 10


def test_tidy():
    for r in rows:
        assert all(v == v.strip() for v in r.values()), r
        assert not re.search(r'https?://|www\.|@\w+\.|###', ' '.join(r.values())), r


demo = list(load_alpaca('demo')['train'])


def test_demo_rows_have_one_manner():
    "The answer at once, in one to three sentences or a short list, and nothing behind it."
    assert len(demo) >= 1000
    assert sum(bool(r['input']) for r in demo)*3 >= len(demo)
    for r in demo:
        lines = r['output'].split('\n')
        assert len(r['output'].split()) <= 55, r
        assert not re.match('(sure|certainly|of course|here (is|are)|absolutely)', r['output'].lower()), r
        assert not re.search(r'[^\x20-\x7e\n]|https?://|###|\*\*|```', ' '.join(r.values())), r
        if lines[0].startswith('- '):
            assert 3 <= len(lines) <= 5 and all(line.startswith('- ') for line in lines), r
        else:
            assert re.search(r'[.?!]"?$', r['output']), r


def shingles(text):
    "The three-word phrases of a text."
    words = re.findall(r'\w+', text.lower())
    return {tuple(words[i:i+3]) for i in range(max(1, len(words)-2))}


def no_two_alike(texts):
    "No two of the texts (of six words or more) share half of their three-word phrases."
    seen = []
    for text in texts:
        if len(text.split()) < 6:
            continue
        new = shingles(text)
        for old in seen:
            assert len(new & old)/len(new | old) < 0.5, new & old
        seen.append(new)


def test_no_near_duplicates():
    no_two_alike([r['instruction'] + ' ' + r['input'] for r in rows])
    no_two_alike([r['output'] for r in rows])
    no_two_alike([r['instruction'] + ' ' + r['input'] for r in demo])
    no_two_alike([r['output'] for r in demo])
    asked = Counter((r['instruction'], r['input']) for r in rows)
    assert asked.most_common(1)[0][1] == 1
