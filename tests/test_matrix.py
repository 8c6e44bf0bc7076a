"""Models and options in pairs: any two choices meet in a run that is held against a plain loop.

`python tests/matrix.py` tries the whole product, and with `--two` all pairs in two processes.
"""
import itertools

import pytest

import matrix

CELLS = [pytest.param(cell, id=cell.id) for cell in matrix.pairs(matrix.FAMILIES)]
QUICK = ('llama-tied', 'gemma2', 'llama', 'phi3')  # of the cells in two processes
CELLS += [
    pytest.param(cell, id=cell.id, marks=() if cell.family in QUICK else pytest.mark.slow) for cell in matrix.TWO
]
CELLS += [pytest.param(cell, id=cell.id, marks=pytest.mark.slow) for cell in matrix.pairs(matrix.MORE)]


@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    "The rows, and every family as a model folder."
    folder = tmp_path_factory.mktemp('matrix')
    matrix.warm_up()
    matrix.make_parts(folder, matrix.FAMILIES | matrix.MORE)
    return folder


@pytest.mark.parametrize('cell', CELLS)
def test_cell(cell, parts):
    "The run ends as the oracle says, or is refused as promised."
    outcome, words, log = matrix.one(parts, cell)
    assert outcome != 'FAILED', f'{words}\n{log}'


def test_all_pairs_in_two():
    "In two processes too, DDP and FSDP2, but for those that are refused."
    cells = matrix.pairs(matrix.FAMILIES, matrix.IN_TWO, refused=False)
    assert not any(matrix.promised(cell) for cell in cells)
    choices = dict(family=list(matrix.FAMILIES)) | matrix.IN_TWO
    missing = []
    for one, other in itertools.combinations(choices, 2):
        there = {(getattr(cell, one), getattr(cell, other)) for cell in cells}
        missing += [two for two in itertools.product(choices[one], choices[other]) if two not in there]
    assert missing == [('rotate', True)]


def test_all_pairs():
    "The covering array has each pair of choices, and each family every choice."
    cells = matrix.pairs(matrix.FAMILIES)
    choices = dict(family=list(matrix.FAMILIES)) | matrix.OPTIONS
    for one in choices:
        for other in choices:
            met = {(getattr(cell, one), getattr(cell, other)) for cell in cells}
            if one != other:
                assert met == {(a, b) for a in choices[one] for b in choices[other]}
