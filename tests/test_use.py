"After the training: evaluate, judge, sample, chat, export."
import http.server
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import select
import time
from pathlib import Path

import pytest
import several
import torch

from alpaca_ft import RunConfig, Refused, create_prompt_no_answer, load_alpaca, train
from alpaca_ft.prompts import alpaca_chat_template


@pytest.fixture(scope='module')
def done(tiny, rows, tmp_path_factory):
    out = tmp_path_factory.mktemp('use')/'run'
    return train(RunConfig(model=str(tiny), data=str(rows), out=str(out), n_freeze=2, seq_len=256, max_steps=5,
                           n_samples=0, lr=5e-3, dtype='fp32'), [])


@pytest.mark.parametrize('bos', [False, True])
def test_template(tokenizer, bos):
    "Byte-equal prompts; token ids as in training, BOS included where the tokenizer adds one."
    from copy import deepcopy
    from tokenizers.processors import TemplateProcessing
    t = deepcopy(tokenizer)
    if bos:
        t.backend_tokenizer.post_processor = TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 0)])
    t.chat_template = alpaca_chat_template(t)
    for r in load_alpaca()['train'].select(range(60)):
        ask, prompt = [dict(role='user', content=r['instruction'],
                            input=r['input'])], create_prompt_no_answer(r)['text']
        assert t.apply_chat_template(ask, tokenize=False) == ('<s>' if bos else '') + prompt
        assert t.apply_chat_template(ask, return_dict=False) == t(prompt)['input_ids']
    two = [dict(role='user', content='a'), dict(role='assistant', content='b'), dict(role='user', content='c')]
    assert t.apply_chat_template(two, tokenize=False).count('<s>') == bos and 'b</s>Below' in t.apply_chat_template(
        two, tokenize=False
    )
    row = next(r for r in load_alpaca()['train'] if r['input'])
    said = [dict(role='system', content=row['input']), dict(role='user', content=row['instruction'])]
    assert (
        t.apply_chat_template(said, return_dict=False) == t(create_prompt_no_answer(row)['text'])['input_ids']
    )  # a system message is the input
    with pytest.raises(Exception, match='system, user and assistant'):
        t.apply_chat_template([dict(role='tool', content='x')], tokenize=False)


def test_saved_template(done):
    from transformers import AutoTokenizer
    assert '### Response:' in AutoTokenizer.from_pretrained(done.out/'model').chat_template
    assert done.tokenizer.chat_template is None


def test_losses_are_the_trainers(done):
    from alpaca_ft.evaluate import row_losses
    last = [json.loads(l) for l in open(done.out/'metrics.jsonl')][-1]
    for batch_tokens in (256, 4096):
        sums = [sum(x)
                for x in zip(*row_losses(done.model, done.tokenizer, done.rows['test'], 256, batch_tokens).values())]
        assert abs(sums[0]/sums[1] - last['eval_loss']) < 1e-4
        assert abs(sums[2]/sums[3] - last['eval_response_loss']) < 1e-4


def test_evaluate(done, command):
    code, out, err = command('evaluate', done.out, '--against', '--n-samples', 3, '--max-new-tokens', 6)
    assert code == 0, err
    result = json.loads((done.out/'evaluation.json').read_text())
    loss = result['measures'][1]
    assert loss['measure'] == 'loss, all tokens' and loss['value'] < loss['other']
    assert loss['low'] is loss['noise'] is None
    assert 'too few rows to say' in out and result['rows'] == len(done.rows['test']) == 4
    side = [json.loads(l) for l in open(done.out/'evaluation.jsonl')]
    assert len(side) == 3 and len(side[0]['answers']) == 2


def test_evaluate_page_escapes(done, tmp_path):
    from alpaca_ft.evaluate import evaluate
    rows = tmp_path/'rows.json'
    rows.write_text(json.dumps([dict(instruction='<script>x</script>', input='', output='<b>y</b>')]))
    evaluate(str(done.out/'model'), data=str(rows), n_samples=1, max_new_tokens=4, to=tmp_path/'e')
    page = (tmp_path/'e'/'evaluation.html').read_text()
    assert '<script>' not in page and '&lt;script&gt;x' in page and '&lt;b&gt;y' in page


@pytest.fixture
def server():
    "Plays a judge: `say` decides by the two answers; the first `broken` requests fail."
    class H(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            s = self.server
            s.seen.append((self.path, self.headers.get('Authorization')))
            text = json.loads(self.rfile.read(int(self.headers['Content-Length'])))['messages'][0]['content']
            if len(s.seen) <= s.broken:
                return self.send_error(503)
            a, b = re.search(r'Answer A:\n(.*)\n\nAnswer B:\n(.*)\n\nReply', text, re.S).groups()
            body = json.dumps(dict(choices=[dict(message=dict(content=s.say(a, b)))])).encode()
            self.send_response(200)
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        def log_message(self, *args): pass
    s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), H)
    s.seen, s.broken, s.say = [], 0, lambda a, b: 'A'
    threading.Thread(target=s.serve_forever, daemon=True).start()
    s.url = f'http://127.0.0.1:{s.server_port}/v1'
    yield s
    s.shutdown()
    s.server_close()


def test_judge(server, tmp_path, monkeypatch):
    from alpaca_ft.evaluate import judge
    monkeypatch.setenv('OPENAI_API_KEY', 'k')
    pairs = [(f'p{i}', 'good', 'bad') for i in range(8)]
    server.say = lambda a, b: '**A**' if a == 'good' else 'b'
    v = judge(pairs, server.url, 'm', tmp_path/'j.jsonl')
    assert (v['wins'], v['ties'], v['losses'], v['noise']) == (8, 0, 0, False) and len(server.seen) == 16
    assert server.seen[0] == ('/v1/chat/completions', 'Bearer k')
    judge(pairs, server.url, 'm', tmp_path/'j.jsonl')
    assert len(server.seen) == 16
    server.say = lambda a, b: 'A'  # likes the first answer, whatever it is
    v = judge(pairs, server.url, 'another', tmp_path/'j.jsonl')
    assert v['ties'] == 8 and v['share'] == .5 and v['noise']


def test_judge_fails_and_goes_on(server, tmp_path):
    from alpaca_ft.evaluate import judge
    server.broken = 1
    assert judge([('p', 'a', 'b')], server.url, 'm', tmp_path/'j.jsonl')['ties'] == 1 and len(server.seen) == 3
    with pytest.raises(Refused, match='does not answer'):
        judge([('p', 'a', 'b')], 'http://127.0.0.1:9', 'm', tmp_path/'j.jsonl')


SAID = {'A': 'A', 'b.': 'B', '**t**': 'T', '_A_': 'A', 'Answer B is better': 'B', 'a tie': 'T', "It's a tie.": 'T',
        'A tie': 'T', 'Tie': 'T', 'a good answer is B': 'B', '': None, None: None, '<think>\nLet me look': None,
        'This is a hard one': None, 65: None}  # verdicts


def test_verdicts(server, tmp_path):
    "What names none of the three is no tie: it is refused at once, and not kept."
    from alpaca_ft.evaluate import judge
    for i, (said, letter) in enumerate(SAID.items()):
        server.say, kept = lambda a, b, said=said: said, tmp_path/f'{i}.jsonl'
        server.seen.clear()
        if letter:
            judge([('p', 'a', 'b')], server.url, 'm', kept)
            assert [json.loads(line)['said'] for line in open(kept)] == [letter]*2, said
        else:
            with pytest.raises(Refused, match='none of A, B and T; take one that answers at once') as e:
                judge([('p', 'a', 'b')], server.url, 'm', kept)
            assert len(server.seen) == 1 and '\n' not in str(e.value) and not kept.exists(), said


def test_sample(done, here, command):
    code, out, err = command('sample', done.out, '--instruction', 'Name a tree.', '--max-new-tokens', 4)
    assert code == 0 and out.strip()
    (here/'ask.jsonl').write_text('{"instruction": "a"}\n{"instruction": "b", "input": "c", "output": "d"}\n'
                                  '{"instruction": "e"}\n')
    assert command('sample', done.out/'model', '--file', 'ask.jsonl', '--to', 'got.jsonl', '--batch-size', 1,
                   '--max-new-tokens', 4)[0] == 0
    got = [json.loads(l) for l in open('got.jsonl')]
    assert [r['instruction'] for r in got] == ['a', 'b', 'e'] and got[1]['output'] == 'd'
    assert all(r['tokens'] <= 4 for r in got)
    (here/'bad.jsonl').write_text('{"instruction": "a"}\n{"instruction": 3}\n')
    for argv, why in ((['--file', 'bad.jsonl'], 'row 2: instruction is of type int'), ([], 'nothing to answer'),
                      (['--file', 'ask.jsonl', '--to', 'got.jsonl'], 'exists already')):
        code, out, err = command('sample', done.out, *argv)
        assert code == 2 and why in err and len(err.splitlines()) == 1


def test_no_model_yet(done, here, command):
    (here/'run').mkdir()
    (here/'run'/'config.yaml').write_text((done.out/'config.yaml').read_text())
    code, out, err = command('sample', 'run', '--instruction', 'x')
    assert code == 2 and 'has no model yet' in err


def test_advice_works(done, here, command):
    "The command that is named for a run without a model, typed as it stands, ends the run."
    name = 'a run'
    shutil.copytree(done.out, name, ignore=shutil.ignore_patterns('model'))
    code, out, err = command('sample', name, '--instruction', 'x')
    assert code == 2, err
    typed = shlex.split(err.partition('finish it with: ')[2])
    code, out, err = command(*typed[1:])
    assert typed[0] == 'alpaca_ft' and code == 0 and (here/name/'model/config.json').exists(), (typed, err)


# rows that are asked

def ask_file(path, *rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return path


def test_columns_of_the_run(done, here):
    "Where a file has the names that the run's rows had, these count, as in training; else our own."
    from alpaca_ft.use import to_answer
    shutil.copytree(done.out, 'run')
    with open('run/config.yaml', 'a') as f:
        f.write('columns: instruction=question,output=answer\n')
    ask_file(here/'theirs.jsonl', dict(instruction='Answer the question.', question='Q0?', answer='a'))
    ask_file(here/'ours.jsonl', dict(instruction='Name a tree.'))
    assert to_answer('run', None, '', 'theirs.jsonl', None)[0]['instruction'] == 'Q0?'
    assert to_answer('run', None, '', 'ours.jsonl', None)[0]['instruction'] == 'Name a tree.'
    with open('run/config.yaml', 'a') as f:
        f.write('columns: messages=chat\n')
    chat = [dict(role='user', content='Q1?'), dict(role='assistant', content='A1.')]
    ask_file(here/'both.jsonl', dict(instruction='x', output='y', chat=chat), dict(instruction='x', chat=chat[:1]))
    assert [r['instruction'] for r in to_answer('run', None, '', 'both.jsonl', None)] == ['Q1?', 'Q1?']


def test_rows_without_answers(here):
    "An empty answer is none; and of a question with a chat beside it the question counts, as in training."
    from alpaca_ft.use import ask_rows
    turns = [dict(role='user', content='x')]
    ask_file(here/'a.jsonl', dict(instruction='a', output=''), dict(instruction='b', output=None),
             dict(instruction='c', messages=turns), dict(prompt='d', completion=''), dict(instruction='e', output='f'),
             dict(messages=turns, output=''))
    rows = ask_rows('a.jsonl')
    assert [r['instruction'] for r in rows] == ['a', 'b', 'c', 'd', 'e', 'x']
    assert [r.get('output') for r in rows] == [None]*4 + ['f', None] and not any('messages' in r for r in rows)


def test_place_of_the_answers(done, here, command, monkeypatch):
    "It is looked at before the model is loaded; what was answered before an interruption stays, and is named later."
    from alpaca_ft import use
    ask_file(here/'a.jsonl', *[dict(instruction=f'Name {i}.') for i in range(20)])
    Path('file').write_text('x')
    Path('empty.jsonl').write_text('')
    load = use.load_both
    monkeypatch.setattr(use, 'load_both', None)
    for argv, why in ((['a.jsonl', '--to', 'nodir/x.jsonl'], 'nodir/x.jsonl: cannot be written'),
                      (['a.jsonl', '--to', 'file/x.jsonl'], 'cannot be written'),
                      (['empty.jsonl'], 'empty.jsonl: no rows')):
        code, out, err = command('sample', done.out, '--file', *argv)
        assert code == 2 and why in err and len(err.splitlines()) == 1, err
    monkeypatch.setattr(use, 'load_both', load)
    answer, n = use.answers_to, iter('ok')
    def stops(*args):
        if not next(n, None):
            raise KeyboardInterrupt
        return answer(*args)
    monkeypatch.setattr(use, 'answers_to', stops)
    argv = ['sample', done.out, '--file', 'a.jsonl', '--max-new-tokens', 2, '--batch-size', 1]
    assert command(*argv, '--to', 'x.jsonl')[0] == 130
    assert not Path('x.jsonl').exists() and len(Path('x.jsonl.part').read_text().splitlines()) == 16
    code, out, err = command(*argv, '--to', 'x.jsonl')
    assert code == 2 and 'x.jsonl.part' in err and len(err.splitlines()) == 1, err
    n = iter('ok')
    code, out, err = command(*argv)
    assert code == 130 and len(out.splitlines()) == 16, err  # printed as they come


def test_prompts_that_are_cut(done, tiny, here, command):
    "One line says how many; a model folder has all the positions of its model."
    ask_file(here/'a.jsonl', dict(instruction='Sum up.', input='The tide came in. '*80), dict(instruction='Hi.'))
    code, out, err = command('sample', done.out, '--file', 'a.jsonl', '--max-new-tokens', 2)
    assert code == 0 and '1 of 2 prompts have more than 256 tokens and were cut' in err, err
    code, out, err = command('sample', tiny, '--file', 'a.jsonl', '--max-new-tokens', 2)
    assert code == 0 and '1 of 2 prompts have more than 510 tokens' in err, err
    code, out, err = command('sample', done.out, '--instruction', 'Hi.', '--max-new-tokens', 2)
    assert code == 0 and 'cut' not in err, err


def test_template_of_a_foreign_model(done, tokenizer, here, command):
    "Alpaca's prompts, with a line that says so where the model has a template of its own, or that one."
    from copy import deepcopy
    from conftest import tiny_model
    from test_export import TURNS
    from alpaca_ft.use import load_both, prompts_of
    tok = deepcopy(tokenizer)
    tok.add_special_tokens(dict(additional_special_tokens=['<|im_start|>', '<|im_end|>']))
    tok.chat_template = TURNS
    tiny_model(608).save_pretrained('other')
    tok.save_pretrained('other')
    argv, said = ['sample', './other', '--instruction', 'Hi.', '--max-new-tokens', 2], "asked in Alpaca's prompts"
    for more, hint in (([], True), (['--template', 'alpaca'], False), (['--template', 'chat'], False)):
        code, out, err = command(*argv, *more)
        assert code == 0 and (said in err) is hint, err
    assert said not in command('sample', done.out, *argv[2:])[2]
    asked = prompts_of([dict(instruction='Hi.', input='')], load_both('./other', template='chat')[1], 99)
    assert asked == ['<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n']
    for name in ('sample', 'chat'):
        code, out, err = command(name, done.out, *argv[2:4 if name == 'sample' else 2], '--template', 'chat')
        assert code == 2 and 'template of its training' in err and len(err.splitlines()) == 1, err


class Terminal:
    "Python code in a child process with a real terminal: what it writes is in `seen`."
    def __init__(self, code):
        self.seen = ''
        self.pid, self.fd = pty.fork()
        if not self.pid:
            # a job in the background has it ignored, and its children inherit that
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.execv(sys.executable, [sys.executable, '-c', code])

    def read(self, end):
        more = select.select([self.fd], [], [], max(0, end - time.time()))[0]
        assert more, f'nothing more came after: {self.seen[-2000:]}'
        self.seen += os.read(self.fd, 4096).decode(errors='replace')

    def until(self, *what, seconds=120):
        end = time.time() + seconds
        while not any(w in self.seen for w in what):
            self.read(end)

    def type(self, line):
        self.seen = ''
        os.write(self.fd, line.encode() + b'\n')

    def ended(self):
        pid, self.pid = self.pid, 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def close(self):
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)


def interrupted(t):
    "Whether Ctrl-C came in mid-answer; else the answer had ended before."
    t.type('Name a tree.')
    t.until('tree.\r\n')
    t.seen = ''
    end = time.time() + 120
    while len(t.seen) < 5:
        t.read(end)  # something was streamed
    os.kill(t.pid, signal.SIGINT)
    t.until('turn is forgotten', '/quit leaves')
    t.until('> ')
    return 'turn is forgotten' in t.seen


def test_chat_on_a_terminal(tiny):
    "A real terminal: streams, survives Ctrl-C in mid-answer, forgets, leaves."
    t = Terminal(f'from alpaca_ft.use import chat; chat({str(tiny)!r}, 400)')
    try:
        t.until('> ')
        assert any(interrupted(t) for _ in range(10))
        t.type('/reset')
        t.until('forgotten')
        t.until('> ')
        seen = t.seen
        t.type('/quit')
        assert t.ended() == 0
        assert '\x1b]' not in seen
    finally:
        t.close()


def test_turns(tokenizer):
    from alpaca_ft.use import turn_ids
    assert tokenizer.decode(turn_ids('a\n### Input:\nb', tokenizer,
                                     True)) == create_prompt_no_answer(dict(instruction='a', input='b'))['text']
    assert tokenizer.eos_token_id not in turn_ids('say </s>', tokenizer, True)


@pytest.mark.parametrize('dtype', ['bf16', 'fp32'])
def test_export(done, here, dtype, command):
    code, out, err = command('export', done.out, '--to', 'handed', '--dtype', dtype)
    assert code == 0, err
    probe = ("import sys, torch\nfrom transformers import AutoModelForCausalLM as M, AutoTokenizer as T\n"
             "m, t = M.from_pretrained('handed'), T.from_pretrained('handed')\n"
             "asked = [dict(role='user', content='Name a tree.')]\n"
             "ids = t.apply_chat_template(asked, return_tensors='pt', return_dict=False)\n"
             "print(m.dtype, m.config.tie_word_embeddings, m.generation_config.eos_token_id, "
             "m.generate(ids, max_new_tokens=2).shape[0], 'alpaca_ft' in sys.modules)")
    r = subprocess.run([sys.executable, '-c', probe], capture_output=True, text=True,
                       env=os.environ | dict(HF_HUB_OFFLINE='1'))
    assert r.stdout.split() == [dict(bf16='torch.bfloat16', fp32='torch.float32')[dtype], 'False',
                                str(done.tokenizer.eos_token_id), '1', 'False'], r.stderr
    from transformers import AutoModelForCausalLM
    again = AutoModelForCausalLM.from_pretrained('handed').state_dict()
    for k, v in done.model.state_dict().items():
        assert torch.equal(v.to(again[k].dtype), again[k]), k
    card = (here/'handed'/'README.md').read_text()
    for part in ('### Response:', 'library_name: transformers', '## Licence', '| lr | 0.005 |', '## Evaluation'):
        assert part in card
    for argv, why in ((['--to', 'handed'], 'exists already'), (['--to', 'x', '--push', 'nowhere'], 'hub:OWNER/NAME')):
        code, out, err = command('export', done.out, *argv)
        assert code == 2 and why in err
    assert sorted(os.listdir()) == ['handed']


def test_chat_keeps_bos(tiny, tokenizer, tmp_path, monkeypatch, capsys):
    "A tokenizer that begins texts with BOS: so does the prompt of each turn, also after old turns were forgotten."
    import copy
    from tokenizers.processors import TemplateProcessing
    from alpaca_ft import use
    from alpaca_ft.model import load_model
    tok = copy.deepcopy(tokenizer)
    tok.backend_tokenizer.post_processor = TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 0)])
    model, asked = load_model(str(tiny)), []
    real = model.generate
    def generate(x, **kw):
        asked.append(x[0].tolist())
        return real(x, **kw)
    model.generate = generate
    lines = iter(['Name a tree. ' * 25, 'Name a bird. ' * 25, 'Name a fish. ' * 25, '/quit'])
    monkeypatch.setattr('builtins.input', lambda _: next(lines))
    monkeypatch.setattr(use, 'load_both', lambda *_, **kw: (model, tok, {}))
    use.chat('any', 8)
    assert 'forgotten' in capsys.readouterr().out and len(asked) == 3
    assert [(a[0], a.count(0)) for a in asked] == [(0, 1)]*3


def shown_on_a_terminal(argv, **env):
    "What the command prints on a real terminal."
    fd, terminal = pty.openpty()
    started = several.Command(*argv, env=dict(TERM='xterm', NO_COLOR=None) | env, terminal=os.ttyname(terminal))
    os.close(terminal)
    seen = b''
    while select.select([fd], [], [], 120)[0]:
        try:
            part = os.read(fd, 65536)
        except OSError:
            break  # Linux says so where the other end was closed
        if not part:
            break
        seen += part
    os.close(fd)
    assert started.wait() == 0, seen
    return seen.decode()


def test_colour(tiny, rows):
    "Green for what is learnt on a terminal; brackets in a pipe, with NO_COLOR and on a dumb terminal."
    argv = [
        'check',
        '--model',
        tiny,
        '--data',
        rows,
        '--n-freeze',
        2,
        '--seq-len',
        256,
        '--loss-on',
        'response',
        '--show',
        1,
    ]
    seen = shown_on_a_terminal(argv)
    assert '--- document 1 of ' in seen and '\x1b[32m' in seen and '\x1b[2mBelow is' in seen and '⟦' not in seen
    for env in (dict(NO_COLOR='1'), dict(TERM='dumb')):
        seen = shown_on_a_terminal(argv, **env)
        assert '⟦' in seen and '\x1b[3' not in seen and '\x1b[2m' not in seen
    piped = several.command(*argv, env=dict(TERM='xterm'))
    assert piped.returncode == 0 and '⟦' in piped.stdout and '\x1b' not in piped.stdout


def test_export_that_fails(done, here, monkeypatch):
    "An error in the middle, or Ctrl-C, leaves no half-written folder."
    from alpaca_ft import use
    for error in (OSError('No space left on device'), KeyboardInterrupt()):
        def fail(*args): raise error
        monkeypatch.setattr(use, 'check_written', fail)
        with pytest.raises(type(error)):
            use.export(done.out, 'handed')
        assert os.listdir() == []


def test_sample_of_chats(done, here, command):
    "A chat comes back as a list of turns, without the place of the answer; a prompt without one."
    turns = [
        dict(role='user', content='Hi.'),
        dict(role='assistant', content='Hello.'),
        dict(role='user', content='Name a tree.'),
    ]
    rows = [
        dict(messages=turns),
        dict(messages=turns + [dict(role='assistant', content='Oak.')]),
        dict(prompt='Name a bird.'),
        dict(messages=turns[:1]),
    ]
    (here/'ask.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    code, out, err = command('sample', done.out, '--file', 'ask.jsonl', '--max-new-tokens', 4)
    assert code == 0, err
    got = [json.loads(l) for l in out.splitlines()]
    assert [r.get('messages') for r in got] == [turns, turns + [dict(role='assistant', content='Oak.')], None, None]
    assert [r.get('output') for r in got] == [None, 'Oak.', None, None] and [r['instruction'] for r in got] == [
        'Name a tree.',
        'Name a tree.',
        'Name a bird.',
        'Hi.',
    ]


def test_system_message_in_the_alpaca_template(done, here, command):
    "As the input where a server asks; refused in training, where it would be a guess."
    chats = [
        dict(
            messages=[
                dict(role='system', content='Be brief.'),
                dict(role='user', content='Hi.'),
                dict(role='assistant', content='Hello.'),
            ]
        )
    ] * 12
    (here/'chats.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in chats))
    code, out, err = command(
        'check', '--model', done.out / 'model', '--data', 'chats.jsonl', '--seq-len', 256, '--n-freeze', 2
    )
    assert code == 2 and len(err.splitlines()) == 1 and 'user and assistant messages only' in err, err


ANIMALS = 'cat dog owl fox hen cow pig ant bee elk yak emu cod eel gnu jay koi bat ape ram'.split()


def questions(path):
    "200 made rows with columns of other names."
    pairs = [(n, a) for n in range(2, 12) for a in ANIMALS]
    rows = [dict(question=f'How many legs have {n} of the {a}?', answer=f'{n} {a} have {n} times its legs.', source=i)
            for i, (n, a) in enumerate(pairs)]
    assert len(rows) == 200
    path.write_text(''.join(json.dumps(r) + '\n' for r in rows))


def test_question_and_answer(tiny, here, command):
    "A file with other names, from the first refusal to a talk with the model: 200 rows, each command as it is typed."
    questions(here/'qa.jsonl')
    args = ['--model', tiny, '--data', 'qa.jsonl', '--n-freeze', 2, '--seq-len', 256, '--loss-on', 'response',
            '--dtype', 'fp32']
    code, out, err = command('check', *args)
    why = 'row 1: instruction is missing; give --columns instruction=question,output=answer (200 bad of 200'
    assert code == 2 and why in err, err
    args += ['--columns', 'instruction=question,output=answer']
    code, out, err = command('check', *args, '--show', 1)
    assert code == 0 and 'train     180 rows' in out and 'eval      20 rows' in out, out + err
    learnt = re.findall('⟦(.*?)⟧', out)
    assert len(learnt) == out.count('--- document') > 1
    assert all(re.fullmatch(r'\d+ \w+ have \d+ times its legs\.</s>', text) for text in learnt), learnt
    assert '### Instruction:\nHow many legs have ' in out and not (here/'run').exists()
    code, out, err = command('train', *args, '--out', 'run', '--max-steps', 30, '--lr', 1e-2, '--n-samples', 2,
                             '--max-new-tokens', 12)
    assert code == 0 and 'asked:  How many legs have ' in out, err
    metrics = [json.loads(line) for line in open('run/metrics.jsonl')]
    held_out = [m['eval_response_loss'] for m in metrics if 'eval_response_loss' in m]
    assert held_out[-1] < held_out[0]/2, held_out
    code, out, err = command('sample', 'run', '--file', 'qa.jsonl', '--max-new-tokens', 4)  # names as in the run
    got = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [r['source'] for r in got] == list(range(200)), err
    assert all(r['generation'] and r['instruction'] == r['question'] and r['output'] == r['answer'] for r in got)
    r = several.command('chat', 'run', '--max-new-tokens', 6, given='How many legs have 2 of the cat?\nAnd 3?\n/quit\n')
    said = r.stdout.split('> ')
    assert r.returncode == 0 and len(said) == 4 and all(text.strip() for text in said[1:3]), r.stdout + r.stderr


def test_room_for_the_answer(tokenizer, here, command):
    "A model that has learned its positions is asked so that its answer has positions too; prompts here are too long."
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=600, n_embd=32, n_layer=4, n_head=4, n_positions=160, bos_token_id=0,
                               eos_token_id=1)).save_pretrained('gpt2')
    tokenizer.save_pretrained('gpt2')
    long = [dict(instruction='Shorten.', input=f'{i} ' + 'The tide came in. '*40, output='The tide.') for i in range(2)]
    rows = [dict(instruction=f'Name {i}.', input='', output=f'It is {i}.') for i in range(24)]
    for name, some in (('rows.jsonl', rows[4:]), ('long.jsonl', long + rows[:4])):
        with open(name, 'w') as f:
            f.writelines(json.dumps(row) + '\n' for row in some)
    words = ['train', '--model', './gpt2', '--data', 'rows.jsonl', '--eval-data', 'long.jsonl', '--seq-len', 160,
             '--n-freeze', 2, '--max-steps', 2, '--dtype', 'fp32', '--n-samples', 2]
    code, out, err = command(*words, '--max-new-tokens', 40, '--out', 'run')
    assert code == 0 and 'left out' not in err, err
    prompts = [json.loads(line)['prompt'] for line in open('run/samples.jsonl')]
    assert prompts and all(100 < len(tokenizer(p)['input_ids']) <= 120 for p in prompts)
    code, out, err = command('sample', 'run', '--file', 'long.jsonl', '--max-new-tokens', 40)
    assert code == 0 and len(out.splitlines()) == 6, err
    code, out, err = command('evaluate', 'run', '--against', 'none', '--n-samples', 2, '--max-new-tokens', 40)
    assert code == 0 and 'tokens, median' in out, err
    code, out, err = command(*words, '--max-new-tokens', 150, '--out', 'none')
    assert code == 2 and err.splitlines()[-1].startswith('alpaca_ft: 10 tokens have no room for the prompt'), err
    assert len(err.splitlines()) == 1 and not os.path.exists('none'), err


@pytest.mark.parametrize('wrapped', [False, True], ids=['plain', 'in a PeftModel'])
def test_settings_of_the_model_are_not_used(tiny, wrapped):
    "Nothing but its end tokens is taken from a model's own generation config, which is as it was afterwards."
    from transformers import GenerationConfig
    from alpaca_ft import generate_all, load_model, load_tokenizer
    from alpaca_ft.use import generation_config, stream_answer
    model, tokenizer = load_model(str(tiny), dtype=torch.float32), load_tokenizer(str(tiny))
    inner = model
    if wrapped:
        from peft import LoraConfig, get_peft_model
        model = get_peft_model(model, LoraConfig(target_modules=['q_proj'], task_type='CAUSAL_LM'))
    prompts = ['Name a fruit.', 'What is one plus one?']

    def answers():
        settings = generation_config(model, tokenizer, 12)
        assert 5 in settings.eos_token_id
        return generate_all(prompts, model, tokenizer, 12), stream_answer([3, 4, 5], model, tokenizer, settings)
    inner.generation_config.eos_token_id = [1, 5]
    plain = answers()
    said = tokenizer(plain[0][0]['text'])['input_ids']
    for more in (dict(repetition_penalty=9.), dict(num_beams=3), dict(suppress_tokens=said[:1])):
        inner.generation_config = own = GenerationConfig(eos_token_id=[1, 5], **more)
        before = own.to_dict()
        assert answers() == plain, more
        assert inner.generation_config is model.generation_config is own and own.to_dict() == before


# what a user may have at hand

def test_tokenizer_that_does_not_fit(tiny, tokenizer, rows, here, command):
    "Refused in one line by each command that would ask the model."
    from copy import deepcopy
    shutil.copytree(tiny, 'larger')
    larger = deepcopy(tokenizer)
    larger.add_tokens([f'<<word{i}>>' for i in range(200)])
    larger.save_pretrained('larger')
    shutil.copytree(tiny, 'endless')
    endless = deepcopy(tokenizer)
    endless.eos_token = None
    endless.save_pretrained('endless')
    for model, why in (('larger', 'embeddings; give the tokenizer that belongs to it'), ('endless', 'no EOS token')):
        for words in (('sample', model, '--instruction', 'hi'), ('chat', model), ('evaluate', model, '--data', rows)):
            code, _, err = command(*words)
            assert code == 2 and why in err.splitlines()[-1], (words, err)


def test_part_of_others_stays(done, here, command):
    "A folder beside the place of an export is not ours, whatever its name."
    Path('mine.part').mkdir()
    Path('mine.part/notes.txt').write_text('precious')
    code, _, err = command('export', done.out, '--to', 'mine')
    assert code == 0, err
    assert sorted(p.name for p in here.iterdir()) == ['mine', 'mine.part']
    assert Path('mine.part/notes.txt').read_text() == 'precious'


def test_home_is_expanded(done, here, rows, command, monkeypatch):
    "A shell leaves the ~ of --to=~/mine as it is."
    monkeypatch.setenv('HOME', str(here/'home'))
    assert command('export', done.out, '--to=~/mine')[0] == 0
    assert command('split', rows, '--out=~/rows')[0] == 0
    assert command('sample', done.out, '--file=~/rows/alpaca_gpt4_eval.jsonl', '--to=~/said.jsonl',
                   '--max-new-tokens', 2)[0] == 0
    assert command('report', done.out, '--to=~/page.html')[0] == 0
    assert sorted(p.name for p in (here/'home').iterdir()) == ['mine', 'page.html', 'rows', 'said.jsonl']
    assert [p.name for p in here.iterdir()] == ['home']


def test_options_that_do_not_go_together(done, rows, here, command):
    code, _, err = command('sample', done.out, '--file', rows, '--input', 'x')
    assert code == 2 and '--input belongs to --instruction' in err
    code, _, err = command('report', done.out, '--to', '.')
    assert code == 2 and 'a folder; give the name of a file' in err


def test_bytes_that_are_no_text(done):
    "A message that is not UTF-8 ends no chat."
    r = subprocess.run([sys.executable, '-m', 'alpaca_ft', 'chat', done.out, '--max-new-tokens', '3'],
                       input=b'hello\ncaf\xe9\nagain\n', capture_output=True, timeout=100,
                       env=os.environ | {'LC_ALL': 'C'})
    assert r.returncode == 0 and b'Traceback' not in r.stderr, r.stderr


def test_names_on_a_card(here):
    from alpaca_ft.use import public_name
    for name, shown in (('priv/customer/secret.jsonl', 'secret.jsonl'), ('priv/secret.jsonl', 'secret.jsonl'),
                        ('../there', 'there'), ('org/name', 'org/name'), ('gpt2', 'gpt2')):
        assert public_name(name) == shown
