"Commands in processes of their own: forked children of a process that has imported everything, which saves 8 s each."
import gc
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

LIMIT = 120  # seconds that a command may take


def free_port():
    "A port that nobody listens at."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def member(number, of, port):
    "Make this process one of several."
    os.environ |= dict(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(of), LOCAL_WORLD_SIZE=str(of),
                       MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), TOKENIZERS_PARALLELISM='false')


def fork(work, out, err=None, given=os.devnull):
    "Run a function in a child that reads from a file and writes to another, or to two; its process id."
    import alpaca_ft.evaluate, alpaca_ft.run, alpaca_ft.use, datasets, trl  # noqa: F401 (once, for all children)
    trl.SFTTrainer
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    gc.freeze()  # what was there before need not be looked through, nor copied
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.alarm(LIMIT)
        import torch
        torch.set_num_threads(1)  # PyTorch's thread pool is new after a fork; threads would race for it
        os.dup2(os.open(given, os.O_RDONLY), 0)
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1 if err is None else os.open(err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stdin = open(0, closefd=False)
        sys.stdout = open(1, 'w', buffering=1, closefd=False)
        sys.stderr = sys.stdout if err is None else open(2, 'w', buffering=1, closefd=False)
        code = work() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def begin(n, argv, logs='log', env=None, before=None):
    "Start a command n times, as a launcher does; process ids. `before` is called in each child with its number."
    port = free_port()

    def work(number):
        os.environ |= env or {}
        if n > 1:
            member(number, n, port)
        if before:
            before(number)
        import alpaca_ft.report
        alpaca_ft.report.render = lambda *args, **kw: 'not drawn'  # drawings would take longer than all the rest
        from alpaca_ft.cli import main
        try:
            return main([str(a) for a in argv])
        except SystemExit as e:
            return e.code
    return [fork(lambda number=number: work(number), f'{logs}{number}') for number in range(n)]


def wait(pids):
    "Exit codes, by number; negative where a signal ended a process."
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def run(n, argv, logs='log', **kw):
    "Run a command n times together: (exit codes, what each of them printed)."
    codes = wait(begin(n, argv, logs, **kw))
    return codes, [Path(f'{logs}{number}').read_text() for number in range(n)]


def until(there, seconds=60):
    "Wait for something to be true."
    end = time.time() + seconds
    while not there():
        assert time.time() < end, 'it did not happen'
        time.sleep(0.02)


class Command:
    """The command in a process of its own; of subprocess.Popen it has what the tests use.

    `env` is added to the environment (None takes a variable away), but what libraries read when they are imported was
    read before. `given` is what can be read from stdin, `before` is called in the child, `terminal` is the path of one.
    """
    def __init__(self, *argv, env=None, cwd=None, given='', before=None, terminal=None):
        self.folder = tempfile.TemporaryDirectory()
        self.files = {name: os.path.join(self.folder.name, name) for name in ('in', 'out', 'err')}
        Path(self.files['in']).write_text(given)
        self.returncode = None

        def work():
            for name, value in (env or {}).items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            if cwd:
                os.chdir(cwd)
            if before:
                before()
            from alpaca_ft.cli import main
            try:
                return main([str(a) for a in argv])
            except SystemExit as e:
                return e.code
        if terminal:
            self.pid = fork(work, terminal, terminal, terminal)
        else:
            self.pid = fork(work, self.files['out'], self.files['err'], self.files['in'])

    def poll(self, flags=os.WNOHANG):
        "The exit code, negative where a signal ended it; None while it is at work."
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, flags)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self):
        "The exit code, once it has ended."
        return self.poll(0)

    def send_signal(self, number):
        os.kill(self.pid, number)

    @property
    def stdout(self):
        "What it has printed by now."
        return Path(self.files['out']).read_text()

    @property
    def stderr(self):
        "What it has said by now."
        return Path(self.files['err']).read_text()


def command(*argv, **kw):
    "A whole command: `returncode`, `stdout` and `stderr` are those of subprocess.run."
    done = Command(*argv, **kw)
    done.wait()
    return done


def absent(name):
    "A library as it is where it was not installed; to be called in a child."
    import importlib.util
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda wanted, *args: None if wanted == name else find(wanted, *args)
    sys.modules[name] = None


def file_limit(size):
    "No file may grow beyond so many bytes, as on a full disk; to be called in a child."
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
