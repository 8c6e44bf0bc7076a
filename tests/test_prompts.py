"The article's templates, byte for byte."
from alpaca_ft import create_prompt, create_prompt_no_answer

NO_INPUT = ('Below is an instruction that describes a task. '
            'Write a response that appropriately completes the request.\n\n'
            '### Instruction:\nSay hi.\n\n### Response:\n')
INPUT = ('Below is an instruction that describes a task, paired with an input that provides further context. '
         'Write a response that appropriately completes the request.\n\n'
         '### Instruction:\nSay hi.\n\n### Input:\nto Rome\n\n### Response:\n')


def test_templates():
    assert create_prompt(dict(instruction='Say hi.', input='', output='Hi!')) == NO_INPUT + 'Hi!'
    assert create_prompt(dict(instruction='Say hi.', input='to Rome', output='Salve!')) == INPUT + 'Salve!'


def test_no_answer():
    row = dict(instruction='Say hi.', input='', output='Hi!')
    assert create_prompt_no_answer(row) == {'text': NO_INPUT}
    assert row['output'] == 'Hi!'
