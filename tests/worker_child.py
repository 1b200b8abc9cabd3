"""A worker that misbehaves on request; the child of ``tests/test_worker.py``."""

import ctypes
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

from esper.errors import BlueprintError
from esper.worker import serve


def echo(header, blobs):
    print("a handler's print")
    return header | {"pid": os.getpid(), "threads": os.environ["OMP_NUM_THREADS"]}, blobs


def refuse(header, blobs):
    raise BlueprintError(header["message"])


def fail(header, blobs):
    raise ZeroDivisionError(header["message"])


def leave(header, blobs):
    print("last words", file=sys.stderr, flush=True)
    os._exit(7)


def segfault(header, blobs):
    ctypes.string_at(0)


def hang(header, blobs):
    """Start a grandchild, tell both pids through a named pipe, and never answer."""
    grandchild = subprocess.Popen(["sleep", "600"])
    Path(header["fifo"]).write_text(f"{os.getpid()} {grandchild.pid}")
    time.sleep(600)


def garbage(header, blobs):
    """Write to the pipe of the protocol, which has one of the first descriptors."""
    pipes = [fd for fd in range(3, 16) if _is_writable_pipe(fd)]
    for fd in pipes:
        os.write(fd, header["text"].encode())
    return {"pipes": len(pipes)}, {}


def _is_writable_pipe(fd):
    try:
        return os.get_blocking(fd) and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY
    except OSError:
        return False


def allocate(header, blobs):
    return {"bytes": len(bytearray(header["bytes"]))}, {}


def niceness(header, blobs):
    return {"niceness": os.nice(0), "stdin": sys.stdin.read()}, {}


HANDLERS = [echo, refuse, fail, leave, segfault, hang, garbage, allocate, niceness]

if __name__ == "__main__":
    serve({handler.__name__: handler for handler in HANDLERS})
