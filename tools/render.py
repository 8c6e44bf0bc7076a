#!/usr/bin/env python3
"""Render notebooks to Markdown: README.md from nbs/index.ipynb, and the pages of the site.

nbdev renders with Quarto, which is no PyPI package; this does the same with nbconvert. Cells marked `#| hide` are left out,
directive lines are stripped, and behind each exported function stands its table of parameters, from the comments in its signature.

usage: render.py readme | render.py site FOLDER
"""
import configparser, importlib, re, shutil, sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

root = Path(__file__).resolve().parent.parent
notebooks = sorted(p for p in (root/'nbs').glob('*.ipynb'))


def table(module, name):
    "The parameters of an exported function as Markdown, or nothing."
    from nbdev.showdoc import show_doc
    try: obj = getattr(importlib.import_module(f'alpaca_ft.{module}'), name)
    except AttributeError: return ''
    doc = show_doc(obj)._repr_markdown_()
    return doc[doc.index('|'):] if '|' in doc else ''


def cells(nb, api):
    "The notebook's cells as a reader of the site sees them."
    module = next((m[1] for c in nb.cells if (m := re.search(r'#\| ?default_exp (\w+)', c.source))), None)
    for c in nb.cells:
        directives = re.findall(r'^#\| ?(.+)$', c.source, re.M) if c.cell_type == 'code' else []
        if any(d.split()[0] in ('hide', 'default_exp') for d in directives): continue
        if c.cell_type == 'code':
            c.source = re.sub(r'^#\|.*\n?', '', c.source, flags=re.M)
            for o in c.outputs:
                if 'data' in o: o.data.pop('text/html', None)
        yield c
        if api and 'export' in directives:
            for name in re.findall(r'^(?:def|class) ([A-Za-z]\w*)', c.source, re.M):
                if text := table(module, name): yield nbformat.v4.new_markdown_cell(text)


def markdown(path, api=True):
    "Markdown of a notebook, and its pictures as {name: bytes}."
    nb = nbformat.read(path, 4)
    nb.cells = list(cells(nb, api))
    nb.metadata.language_info = dict(name='python')
    text, resources = MarkdownExporter().from_notebook_node(nb, dict(unique_key=f'{path.stem}_files/{path.stem}'))
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n', resources.get('outputs', {})


def settings():
    c = configparser.ConfigParser(); c.read(root/'settings.ini')
    return c['DEFAULT']


def colab(text):
    "A Colab link behind each chapter's question, made of the notebook's path and the repository in settings.ini."
    s = settings()
    url = f"https://colab.research.google.com/github/{s['user']}/{s['repo']}/blob/{s['branch']}"
    return re.sub(r'^(\| \[[^]]+\]\((nbs/[\w]+\.ipynb)\) \| .*?) \|$', rf'\1 [Colab]({url}/\2) |', text, flags=re.M)


def readme():
    text, pictures = markdown(root/'nbs'/'index.ipynb', api=False)
    text = colab(text)
    text = '<!-- rendered from nbs/index.ipynb by tools/render.py; edit the notebook -->\n\n' + text.replace('(images/', '(nbs/images/')
    (root/'README.md').write_text(text, encoding='utf-8')


def site(folder):
    folder, s = Path(folder), settings()
    shutil.copytree(root/'nbs'/'images', folder/'images', dirs_exist_ok=True)
    for name in ('CONTRIBUTING.md', 'SECURITY.md', 'CHANGELOG.md'): shutil.copy(root/name, folder/name)
    for p in notebooks:
        text, pictures = markdown(p)
        text = text.replace('](nbs/', '](').replace('.ipynb)', '.md)').replace('](benchmarks/', f"]({s['git_url']}/blob/{s['branch']}/benchmarks/")
        (folder/f'{p.stem}.md').write_text(text, encoding='utf-8')
        for name, data in pictures.items():
            (folder/name).parent.mkdir(exist_ok=True); (folder/name).write_bytes(data)


if __name__ == '__main__': readme() if sys.argv[1:] == ['readme'] else site(sys.argv[2])
