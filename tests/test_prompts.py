"The article's templates, byte for byte; prompts that are cut."
import copy
import signal

import pytest

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


@pytest.mark.parametrize('room', [300, 301, 302, 303])
@pytest.mark.parametrize('kind', ['alpaca', 'chat'])
def test_cut_inside_a_character(room, kind, tokenizer):
    "What is left of a character may be more tokens than were there; the prompt gets shorter all the same."
    from alpaca_ft import fit_prompt
    from alpaca_ft.prompts import prompt_ids, use_template
    tok = copy.deepcopy(tokenizer)
    tok.chat_template = "{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"
    use_template(tok, kind)
    for text in ('夜の海は静かだ。'*60, '🙂🦀'*120):
        row = dict(instruction='Shorten.' if kind == 'alpaca' else text, input=text if kind == 'alpaca' else '')
        prompt = in_time(fit_prompt, row, tok, room)
        assert room - 6 <= len(prompt_ids(prompt, tok)) <= room and text[:20] in prompt
        if kind == 'alpaca':
            prompt = in_time(fit_prompt, dict(instruction=text, input=''), tok, room)
            assert room - 6 <= len(prompt_ids(prompt, tok)) <= room and prompt.endswith('\n\n### Response:\n')


def test_template_with_a_byte_order_mark(tokenizer, tmp_path):
    "A file of Jinja saved with a mark gives the same prompts as one without."
    from alpaca_ft.prompts import row_prompt, use_template
    prompts = []
    for mark in (b'', b'\xef\xbb\xbf'):
        (tmp_path/'a.jinja').write_bytes(mark + b"{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
        tok = copy.deepcopy(tokenizer)
        use_template(tok, str(tmp_path/'a.jinja'))
        prompts.append(row_prompt(dict(instruction='Say hi.', input=''), tok))
    assert prompts[0] == prompts[1] == 'Say hi.</s>'


def in_time(f, *args):
    "What a function returns, unless it takes ten seconds."
    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(10)
    try:
        return f(*args)
    except TimeoutError:
        pass
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    raise AssertionError('still at work after ten seconds')
