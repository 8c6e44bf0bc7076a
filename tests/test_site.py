"""The site: built offline, every link and anchor resolves, nothing remote is loaded, readable on a phone and in the
dark. And the README's links."""
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlparse

import nbformat
import pytest

root = Path(__file__).parent.parent

def in_order(name):
    "Its key in a list: chapters by their number, then a1 to a10, then the others."
    letters, number = re.match(r'([a-z]*)(\d*)', name).groups()
    return letters, int(number or 0), name


pages = sorted((p.stem for p in (root/'nbs').glob('*.ipynb')), key=in_order)
chapters = [p for p in pages if p not in ('index', 'solutions')]


class Page(HTMLParser):
    "Links and anchors of a page."
    def __init__(self, text):
        super().__init__()
        self.links, self.ids = [], set()
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ('id', 'name') if a.get(k)}
        self.links += [a[k] for k in ('href', 'src') if a.get(k)]


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The built site, made in a copy of the repository's files."
    if not shutil.which('zensical', path=str(Path(sys.executable).parent)):
        pytest.skip('zensical is not installed; make docs installs it')
    at = tmp_path_factory.mktemp('site')/'alpaca_ft'
    at.mkdir()
    for name in ('nbs', 'alpaca_ft', 'tools'):
        shutil.copytree(root/name, at/name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for name in ('zensical.toml', 'settings.ini', *(p.name for p in root.glob('*.md'))):
        shutil.copy(root/name, at/name)
    for cmd in ([sys.executable, 'tools/render.py', 'site', '_proc'],
                [str(Path(sys.executable).parent/'zensical'), 'build', '--clean']):
        r = subprocess.run(cmd, cwd=at, capture_output=True, text=True)
        assert r.returncode == 0, r.stdout + r.stderr
    return at/'_docs'


def test_links(site):
    "Every internal link leads to a file, and every anchor to an id in it; nothing but links leads outside."
    built = {p.relative_to(site).as_posix(): Page(p.read_text(encoding='utf-8')) for p in site.rglob('*.html')}
    assert {f'{p}.html' for p in pages} <= set(built)
    bad, seen = [], 0
    for name, page in built.items():
        if name == '404.html':
            continue
        for link in page.links:
            u = urlparse(urljoin(f'http://here/{name}', link))
            if u.netloc != 'here':
                continue
            to = unquote(u.path).lstrip('/') or 'index.html'
            if to.endswith('/'):
                to += 'index.html'
            seen += 1
            if not (site/to).exists():
                bad.append(f'{name}: {link}')
                continue
            if not u.fragment or to not in built or u.fragment.startswith('__'):
                continue
            if unquote(u.fragment) not in built[to].ids:
                bad.append(f'{name}: {link} (no such anchor)')
    assert not bad, bad[:20]
    assert seen > 500


def test_nav(site):
    "Every page is in the navigation, and the solutions follow the last chapter."
    text = (root/'zensical.toml').read_text(encoding='utf-8')
    nav = re.findall(r'^  "(\w+)\.md"', text, re.M)
    assert set(nav) == {p.stem for p in site.glob('*.html')} - {'404'}
    assert nav[nav.index(chapters[-1]) + 1] == 'solutions' and nav[1:1+len(chapters)] == chapters


def test_api(site):
    "Every exported name is on the API page, with a link to the line that defines it and a line on each parameter."
    from importlib import import_module
    import inspect
    text = (site/'api.html').read_text(encoding='utf-8')
    ids, n = Page(text).ids, 0
    for p in (root/'nbs').glob('*.ipynb'):
        if not (m := re.search(r'#\| default_exp (\w+)', p.read_text(encoding='utf-8'))):
            continue
        module = import_module(f'alpaca_ft.{m[1]}')
        for name in module.__all__:
            obj = getattr(module, name)
            assert name.lower() in ids, name
            if not inspect.isfunction(obj) or obj.__module__ != module.__name__:
                continue
            first = inspect.getsource(obj).splitlines()
            line = inspect.getsourcelines(obj)[1]
            assert f'alpaca_ft/{m[1]}.py#L{line}"' in text and any(f'def {name}(' in l for l in first[:3]), name
            n += 1
    assert n > 80 and text.count('<table>') > 80
    assert '| None' not in re.sub(r'<code>.*?</code>', '', text)


@pytest.fixture(scope='module')
def served(site):
    "The site on this machine, because a page read from a file may not use workers."
    import functools, http.server, threading
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=site))
    s.daemon_threads = True
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{s.server_port}'
    s.shutdown()


def problems_of(page, url):
    "Console messages, script errors, failed and remote requests of a page."
    problems = []
    page.on('console', lambda m: problems.append(m.text) if m.type in ('error', 'warning') else None)
    page.on('pageerror', lambda e: problems.append(str(e)))
    page.on('requestfailed', lambda r: problems.append(f'failed: {r.url}'))
    page.on('request',
            lambda r: None
            if r.url.startswith((url.rsplit('/', 1)[0], 'data:', 'blob:')) else problems.append(f'remote: {r.url}'))
    page.goto(url)
    page.wait_for_load_state('networkidle')
    return problems


@pytest.mark.parametrize('name', pages)
def test_page(served, browser, name):
    "On a phone and in the dark: no error, nothing from elsewhere, no sideways scrolling, a dark ground."
    page = browser.new_page(viewport=dict(width=390, height=800), color_scheme='dark')
    try:
        assert problems_of(page, f'{served}/{name}.html') == []
        assert page.locator('h1').first.is_visible()
        assert page.evaluate('document.documentElement.scrollWidth') <= 390
        assert sum(map(int,
                       re.findall(r'\d+', page.evaluate('getComputedStyle(document.body).backgroundColor'))[:3])) < 200
        broken = page.evaluate('[...document.images].filter(i => i.loading != "lazy" && !i.naturalWidth)'
                               '.map(i => i.src)')
        assert broken == []
    finally:
        page.close()


def test_search(served, browser):
    page = browser.new_page(viewport=dict(width=1280, height=900))
    try:
        page.goto(f'{served}/index.html')
        page.wait_for_load_state('networkidle')
        page.keyboard.press('/')
        page.keyboard.type('contamination', delay=30)
        page.wait_for_selector('a[href*="03_packing"]:visible', timeout=10_000)
    finally:
        page.close()


def test_readme_links():
    "Files that the README names are there, and each chapter has a link with its own title and question."
    text = (root/'README.md').read_text(encoding='utf-8')
    for link in re.findall(r'\]\(([^)\s]+)\)', text):
        if not urlparse(link).scheme:
            assert (root/link.split('#')[0]).exists(), link
    for name in chapters:
        first = nbformat.read(root/'nbs'/f'{name}.ipynb', 4).cells[0].source
        title, question = re.match(r'# (.+)\n\n> (.+)', first).groups()
        number = name.split('_')[0].upper()
        assert f'| [{number} {title}](nbs/{name}.ipynb) | {question} |' in text, name


def test_links_of_notebooks():
    "Opened as notebooks, in Jupyter or in a Git forge, they lead somewhere too."
    for path in (root/'nbs').glob('*.ipynb'):
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type == 'markdown':
                for link in re.findall(r'\]\(([^)\s]+)\)', cell.source):
                    if not urlparse(link).scheme and not link.startswith('#'):
                        assert (path.parent/link.split('#')[0]).exists(), (path.name, link)


def test_drawings(tmp_path):
    "The drawings are those of tools/draw.py, and each is shown somewhere, with words for those who cannot see it."
    subprocess.run([sys.executable, root/'tools'/'draw.py', tmp_path], check=True)
    shown = ''.join(p.read_text(encoding='utf-8') for p in (root/'nbs').glob('*.ipynb'))
    for path in tmp_path.iterdir():
        assert path.read_text() == (root/'nbs'/'images'/path.name).read_text(), path.name
        assert f'](images/{path.name})' in shown, path.name
        assert 'aria-label' in path.read_text() and 'prefers-color-scheme' in path.read_text()
