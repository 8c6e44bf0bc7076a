"The report in a real browser: no errors, no network, charts, search, text that stays text, a phone's width."
import json
import shutil

import pytest

from alpaca_ft import Refused, RunConfig, train
from alpaca_ft.files import read_run
from alpaca_ft.report import differing, evaluated, sample_cards, series, write_report

NASTY = '<script>document.title = "pwned"</script><img src=x onerror="document.title=1"> \x1b]0;t\x07 \u202e'


@pytest.fixture(scope='module')
def runs(tiny, rows, tmp_path_factory):
    out = tmp_path_factory.mktemp('seen')
    common = dict(model=str(tiny), data=str(rows), n_freeze=2, seq_len=256, n_samples=3, max_new_tokens=8, dtype='fp32',
                  max_steps=6)
    a = train(RunConfig(out=str(out/'one $x$ <b>'), **common)).out
    b = train(RunConfig(out=str(out/'two'), **common | dict(loss_on='response', lr=1e-3))).out
    first = json.loads((b/'samples.jsonl').read_text().splitlines()[0])
    with open(b/'samples.jsonl', 'a') as f:
        f.write(json.dumps(first | dict(step=6, generation=NASTY)) + '\n')
    return a, b


@pytest.fixture
def page(browser):
    pages = []
    def open_page(path, **kw):
        p = browser.new_page(**kw)
        pages.append(p)
        p.problems, p.requests = [], []
        p.on('console', lambda m: p.problems.append(m.text))
        p.on('pageerror', lambda e: p.problems.append(str(e)))
        p.on('request', lambda r: p.requests.append(r.url))
        p.goto(path.resolve().as_uri())
        return p
    yield open_page
    for p in pages:
        p.close()


def test_written_by_train(runs):
    for r in runs:
        html = (r/'report.html').read_text()
        assert html.count('<svg') == 5 and 'finished' in html and 'data-running' not in html and len(html) < 2_000_000
        assert sorted(p.name for p in r.iterdir() if p.name.startswith('.')) == []


def test_browser(runs, page):
    p = page(runs[0]/'report.html', viewport=dict(width=1200, height=900))
    assert p.problems == [] and len(p.requests) == 1
    assert p.title() == 'one $x$ <b>' and p.locator('svg').count() == 5
    assert p.locator('svg path').count() > 40 and p.locator('.prompt').count() == 3
    assert 'held-out loss' in p.locator('.facts').inner_text()


def test_search_by_keyboard(runs, page):
    p = page(runs[0]/'report.html')
    word = read_run(runs[0])['samples'][0]['reference'][:30]
    p.keyboard.press('/')
    p.keyboard.type(word)
    assert p.locator('.prompt:visible').count() == 1 and '1 of 3' in p.locator('#found').inner_text()
    p.keyboard.press('Escape')
    assert p.locator('.prompt:visible').count() == 3
    p.keyboard.press('/')
    p.keyboard.type('no such words')
    assert p.locator('.prompt:visible').count() == 0


def test_generation_stays_text(runs, page, tmp_path):
    p = page(write_report(runs, tmp_path/'both.html'))
    assert p.problems == [] and 'pwned' not in p.title() and p.locator('script').count() == 1
    assert p.locator('img').count() == 0
    text = p.locator('.prompt').first.inner_text()
    assert '<script>document.title' in text and '\\x1b]0;t\\x07' in text and '\\u202e' in text


def test_questions_of_chats():
    "A card shows what was asked, not the template, and two rows of one prompt have a card each."
    chat = dict(prompt='<|im_start|>user\nHi.\n\nNow.<|im_end|>\n', asked='Hi. | Now.', generation='a', tokens=1,
                stopped=True)
    samples = [chat | dict(reference=reference, step=step) for step in (0, 1) for reference in ('Hello.', 'Good day.')]
    cards, _ = sample_cards([dict(samples=samples)])
    assert [card['reference'] for card in cards] == ['Hello.', 'Good day.']
    assert [(card['instruction'], len(card['answers'])) for card in cards] == [('Hi. | Now.', 2)]*2
    older = {k: v for k, v in samples[0].items() if k != 'asked'}
    assert 'im_start' in sample_cards([dict(samples=[older])])[0][0]['instruction']


def test_half_a_line(runs, tmp_path):
    "A log whose last line was cut off, as by a full disk, is read up to there."
    shutil.copytree(runs[0], tmp_path/'run')
    whole = read_run(tmp_path/'run')['metrics']
    with open(tmp_path/'run'/'metrics.jsonl', 'a') as f:
        f.write('{"step": 7, "lo')
    assert read_run(tmp_path/'run')['metrics'] == whole and write_report(tmp_path/'run').exists()
    with open(tmp_path/'run'/'metrics.jsonl', 'a') as f:
        f.write('\n')
    with pytest.raises(Refused, match='is not JSON'):
        read_run(tmp_path/'run')


def test_two_runs_of_one_name(runs, tmp_path):
    "Their folders' names tell them apart."
    for name in ('a', 'b'):
        shutil.copytree(runs[0], tmp_path/name/'run')
    html = write_report([tmp_path/'a'/'run', tmp_path/'b'/'run', runs[1]], tmp_path/'r.html').read_text()
    assert '<title>a/run and b/run and two</title>' in html


def test_compared(runs, page, tmp_path):
    assert [k for k, _ in differing([read_run(r) for r in runs])] == ['lr', 'loss_on']
    p = page(write_report(runs, tmp_path/'both.html'))
    assert '2 runs compared' in p.inner_text('header') and 'loss_on' in p.inner_text('main')
    # evaluations of both, the line added above, the reference
    assert p.locator('.prompt').first.locator('.say').count() == 4 + 5 + 1


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_phone(runs, page, tmp_path, scheme):
    p = page(write_report(runs, tmp_path/'both.html'), viewport=dict(width=390, height=800), color_scheme=scheme)
    assert p.evaluate('document.documentElement.scrollWidth') <= 390
    dark = p.evaluate('getComputedStyle(document.body).backgroundColor') == 'rgb(21, 23, 26)'
    assert dark == (scheme == 'dark')


def test_unfinished_and_empty(tmp_path, runs):
    run = tmp_path/'young'
    run.mkdir()
    shutil.copy(runs[0]/'config.yaml', run)
    assert 'No samples yet' in write_report([run]).read_text() and 'not finished' in (run/'report.html').read_text()


def test_one_run(tmp_path, runs):
    "One run alone needs no list."
    run = tmp_path/'young'
    run.mkdir()
    shutil.copy(runs[0]/'config.yaml', run)
    for one in (run, str(run)):
        (run/'report.html').unlink(missing_ok=True)
        assert write_report(one) == run/'report.html' and (run/'report.html').exists()


def test_what_was_measured(tmp_path):
    "Rows that were given are not called held back, and it is said that a run was trained on them."
    measure = dict(measure='loss, all tokens', kind='mean', value=2.)
    about = dict(models=['run', 'demo'], rows=3, measures=[measure])
    for more, said in ((dict(), ['demo and run, 3 rows held back']),
                       (dict(held_out=True, trained_on={}), ['demo and run, 3 rows held back']),
                       (dict(held_out=False, trained_on={'a/run': 2}),
                        ['demo and run, 3 rows', 'run: trained on 2 of these rows, which are no test of it'])):
        (tmp_path/'evaluation.json').write_text(json.dumps(about | more))
        lines = evaluated(tmp_path).splitlines()
        assert [lines[0], *lines[3:]] == said


def test_size(tmp_path, runs):
    "Long runs stay under 2 MB, and say what they leave out."
    run = tmp_path/'long'
    shutil.copytree(runs[0], run)
    line = json.loads((run/'samples.jsonl').read_text().splitlines()[0])
    (run/'samples.jsonl').write_text(''.join(json.dumps(line | dict(step=i, prompt=f'{k}', generation='x'*1000)) + '\n'
                                             for i in range(300) for k in range(10)))
    (run/'metrics.jsonl').write_text(''.join(json.dumps(dict(step=i, loss=1 + i % 7, eval_loss=2.,
            eval_response_loss=None, tokens_per_second=5)) + '\n' for i in range(20_000)))
    assert len(write_report([run]).read_bytes()) < 2_000_000
    cards, left = sample_cards([read_run(run)])
    assert cards[0]['answers'][0]['step'] == 0 and cards[0]['answers'][-1]['step'] == 299 and 'left out' in left
    assert len(series(read_run(run)['metrics'], 'loss')[0]) <= 400


def test_refusals(here, runs, command):
    for argv, why in ((['nowhere'], 'not a run folder'), ([*runs[:1]*7], 'one to six'),
                      ([runs[0], '--to', 'no/such/folder.html'], 'cannot be written')):
        code, out, err = command('report', *argv)
        assert code == 2 and why in err and len(err.splitlines()) == 1


def test_rows_as_the_trainer_sees_them(tiny, here, page):
    "Documents in frames, what is learnt marked, in the words of `check --show`; HTML in a row stays text."
    from alpaca_ft.run import prepare
    from alpaca_ft.sampling import show_row

    rows = [
        dict(
            instruction=f'Repeat {i}: <script>document.title = "pwned"</script>',
            input='',
            output=f'<img src=x onerror="document.title=1"></div></mark> {i}',
        )
        for i in range(40)
    ]
    (here/'rows.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    cfg = RunConfig(
        model=str(tiny),
        data='rows.jsonl',
        out='run',
        n_freeze=2,
        seq_len=256,
        loss_on='response',
        n_samples=0,
        dtype='fp32',
        max_steps=1,
    )
    run = train(cfg)
    p = page(run.out/'report.html')
    assert (
        p.problems == [] and p.title() == 'run' and p.locator('script').count() == 1 and p.locator('img').count() == 0
    )
    text = show_row(prepare(RunConfig(**vars(cfg) | dict(out='other'))).train[0], run.tokenizer, 'response')
    first = p.locator('details', has_text='packed row 1').first
    frames = first.locator('.document')
    assert frames.count() == text.count('--- document') > 1 and first.get_attribute('open') is not None
    said = ''.join(f'⟦{m}⟧' for m in frames.first.locator('mark').all_text_contents())
    assert said.startswith('⟦<img src=x') and said in text and 'ends in' in frames.first.inner_text()
    assert '<script>document.title = "pwned"</script>' in frames.first.inner_text()
    assert p.locator('details', has_text='packed row 2').count() == 1
