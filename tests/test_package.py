"The package as a whole: quick to import, small, in order, documented; notebooks that open anywhere."
import ast
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

root = Path(__file__).parent.parent
notebooks = sorted((root/'nbs').glob('*.ipynb'))
chapters = {m[1]: p for p in notebooks if (m := re.search(r'#\| default_exp (\w+)', p.read_text(encoding='utf-8')))}
# a module imports from those before it
ORDER = ('checks formats data files processes options templates prompts packing model manifest gguf_file sampling '
         'trainer stream evaluate prefix speed memory layers checkpoints tracking report run use cli').split()


def python(code):
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize('module',
                         ['alpaca_ft', 'alpaca_ft.cli', 'alpaca_ft.data', 'alpaca_ft.files', 'alpaca_ft.options'])
def test_imports_nothing_heavy(module):
    heavy = ('torch', 'transformers', 'trl', 'datasets', 'wandb', 'numpy', 'pyarrow')
    assert python(f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])") == '[]'


def test_lazy_names():
    import alpaca_ft
    from importlib import import_module
    for name, module in alpaca_ft._where.items():
        assert name in import_module(f'alpaca_ft.{module}').__all__, name
    assert set(alpaca_ft._modules) | {'cli'} == set(chapters)


NAMES = """
from importlib import import_module
from inspect import signature
from pathlib import Path
import pytest
from alpaca_ft import evaluate, checkpoints, processes
import alpaca_ft
for f in (evaluate, alpaca_ft.evaluate):  # each is a module's name too
    with pytest.raises(alpaca_ft.Refused, match='not a run folder'):
        f('demo', 'base')
assert processes() == alpaca_ft.processes() == 1
assert checkpoints(Path('nowhere')) == alpaca_ft.checkpoints(Path('nowhere')) == []
from alpaca_ft import *
for name, module in alpaca_ft._where.items():
    module = import_module(f'alpaca_ft.{module}')
    real, found = getattr(module, name), globals()[name]
    if name in alpaca_ft._modules:
        assert found is module and callable(found) and signature(found) == signature(real), name
    else:
        assert found is real, name
    assert getattr(alpaca_ft, name) is found, name
import alpaca_ft.evaluate
from alpaca_ft.evaluate import evaluate, interval
assert alpaca_ft.evaluate.interval is interval and alpaca_ft.evaluate.evaluate is evaluate
"""


def test_names_are_what_they_say():
    "In a fresh process, and where all modules are there: every name can be imported from the package, and used."
    python(NAMES)
    import alpaca_ft.run  # noqa: F401
    exec(NAMES, {})


def test_version_is_that_of_the_code():
    "What runs, not what was installed here at some time."
    import alpaca_ft
    from alpaca_ft.manifest import versions
    assert versions()['alpaca_ft'] == alpaca_ft.__version__


def test_import_order():
    "A module imports only from modules that stand before it."
    assert set(ORDER) == set(chapters)
    for i, name in enumerate(ORDER):
        for node in ast.walk(ast.parse((root/'alpaca_ft'/f'{name}.py').read_text(encoding='utf-8'))):
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            if node.level == 1 or node.module.startswith('alpaca_ft.'):
                assert node.module.split('.')[-1] in ORDER[:i], f'{name} imports {node.module}'


def test_documented():
    "Every exported function has a docstring, and a comment beside each parameter."
    from fastcore.docments import docments
    from importlib import import_module
    for name in chapters:
        module = import_module(f'alpaca_ft.{name}')
        for x in module.__all__:
            f = getattr(module, x)
            if not callable(f):
                continue
            assert f.__doc__, f'{name}.{x}'
            if isinstance(f, type):
                continue
            named = [k for k,
                     p in inspect.signature(f).parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
            undocumented = [k for k, v in docments(f).items() if v is None and k in named]
            assert not undocumented, f'{name}.{x}: {undocumented}'


@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
def test_notebook(path):
    nb = json.loads(path.read_text(encoding='utf-8'))
    assert set(nb['metadata']) <= {'kernelspec'}
    assert path.stat().st_size < 500_000
    code = [c for c in nb['cells'] if c['cell_type'] == 'code']
    assert any(c['outputs'] for c in code)
    for c in code:
        for o in c['outputs']:
            assert o['output_type'] != 'error' and 'application/vnd.jupyter.widget-view+json' not in o.get('data', {})
            assert not re.search(r'/(root|home|tmp|work)/',
                                 json.dumps(o)), f'{path.name}: a path of the machine in an output'


@pytest.mark.parametrize('path', notebooks, ids=lambda p: p.stem)
def test_cache_is_given_back(path):
    "nbdev_test runs several notebooks in a process: one that moves the cache puts it back for the next."
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    code = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'code')
    if re.search(r"os\.environ\['ALPACA_FT_CACHE'\] = |os\.environ \|= dict\(.*ALPACA_FT_CACHE", code):
        assert "del os.environ['ALPACA_FT_CACHE']" in code or 'os.environ.update(environment)' in code


def test_constraints():
    """Every pinned version that is installed here installs on the oldest Python that is promised, and everything
    installed for the package is pinned."""
    from configparser import ConfigParser
    from importlib.metadata import distribution
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet
    from packaging.utils import canonicalize_name as canon
    c = ConfigParser()
    c.read(root/'settings.ini')
    oldest = c['DEFAULT']['min_python'] + '.0'
    pins = dict((canon(n), v) for n,
                v in (l.split('==') for l in (root/'constraints.txt').read_text().splitlines() if '==' in l))
    todo = [(Requirement(r), {''}) for k in ('requirements', 'dev_requirements') for r in c['DEFAULT'][k].split()]
    seen = set()
    while todo:
        r, extras = todo.pop()  # and the extras that were asked for of the package that requires it
        if r.marker and not any(r.marker.evaluate({'extra': e}) for e in extras):
            continue
        name, key = canon(r.name), (canon(r.name), *sorted(r.extras))
        if key in seen:
            continue
        seen.add(key)
        if re.match('cuda-|nvidia-|triton$', name):
            continue  # of PyTorch's build for CUDA, which pins them itself
        d = distribution(name)
        assert name in pins, f'{name} {d.version} is not in constraints.txt'
        if d.version.split('+')[0] == pins[name]:
            needed = d.metadata.get('Requires-Python') or ''
            assert SpecifierSet(needed).contains(oldest), f'{name} {d.version} needs Python {needed}'
        todo += [(Requirement(x), {'', *r.extras}) for x in d.requires or ()]
    assert len(seen) > 100


def test_chapter_numbers():
    "Two digits each, from 00 to 18."
    assert [int(p.stem[:2]) for p in notebooks if p.stem[:2].isdigit()] == list(range(19))


SCREEN = 40  # lines of a function's body


def sources():
    "(name, Python) of every module, script and notebook cell."
    for folder in ('alpaca_ft', 'tests', 'tools', 'benchmarks'):
        for path in sorted((root/folder).glob('*.py')):
            yield path.name, path.read_text(encoding='utf-8')
    for path in notebooks:
        for i, cell in enumerate(json.loads(path.read_text(encoding='utf-8'))['cells']):
            if cell['cell_type'] == 'code':
                yield f'{path.name}[{i}]', ''.join(cell['source'])


def test_functions_fit_a_screen():
    "ruff counts statements; this counts lines."
    for name, code in sources():
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.body[0].lineno + 1
                assert lines <= SCREEN, f'{name}: {node.name} has {lines} lines'


LINE = 120  # columns


def test_lines():
    "Modules are read by learners: no line longer than this, but for the list that nbdev writes."
    for path in (root/'alpaca_ft').glob('*.py'):
        if path.name == '_modidx.py':
            continue
        for i, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1):
            if line.startswith(('__all__', '           ')) and "', '" in line:
                continue
            assert len(line) <= LINE, f'{path.name}:{i} has {len(line)} columns'


def test_text_is_utf8():
    "Text files are opened with an encoding, because a system's own may be another."
    for path in (root/'alpaca_ft').glob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, 'attr', None) or getattr(node.func, 'id', None)
            binary = any('b' in x.value for x in node.args[1:] if isinstance(x, ast.Constant) and name == 'open')
            if name in ('read_text', 'write_text') or isinstance(node.func, ast.Name) and name == 'open':
                there = binary or any(k.arg == 'encoding' for k in node.keywords)
                assert there, f'{path.name}:{node.lineno} opens a text file without an encoding'


def test_as_on_windows(tmp_path, monkeypatch):
    "Where a folder cannot be opened and there is no list of the process's own functions; Windows itself was not tried."
    import ctypes
    import os
    from alpaca_ft.files import sync
    from alpaca_ft.prefix import give_back_memory
    (tmp_path/'file').write_text('x', encoding='utf-8')
    folder, file, opens, loads = str(tmp_path), str(tmp_path/'file'), os.open, ctypes.CDLL
    def open_as_there(path, flags, *more):
        if os.path.isdir(path):
            raise PermissionError(13, 'Permission denied', path)
        assert flags & os.O_RDWR, 'what is opened for reading cannot be forced to the disk'
        return opens(path, flags, *more)
    def load_as_there(name, *more, **kw):
        if name is None:
            raise TypeError('bad argument type for built-in operation')
        return loads(name, *more, **kw)
    with monkeypatch.context() as m:
        m.setattr(os, 'name', 'nt')
        m.setattr(os, 'open', open_as_there)
        sync(folder)
        sync(file)
    with monkeypatch.context() as m:
        m.setattr(ctypes, 'CDLL', load_as_there)
        give_back_memory()


# Names of other libraries that begin with an underscore and are used all the same: (module, name, why).
PRIVATE = {
    ('cli', '_actions'): "argparse's list of options, to name the nearest one; it has no public one",
    ('manifest', '_attn_implementation'):
        'a key of a config as text, left out of its digest: how attention is computed is no part of a model',
    ('manifest', '_name_or_path'):
        'a key of a config as text, left out of its digest: where a model came from is no part of it',
}


def test_private_names():
    "No attribute of torch, transformers, TRL, accelerate or wandb that is theirs alone, beyond the table."
    own = set()
    trees = {}
    for name in ORDER:
        trees[name] = ast.parse((root/'alpaca_ft'/f'{name}.py').read_text(encoding='utf-8'))
        for node in ast.walk(trees[name]):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and getattr(node.value, 'id',
                                                                                               '') == 'self':
                own.add(node.attr)
    found = set()
    for name, tree in trees.items():
        parts = {id(v) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for v in n.values}
        for node in ast.walk(tree):
            if id(node) in parts:
                continue
            attribute = getattr(node, 'attr', None) if isinstance(node, ast.Attribute) else None
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None
            for word in (attribute, text):
                if word and re.fullmatch(r'_[a-z]\w+', word) and word not in own:
                    found.add((name, word))
    assert found == set(PRIVATE), found ^ set(PRIVATE)
    assert len(PRIVATE) <= 4


def test_private_names_are_there():
    "They fail with a clear word when the other side changes."
    from transformers import LlamaConfig
    config = LlamaConfig(name_or_path='somewhere')
    config._attn_implementation = 'sdpa'
    about = config.to_dict()
    assert '_name_or_path' in about, (
        'transformers no longer writes _name_or_path: the digest of a config may depend on where it is'
    )
    assert hasattr(config, '_attn_implementation'), (
        'transformers renamed _attn_implementation: look at manifest.config_digest'
    )


def test_completion(tmp_path):
    "The script in a real bash: commands, options and files; without the library one line that says what to install."
    import shutil

    script = subprocess.run(
        [sys.executable, '-m', 'alpaca_ft', 'completion', 'bash'], capture_output=True, text=True, check=True
    ).stdout
    (tmp_path/'complete.sh').write_text(script)
    (tmp_path/'my_rows.jsonl').write_text('')
    if shutil.which('bash'):
        def completed(*words):
            code = (
                f"source complete.sh; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _shtab_alpaca_ft; "
                f"echo ${{COMPREPLY[@]}}"
            )
            return subprocess.run(['bash', '-c', code], capture_output=True, text=True, cwd=tmp_path).stdout.split()
        assert completed('alpaca_ft', 'ev') == ['evaluate']
        assert completed('alpaca_ft', 'check', '--near') == ['--near-duplicates']
        assert completed('alpaca_ft', 'train', '--data', 'my') == ['my_rows.jsonl']
    code = (
        "import importlib.util as u; find = u.find_spec; u.find_spec = lambda n, *a: None if n == 'shtab' "
        "else find(n, *a)\nimport sys\n"
        "from alpaca_ft.cli import main; sys.exit(main(['completion', 'bash']))"
    )
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert (r.returncode, r.stdout, len(r.stderr.splitlines())) == (
        2,
        '',
        1,
    ) and 'pip install shtab' in r.stderr
