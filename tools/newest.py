#!/usr/bin/env python3
"""Try the course against the newest releases of what it stands on, and write a report that a person can read.

usage: newest.py [REPORT.md]     in an environment with the development requirements; `make newest` makes one
The pins and the upper bounds in settings.ini are set aside for a few packages; all others stay at their pins. Then the
notebooks and the tests run as in `make test`. The exit code is 0 if all of them pass.
"""
import configparser
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

root = Path(__file__).resolve().parent.parent
NEWEST = ('transformers', 'trl', 'datasets', 'nbdev')


def pinned():
    "Of each package, the version in constraints.txt."
    lines = (root/'constraints.txt').read_text(encoding='utf-8').splitlines()
    return dict(line.split('==') for line in lines if '==' in line)


def upgrade():
    "Install the newest releases beside the other pins; what pip says where they do not go together."
    pins = pinned()
    others = root/'build'/'constraints-newest.txt'
    others.parent.mkdir(exist_ok=True)
    kept = [f'{name}=={v}' for name, v in pins.items() if name in ('torch', 'numpy', 'wandb', 'peft', 'accelerate')]
    others.write_text('\n'.join(kept) + '\n')
    command = [sys.executable, '-m', 'pip', 'install', '--quiet', '--upgrade', '-c', str(others), *NEWEST]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stderr.strip()


def run(command, folder):
    "(exit code, the last lines that say what failed)."
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
    env = os.environ | dict(OMP_NUM_THREADS='1', PATH=path)
    try:
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    except FileNotFoundError:
        return 1, [f'{command[0]}: there is no such command any more']
    said = (done.stdout + done.stderr).splitlines()
    telling = [line for line in said if re.search(r'FAILED|Error\b|^E  |in \w+\.ipynb|passed|failed', line)]
    return done.returncode, telling[-60:]


CHECKS = {'notebooks': (['nbdev_test', '--n_workers', '2'], root/'nbs'),
          'tests': ([sys.executable, '-m', 'pytest', '-n', '2', '--dist', 'loadfile', '-q', '--tb=line'], root)}


def bounds():
    "What settings.ini asks for."
    c = configparser.ConfigParser()
    c.read(root/'settings.ini')
    asked = (c['DEFAULT']['requirements'] + ' ' + c['DEFAULT']['dev_requirements']).split()
    return {name: next((r for r in asked if re.match(rf'{name}\b', r)), '-') for name in NEWEST}


def report():
    "(exit code, Markdown)."
    pins, code = pinned(), 0
    failed, said = upgrade()
    lines = ['# The newest releases', '', '| package | pinned | settings.ini | tried |', '|---|---|---|---|']
    for name, asked in bounds().items():
        lines.append(f'| {name} | {pins.get(name, "-")} | `{asked}` | {version(name)} |')
    if failed:
        return 1, '\n'.join([*lines, '', 'They cannot be installed together:', '', '```', said[-4000:], '```', ''])
    for name, (command, folder) in CHECKS.items():
        bad, telling = run(command, folder)
        code = code or bad
        lines += ['', f'## {name}: {"failed" if bad else "passed"}', '', '```', *telling, '```']
    return code, '\n'.join([*lines, '', 'What to do with this: CONTRIBUTING.md, "Kept fresh".', ''])


if __name__ == '__main__':
    to = Path(sys.argv[1]) if len(sys.argv) > 1 else root/'newest.md'
    code, text = report()
    to.write_text(text, encoding='utf-8')
    print(text)
    sys.exit(1 if code else 0)
