"""Run one rank that `launch` started: python -m llmkit.parallel.rank DESCRIPTOR."""

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection

from llmkit.parallel.transport import pack

PR_SET_PDEATHSIG = 1  # of prctl.h: the signal that a process gets when its parent ends


def main() -> None:
    """Receive a function and its arguments from the launcher, call it, and send back its result or its error."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback: the launcher says what happened
    with contextlib.suppress(OSError, AttributeError):  # Linux alone: ends a rank that is stopped, too
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    function, args, options = connection.recv()
    threading.Thread(target=end_with_launcher, args=(connection,), daemon=True).start()
    try:
        report = json.dumps({"result": function(*args, **options)})
    except Exception as error:
        report = json.dumps({"error": pack(error)})
    connection.send_bytes(report.encode())
    end_process(0)


def end_process(code: int) -> None:
    """End this rank at once.

    A regular exit waits for the connections to other ranks, which may be dead. It aborts when the interpreter ends
    before the threads of gloo do.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe, a closed stream
            stream.flush()
    os._exit(code)


def end_with_launcher(connection: Connection) -> None:
    """Kill this process when the launcher ends, even by SIGKILL: its end of the connection closes then."""
    try:
        connection.recv_bytes()  # nothing is ever sent
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    with contextlib.suppress(EOFError, ConnectionError):  # the launcher has ended
        main()
