"The built-in rows keep what is said of them."
import re
from collections import Counter

from alpaca_ft import load_alpaca

rows = list(load_alpaca()['train'])


def test_counts():
    assert len(rows) >= 320
    assert 3*sum(bool(r['input']) for r in rows) >= len(rows)
    words = [len(r['output'].split()) for r in rows]
    assert min(words) == 1 and max(words) <= 200 and sum(w >= 150 for w in words) >= 10


def test_tidy():
    for r in rows:
        assert all(v == v.strip() for v in r.values()), r
        assert not re.search(r'https?://|www\.|@\w+\.|###', ' '.join(r.values())), r


def shingles(text):
    words = re.findall(r'\w+', text.lower())
    return {tuple(words[i:i+3]) for i in range(max(1, len(words)-2))}


def test_no_near_duplicates():
    "No two rows share half of their three-word phrases, in what is asked or in what is answered (of six words or more)."
    for what in (lambda r: r['instruction'] + ' ' + r['input'], lambda r: r['output']):
        sets = [shingles(what(r)) for r in rows if len(what(r).split()) >= 6]
        for i, a in enumerate(sets):
            for b in sets[:i]: assert len(a & b)/len(a | b) < 0.5, (a & b)
    asked = Counter((r['instruction'], r['input']) for r in rows)
    assert asked.most_common(1)[0][1] == 1
