#!/usr/bin/env python3
"""Render notebooks to Markdown: README.md from nbs/index.ipynb, and the pages of the site.

nbdev renders with Quarto, a program of its own; this does the same with nbconvert, an ordinary dependency. Cells
marked `#| hide` are left out, directive lines are stripped, and behind exported functions stand links to their source
and to their entry on the API page, whose tables are made from the comments in the signatures and the help of the
options. Notebooks are taken in the order of their names: chapters by number, then the appendix (a1, a2, ...).

usage: render.py readme | render.py site FOLDER
"""
import configparser, html, importlib, inspect, re, shutil, sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

root = Path(__file__).resolve().parent.parent


def by_number(path):
    "A key to sort by, in which a10 comes behind a9."
    return [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', Path(path).stem)]


notebooks = sorted((root/'nbs').glob('*.ipynb'), key=by_number)


def signature_of(obj):
    "Signature of a function, or of what makes an object of a class; None where there is none of its own."
    if isinstance(obj, type):
        own = [c for c in obj.__mro__ if '__init__' in c.__dict__ and c.__module__.startswith('alpaca_ft')]
        obj = own[0].__init__ if own else None
    try:
        return inspect.signature(obj) if obj else None
    except (TypeError, ValueError):
        return None


def descriptions(obj):
    "What is said of each parameter: the comments in the signature, or the help of an option."
    from fastcore.docments import docments
    fields, said = getattr(obj, '__dataclass_fields__', {}), {}
    if fields:
        for base in reversed(obj.__mro__[:-1]):  # a comment stands where its field does, in this class or a base
            said |= {k: v for k, v in docments(base).items() if v}
    else:
        said = docments(obj.__init__ if isinstance(obj, type) else obj)
    return said | {k: f.metadata['help'] for k, f in fields.items() if f.metadata.get('help')}


def show(x):
    "A type or a default as code for a table."
    if x is inspect.Parameter.empty:
        return ''
    text = repr(x) if isinstance(x, str) else str(getattr(x, '__name__', x))
    return f"<code>{html.escape(text).replace('|', '&#124;')}</code>"


def clean(x):
    "A text for a cell of a table."
    return str(x or '').replace('|', '\\|').replace('\n', ' ')


def table(obj):
    "The parameters of a function or class as a Markdown table; empty where there are none."
    sig = signature_of(obj)
    if sig is None:
        return ''
    said, rows = descriptions(obj), []
    for k, p in sig.parameters.items():
        if k != 'self':
            rows.append(f'| `{k}` | {show(p.annotation)} | {show(p.default)} | {clean(said.get(k))} |')
    if said.get('return'):
        rows.append(f"| returns | {show(sig.return_annotation)} | | {clean(said['return'])} |")
    return '\n'.join(['| | type | default | |', '|---|---|---|---|', *rows]) if rows else ''


def constant(name, module):
    "What a constant is: the comment behind its value."
    m = re.search(rf'^{name} ?=(?:.|\n)*?  # (.+)$', Path(module.__file__).read_text(encoding='utf-8'), re.M)
    return f'A constant: {m[1]}.' if m else 'A constant.'


def source(obj, module):
    "Where a name is defined, as a link to its line."
    s = settings()
    try:
        line = f'#L{inspect.getsourcelines(obj)[1]}'
    except (TypeError, OSError):
        line = ''
    return f"{s['git_url']}/blob/{s['branch']}/alpaca_ft/{module}.py{line}"


def api():
    "The page of all exported names: what each does, its parameters, where it is taught and where it is defined."
    out = ['# API',
           'Every exported name, by chapter. `from alpaca_ft import ...` finds the usual ones; '
           'all are in their modules.']
    for p in notebooks:
        module = module_of(nbformat.read(p, 4))
        if not module:
            continue
        m = importlib.import_module(f'alpaca_ft.{module}')
        out += [f'## alpaca_ft.{module}', f'{m.__doc__} [The chapter]({p.stem}.md)']
        for name in m.__all__:
            obj = getattr(m, name)
            what = (obj.__doc__ or '') if callable(obj) else constant(name, m)
            out += [f'### {name}', ' '.join(what.split()), table(obj) if callable(obj) else '',
                    f'[source]({source(obj, module)})']
    return '\n\n'.join(x for x in out if x) + '\n'


def module_of(nb): return next((m[1] for c in nb.cells if (m := re.search(r'#\| ?default_exp (\w+)', c.source))), None)


def cells(nb, api):
    "The notebook's cells as a reader of the site sees them."
    module = module_of(nb)
    for c in nb.cells:
        directives = re.findall(r'^#\| ?(.+)$', c.source, re.M) if c.cell_type == 'code' else []
        if any(d.split()[0] in ('hide', 'default_exp') for d in directives):
            continue
        if c.cell_type == 'code':
            c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M)
            for o in c.outputs:
                if 'data' in o:
                    o.data.pop('text/html', None)
        yield c
        if api and 'export' in directives:
            m = importlib.import_module(f'alpaca_ft.{module}')
            names = [n for n in re.findall(r'^(?:def|class) ([A-Za-z]\w*)', c.source, re.M) if n in m.__all__]
            if names:
                links = [f'`{n}`: [source]({source(getattr(m, n), module)}), [parameters](api.md#{n.lower()})'
                         for n in names]
                yield nbformat.v4.new_markdown_cell('; '.join(links))


def markdown(path, api=True):
    "Markdown of a notebook, and its pictures as {name: bytes}."
    nb = nbformat.read(path, 4)
    nb.cells = list(cells(nb, api))
    nb, _ = CoalesceStreamsPreprocessor(enabled=True)(nb, {})
    nb.metadata.language_info = dict(name='python')
    text, resources = MarkdownExporter().from_notebook_node(nb, dict(unique_key=f'{path.stem}_files/{path.stem}'))
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n', resources.get('outputs', {})


def settings():
    c = configparser.ConfigParser()
    c.read(root/'settings.ini')
    return c['DEFAULT']


def readme():
    text, pictures = markdown(root/'nbs'/'index.ipynb', api=False)
    text = re.sub(r'\]\((?=images/|\w+\.ipynb)', '](nbs/', text).replace('](../', '](')
    head = '<!-- rendered from nbs/index.ipynb by tools/render.py; edit the notebook -->\n\n'
    (root/'README.md').write_text(head + text, encoding='utf-8')


def site(folder):
    folder, s = Path(folder), settings()
    shutil.copytree(root/'nbs'/'images', folder/'images', dirs_exist_ok=True)
    for name in ('CONTRIBUTING.md', 'SECURITY.md', 'CHANGELOG.md', 'tools/site.css'):
        shutil.copy(root/name, folder)
    (folder/'api.md').write_text(api(), encoding='utf-8')
    for p in notebooks:
        text, pictures = markdown(p)
        text = text.replace('](../benchmarks/', f"]({s['git_url']}/blob/{s['branch']}/benchmarks/")
        text = re.sub(r'\]\((\w+)\.ipynb(#[^)]*)?\)', r'](\1.md\2)', text).replace('](../', '](')
        (folder/f'{p.stem}.md').write_text(text, encoding='utf-8')
        for name, data in pictures.items():
            (folder/name).parent.mkdir(exist_ok=True)
            (folder/name).write_bytes(data)


if __name__ == '__main__':
    readme() if sys.argv[1:] == ['readme'] else site(sys.argv[2])
