"Commands in several processes, without a launcher: forked children of a process that has imported everything."
import os
import signal
import socket
import sys
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


def fork(work, log):
    "Run a function in a child that writes to a file; its process id."
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.alarm(LIMIT)
        import torch
        torch.set_num_threads(1)  # PyTorch's thread pool is new after a fork; threads would race for it
        f = open(log, 'w', buffering=1)
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
        sys.stdout = sys.stderr = f
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
