"Chats and other rows: masks against a slow reference, on the stock templates that TRL brings; a run on chats."
import copy
import json
import re
from datetime import datetime
from pathlib import Path

import pytest
import several
import trl
from tokenizers import processors
from transformers import AutoTokenizer

from alpaca_ft import Refused, RunConfig, load_alpaca, train, use_template
from alpaca_ft.sampling import before_after
from alpaca_ft.prompts import end_ids, is_alpaca, row_prompt, tokenize
from alpaca_ft.templates import DATE, DAY, ChatTemplate, render

STOCK = Path(trl.__file__).parent/'chat_templates'
# what ends an answer in each of them, before another turn and at the end
ENDS = dict(llama3=('<|eot_id|>',)*2, llama3_1=('<|eot_id|>',)*2, llama3_2=('<|eot_id|>',)*2,
            gemma=('<end_of_turn>',)*2,
            gemma3=('<end_of_turn>',)*2, qwen2_5=('<|im_end|>',)*2, qwen3=('<|im_end|>',)*2, phi3=('<|end|>',)*2,
            cohere=('<|END_OF_TURN_TOKEN|>',)*2, gptoss=('<|end|>', '<|return|>'))
BEFORE = dict(qwen3=('', '<think>\n\n</think>\n\n'), gptoss=('<|channel|>final<|message|>',)*2)  # what is learnt too
CHAT = [dict(role='user', content='Name a fruit, please.'), dict(role='assistant', content='An apple - ünd more.'),
        dict(role='user', content='An apple - ünd more. Another?'), dict(role='assistant', content='A pear.')]


def tokenizer_with(name, demo):
    "The demo's tokenizer with a stock template and its special tokens."
    text = (STOCK/f'{name}.jinja').read_text(encoding='utf-8')
    tokenizer = AutoTokenizer.from_pretrained(demo)
    special = {token for token in re.findall(r'<[|｜]?[\w▁ ]+[|｜]?>', text) if not re.search('think|tool', token)}
    tokenizer.add_special_tokens(dict(additional_special_tokens=sorted(special)))
    tokenizer.chat_template = text
    return tokenizer


@pytest.fixture(scope='module')
def demo():
    from alpaca_ft.model import model_folder
    return model_folder('demo')


class Clock(datetime):
    "The clock of transformers, on another day."
    day = datetime(2031, 12, 5)

    @classmethod
    def now(cls, tz=None):
        return cls.day


def slow_mask(text, ids, tokenizer, learnt):
    "The mask, token by token: each piece that is learnt is looked for behind the one before, and tokens are measured."
    spans, place = [], 0
    for piece in learnt:
        at = text.index(piece, place)
        spans.append((at, at + len(piece)))
        place = at + len(piece)
    mask = []
    for i in range(len(ids)):
        before, here = tokenizer.decode(ids[:i]), tokenizer.decode(ids[:i + 1])
        start = len(before.rstrip('\ufffd'))
        mask.append(int(any(first <= start < last for first, last in spans) and here != before))
    return mask


@pytest.mark.parametrize('name', list(ENDS))
def test_masks(name, demo, monkeypatch):
    "Answers and their ends are learnt, and nothing else; ids are those of transformers on the day of DATE."
    if not (STOCK/f'{name}.jinja').exists():
        pytest.skip(f'this TRL does not bring {name}.jinja')
    tokenizer = tokenizer_with(name, demo)
    use_template(tokenizer, 'chat')
    monkeypatch.setattr('transformers.utils.chat_template_utils.datetime', Clock)
    monkeypatch.setattr(Clock, 'day', DAY)
    ids, mask = ChatTemplate(tokenizer).tokens(CHAT)
    assert ids == tokenizer.apply_chat_template(CHAT, date_string=DATE)['input_ids']
    before, ends = BEFORE.get(name, ('', '')), ENDS[name]
    learnt = [before[0] + CHAT[1]['content'] + ends[0], before[1] + CHAT[3]['content'] + ends[1]]
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, date_string=DATE)
    first = text.rindex(learnt[0], 0, text.index(CHAT[2]['content'], text.index(ends[0])))
    padded = '\0'*first + text[first:]  # the same words of the user do not count
    assert mask == slow_mask(padded, ids, tokenizer, learnt)
    assert tokenizer.convert_tokens_to_ids(ends[1]) in end_ids(tokenizer)


@pytest.mark.parametrize('name', ['gemma', 'qwen3', 'qwen2_5'])
def test_prompt_is_the_beginning(name, demo):
    "What the model is asked with is what stood before the answer in training."
    if not (STOCK/f'{name}.jinja').exists():
        pytest.skip(f'this TRL does not bring {name}.jinja')
    tokenizer = tokenizer_with(name, demo)
    use_template(tokenizer, 'chat')
    row = dict(instruction='Name a fruit.', input='Not an apple.', output='A pear.')
    ids, mask = ChatTemplate(tokenizer).tokens([dict(role='user', content='Name a fruit.\n\nNot an apple.'),
                                                dict(role='assistant', content='A pear.')])
    asked = tokenizer(row_prompt(row, tokenizer), add_special_tokens=False)['input_ids']
    assert ids[:mask.index(1)] == asked


def test_no_eos(tokenizer):
    "A tokenizer without EOS is refused under a chat template too."
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token, tokenizer.chat_template = None, '{{ messages[0].content }}'
    with pytest.raises(Refused, match='no EOS token'):
        use_template(tokenizer, 'chat')


@pytest.mark.parametrize('name', ['deepseekv3', 'deepseek_r1_distill', 'nemotron_3_nano'])
def test_prompt_that_no_answer_follows(name, demo):
    "A template that asks with an open <think>, and writes answers without it, is refused."
    if not (STOCK/f'{name}.jinja').exists():
        pytest.skip(f'this TRL does not bring {name}.jinja')
    with pytest.raises(Refused, match='asks with .*which it does not write before an answer'):
        use_template(tokenizer_with(name, demo), 'chat')


@pytest.mark.parametrize('processor', [processors.ByteLevel(trim_offsets=True), processors.Sequence([
    processors.ByteLevel(trim_offsets=True), processors.TemplateProcessing('<|im_start|> $A', special_tokens=[
        ('<|im_start|>', 1)])])], ids=['alone', 'with another'])
def test_indentation_is_learnt(processor, demo):
    "Spaces of an answer too, where the tokenizer's post-processor takes them out of the places of tokens."
    tokenizer = tokenizer_with('qwen2_5', demo)
    tokenizer.backend_tokenizer.post_processor = processor
    use_template(tokenizer, 'chat')
    code = 'def f(x):\n    if x:\n            return 1\n\n    return  2   # ünd'
    chat = [*CHAT[:3], dict(role='assistant', content=code)]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    ids, mask = ChatTemplate(tokenizer).tokens(chat)
    assert ids == tokenizer(text, add_special_tokens=False)['input_ids']
    assert any(not tokenizer.decode(i).strip(' ') for i in ids)  # tokens of nothing but spaces
    learnt = [CHAT[1]['content'] + '<|im_end|>', code + '<|im_end|>']
    assert mask == slow_mask(text, ids, tokenizer, learnt)


def write_chats(path, n=24):
    "Chats of two questions, some with a system message."
    rows = []
    for i in range(n):
        turns = [dict(role='user', content=f'What is {i} plus one?'), dict(role='assistant', content=f'It is {i + 1}.'),
                 dict(role='user', content='And plus two?'), dict(role='assistant', content=f'It is {i + 2}.')]
        if i % 3 == 0:
            turns.insert(0, dict(role='system', content='Answer briefly.'))
        rows.append(dict(messages=turns))
    path.write_text(''.join(json.dumps(r) + '\n' for r in rows))


def test_run_on_chats(tiny, tmp_path):
    "A run on chats of several turns: the template is in the saved tokenizer, and samples are asked in it."
    write_chats(tmp_path/'chats.jsonl')
    template = tmp_path/'own.jinja'
    template.write_text("{% for m in messages %}{{ m.role + ':\n' + m.content }}"
                        "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
                        "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}")
    cfg = RunConfig(model=str(tiny), data=str(tmp_path/'chats.jsonl'), template=str(template), out=str(tmp_path/'run'),
                    n_freeze=2, seq_len=128, max_steps=3, n_samples=2, max_new_tokens=4, dtype='fp32')
    run = train(cfg)
    assert 'messages' in run.rows['train'].column_names
    saved = AutoTokenizer.from_pretrained(tmp_path/'run'/'model')
    assert not is_alpaca(saved) and saved.chat_template == template.read_text()
    samples = [json.loads(line) for line in (tmp_path/'run'/'samples.jsonl').read_text().splitlines()]
    assert all(s['prompt'].endswith('user:\nAnd plus two?\nassistant:\n') for s in samples)
    assert all(re.fullmatch(r'It is \d+\.', s['reference']) for s in samples)
    assert [line for line in before_after(tmp_path / 'run' / 'samples.jsonl') if line.startswith('asked')] == [
        'asked:  And plus two?'
    ] * 2


def test_a_row_that_the_template_does_not_take(tiny, here, command):
    "It is named by its file and number; left out and counted with --skip-bad-rows; in a talk it ends nothing."
    rows = [dict(instruction=f'What is {i} plus one?', input='', output=f'It is {i + 1}.') for i in range(24)]
    rows[4]['input'] = 'one </s> two'
    (here/'rows.jsonl').write_text('\n' + ''.join(json.dumps(row) + '\n' for row in rows))
    (here/'own.jinja').write_text("{% for m in messages %}{{ m.role + ':' + m.content }}"
                                  "{{ eos_token if m.role == 'assistant' }}{% endfor %}"
                                  "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}")
    words = ['--model', tiny, '--data', 'rows.jsonl', '--template', 'own.jinja', '--n-freeze', 2, '--seq-len', 128,
             '--max-steps', 2, '--n-samples', 1, '--max-new-tokens', 2, '--dtype', 'fp32', '--out', 'run']
    code, out, err = command('train', *words)
    why = "rows.jsonl: row 6: the user's text holds the special token '</s>'"
    assert code == 2 and why in err and '(1 bad of 24 rows;' in err and len(err.splitlines()) == 1, err
    code, out, err = command('train', *words, '--skip-bad-rows')
    assert code == 0 and f'left out  1 bad rows, the first: {why}' in err, err
    code, out, err = command('evaluate', 'run', '--against', 'none', '--n-samples', 1, '--max-new-tokens', 2)
    assert code == 0 and '2 rows held back' in out, err
    code, out, err = command('evaluate', 'run', '--data', 'rows.jsonl', '--against', 'none')
    assert code == 2 and why in err, err
    code, out, err = command('sample', 'run', '--file', 'rows.jsonl', '--to', 'to.jsonl')
    assert code == 2 and why in err and not (here/'to.jsonl').exists(), err
    said = several.command('chat', 'run', '--max-new-tokens', 2, given='Hello </s>\nHello\n/quit\n')
    assert said.returncode == 0 and "> [the user's text holds the special token '</s>'" in said.stdout, said.stderr
    assert len(said.stdout.split('> ')) == 4 and said.stdout.split('> ')[2].strip(), said.stdout


def test_chats_in_alpaca_prompts(tiny, tmp_path):
    "Chats without a system message go through Alpaca's prompts; one question and answer is an Alpaca row."
    rows = [dict(conversations=[{'from': 'human', 'value': 'Hi.'}, {'from': 'gpt', 'value': 'Hello.'}]),
            dict(messages=[dict(role='user', content='Hi.'), dict(role='assistant', content='Hello.'),
                           dict(role='user', content='Bye.'), dict(role='assistant', content='Bye.')])]
    (tmp_path/'rows.json').write_text(json.dumps(rows))
    ds = load_alpaca(tmp_path/'rows.json')['train']
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    one, two = tokenize(ds, tokenizer)
    plain = tokenize(ds.select([0]).remove_columns('messages'), tokenizer)[0]
    assert one == plain
    assert two['input_ids'][:len(one['input_ids'])] == one['input_ids']
    assert sum(two['completion_mask']) > sum(one['completion_mask'])


def test_the_copy_of_the_tokenizer(demo):
    "It takes a while, so it is made where rows are tokenized, and not for each question."
    tokenizer = tokenizer_with('qwen2_5', demo)
    use_template(tokenizer, 'chat')
    template = ChatTemplate(tokenizer)
    template.ask(CHAT[:1])
    template.spans(CHAT)
    assert 'raw' not in vars(template)
    template.tokens(CHAT)
    assert template.raw is template.raw


@pytest.mark.parametrize('name', ['gptoss', 'llama3_2'])
def test_the_day(name, demo, monkeypatch):
    "Templates that ask for the date are given the same day always, in the format that they ask for."
    if not (STOCK/f'{name}.jinja').exists():
        pytest.skip(f'this TRL does not bring {name}.jinja')
    tokenizer = tokenizer_with(name, demo)
    assert 'strftime_now' in tokenizer.chat_template
    monkeypatch.setattr('transformers.utils.chat_template_utils.datetime', Clock)
    text = render(tokenizer, CHAT[:1], ask=True)
    assert '2031' not in text and ('2024-07-26' in text or DATE in text)
    monkeypatch.setattr(Clock, 'day', DAY)
    assert text == tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)


def test_formats_of_the_day(demo, monkeypatch):
    "Each format, spaces and line breaks at the beginning too, as transformers writes them on that day."
    tokenizer = AutoTokenizer.from_pretrained(demo)
    monkeypatch.setattr('transformers.utils.chat_template_utils.datetime', Clock)
    monkeypatch.setattr(Clock, 'day', DAY)
    for begin in ('', '\n', '\n\n', '  ', ' \n {% if messages %}\n', '  {%- if messages %}'):
        end = '{% endif %}' if 'if' in begin else ''
        for form in ('%d %b %Y', '%A, %B %d, %Y', '%Y-%m-%dT%H:%M:%S', '%a %j %y %I %p'):
            jinja = begin + "{{ strftime_now('" + form + "') }} {{ messages[0].content }}" + end
            expected = tokenizer.apply_chat_template(CHAT[:1], chat_template=jinja, tokenize=False)
            assert render(tokenizer, CHAT[:1], template=jinja) == expected, (begin, form)
