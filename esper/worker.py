"""Warm child processes for heavy work, driven through pipes so that they can be killed.

The parent holds a :class:`WorkerProcess` and awaits calls; the child is ``python -m <module>``,
which ends in :func:`serve`. A message is one frame: magic, two lengths, a JSON header, and raw
blobs one after another. Nothing is pickled. Compiling in a thread of the trainer instead would
stall its steps by 200-330 ms.
"""

import asyncio
import ctypes
import errno
import json
import os
import resource
import signal
import struct
import sys
import traceback
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import esper.errors as errors
from esper.errors import EsperError, MachineError, WorkerError

Header = dict[str, Any]
Blobs = dict[str, bytes]
Handler = Callable[[Header, Blobs], tuple[Header, Blobs]]

MAX_HEADER_BYTES = 16 * 2**20
MAX_BLOB_BYTES = 2**30  # of all blobs of one frame together

_PREFIX = struct.Struct("<8sIQ")  # magic, bytes of JSON, bytes of blobs
_MAGIC = b"ESPERWK1"
_STDERR_TAIL_BYTES = 8192
_LAST_WORDS_S = 1.0  # how long a dead child's exit status and stderr are waited for
_PR_SET_PDEATHSIG = 1
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
_STAT_TIMES = slice(11, 15)  # of /proc/PID/stat behind the name: own and children's CPU time


class WorkerProcess:
    """A child process that answers one call at a time and is replaced when it fails.

    Started by the first call. Belongs to one event loop.
    """

    def __init__(self, module: str, *, niceness: int, memory_limit_bytes: int) -> None:
        self.module = module
        # -P: the trainer's working directory must not shadow modules of the child.
        self._command = [sys.executable, "-P", "-m", module]
        self._command += [str(niceness), str(memory_limit_bytes)]
        self._lock = asyncio.Lock()
        self._child: _Child | None = None
        self._spent_s = 0.0  # by former children

    def cpu_time_s(self) -> float:
        """Return the CPU time of all its children so far, with what they waited for.

        Nought where there is no /proc.
        """
        return self._spent_s + (self._child.cpu_time_s() if self._child is not None else 0.0)

    async def call(
        self, method: str, header: Header, blobs: Mapping[str, bytes], *, timeout_s: float
    ) -> tuple[Header, Blobs]:
        """Run ``method`` in the child and return its answer.

        An :class:`EsperError` of the handler is raised here as the same class, what the machine
        lacks (room on a disk, processes) as :class:`MachineError`, any other exception as
        :class:`WorkerError` with its traceback. A crash, an answer that is not a frame,
        ``timeout_s`` (which includes starting the child) and cancellation kill the child with all
        that it started, and the next call starts a fresh one.
        """
        frame = _frame({"method": method, "header": header}, blobs)
        async with self._lock:
            try:
                async with asyncio.timeout(timeout_s):
                    child = self._child = self._child or await self._start()
                    reply, reply_blobs = await child.exchange(frame)
            except TimeoutError:
                await self._fail(method, f"no answer within {timeout_s} s")
            except _BadFrameError as error:
                await self._fail(method, f"the answer is garbage: {error}")
            except (EOFError, OSError) as error:
                await self._fail(method, f"the process ended: {error}", grace_s=_LAST_WORDS_S)
            except BaseException:
                await self.close()
                raise
        if "error" in reply:
            _raise_again(f"{self.module}: {method!r}", reply["error"])
        return reply["header"], reply_blobs

    async def close(self) -> None:
        """Kill the child and all that it started, if it runs. A later call starts a fresh one."""
        child = self._dismiss()
        if child is not None:
            await child.kill()

    async def _start(self) -> "_Child":
        try:
            return await _Child.start(self._command)
        except OSError as error:
            raise MachineError(f"{self.module}: it could not be started: {error}") from error

    async def _fail(self, method: str, what: str, grace_s: float = 0.0) -> NoReturn:
        child = self._dismiss()
        last_words = await child.kill(grace_s) if child is not None else "not running"
        raise WorkerError(f"{self.module}: {method!r}: {what}; {last_words}") from None

    def _dismiss(self) -> "_Child | None":
        self._spent_s = self.cpu_time_s()
        child, self._child = self._child, None
        return child


class _Child:
    """The running process, with the end of what it wrote to stderr."""

    def __init__(self, process: Process) -> None:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        self._process = process
        self._stdin, self._stdout, self._stderr = process.stdin, process.stdout, process.stderr
        self._tail = bytearray()
        self._tail_task = asyncio.create_task(self._keep_tail())

    @classmethod
    async def start(cls, command: list[str]) -> "_Child":
        return cls(
            await asyncio.create_subprocess_exec(
                *command,
                stdin=PIPE,
                stdout=PIPE,
                stderr=PIPE,
                env=_child_environment(),
                start_new_session=True,
            )
        )

    async def exchange(self, frame: list[bytes]) -> tuple[Header, Blobs]:
        for part in frame:
            self._stdin.write(part)
        await self._stdin.drain()
        prefix = await self._stdout.readexactly(_PREFIX.size)
        header_bytes, blob_bytes = _lengths(prefix)
        content = await self._stdout.readexactly(header_bytes)
        return _split(content, await self._stdout.readexactly(blob_bytes))

    def cpu_time_s(self) -> float:
        try:
            stat = Path(f"/proc/{self._process.pid}/stat").read_text()
        except OSError:
            return 0.0
        ticks = map(int, stat.rpartition(")")[2].split()[_STAT_TIMES])
        return sum(ticks) / os.sysconf("SC_CLK_TCK")

    async def kill(self, grace_s: float = 0.0) -> str:
        """Kill the process group, and return the exit status and the end of stderr."""
        try:
            await self._ended(grace_s)
        finally:
            # The group outlives its leader: a compiler that the child started may still run.
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._stdin.close()
        try:
            await self._ended(_LAST_WORDS_S)
        finally:
            self._tail_task.cancel()
            # One that is slow to die keeps its pipes open; asyncio has no public way to close ours.
            self._process._transport.close()  # type: ignore[attr-defined]
        await asyncio.sleep(0)  # in which the loop does so: it may be about to end
        tail = self._tail.decode(errors="replace").strip()
        return f"exit status {self._process.returncode}, stderr ends: {tail or '(empty)'}"

    async def _ended(self, timeout_s: float) -> None:
        """Wait for the process and for its stderr, which an escaped grandchild may keep open."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._process.wait()
                await asyncio.shield(self._tail_task)

    async def _keep_tail(self) -> None:
        while chunk := await self._stderr.read(_STDERR_TAIL_BYTES):
            self._tail += chunk
            del self._tail[:-_STDERR_TAIL_BYTES]


def serve(handlers: Mapping[str, Handler]) -> None:
    """Answer calls until the parent closes the pipe or dies; runs in the child's main thread.

    A handler takes the call's header and blobs and returns those of the answer. What it prints
    goes to stderr.
    """
    requests, replies = _claim_pipes()
    _restrain(niceness=int(sys.argv[1]), memory_limit_bytes=int(sys.argv[2]))
    while prefix := requests.read(_PREFIX.size):
        header_bytes, blob_bytes = _lengths(prefix)
        request, blobs = _split(requests.read(header_bytes), requests.read(blob_bytes))
        replies.writelines(_answer(handlers, request, blobs))
        replies.flush()


def _claim_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Take stdin and stdout for the protocol, out of reach of prints and of grandchildren."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return requests, replies


def _restrain(niceness: int, memory_limit_bytes: int) -> None:
    os.nice(niceness)
    # Not RLIMIT_AS: CUDA reserves far more address space than it ever uses.
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or memory_limit_bytes < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (memory_limit_bytes, hard))
    if sys.platform == "linux":
        # A busy handler does not notice that its pipe was closed.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _answer(handlers: Mapping[str, Handler], request: Header, blobs: Blobs) -> list[bytes]:
    try:
        header, blobs = handlers[request["method"]](request["header"], blobs)
        return _frame({"header": header}, blobs)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            error = MachineError(str(error))
        kind = type(error).__name__ if isinstance(error, EsperError) else ""
        message = str(error) if kind else traceback.format_exc()
        return _frame({"error": {"kind": kind, "message": message}}, {})


def _raise_again(context: str, error: dict[str, str]) -> NoReturn:
    kind = getattr(errors, error["kind"], None) if error["kind"] else None
    if isinstance(kind, type) and issubclass(kind, EsperError):
        raise kind(error["message"])
    raise WorkerError(f"{context} raised\n{error['message']}")


def _child_environment() -> dict[str, str]:
    """The trainer's environment, with its import path and with one thread for torch."""
    path = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class _BadFrameError(WorkerError):
    """The bytes that came are not a frame, or one that is too large."""


def _frame(content: Header, blobs: Mapping[str, bytes]) -> list[bytes]:
    sizes = [[name, len(blob)] for name, blob in blobs.items()]
    header = json.dumps(content | {"blobs": sizes}).encode()
    prefix = _PREFIX.pack(_MAGIC, len(header), sum(map(len, blobs.values())))
    _lengths(prefix)
    return [prefix, header, *blobs.values()]


def _lengths(prefix: bytes) -> tuple[int, int]:
    """Return the bytes of JSON and of blobs that follow, if they are within the limits."""
    magic, header_bytes, blob_bytes = _PREFIX.unpack(prefix)
    if magic != _MAGIC:
        raise _BadFrameError(f"it starts with {prefix!r}")
    if header_bytes > MAX_HEADER_BYTES or blob_bytes > MAX_BLOB_BYTES:
        raise _BadFrameError(f"{header_bytes} and {blob_bytes} bytes are more than the limits")
    return header_bytes, blob_bytes


def _split(header: bytes, data: bytes) -> tuple[Header, Blobs]:
    try:
        content = json.loads(header)
        sizes = content.pop("blobs")
        blobs, offset = {}, 0
        for name, size in sizes:
            blobs[name] = data[offset : offset + size]
            offset += size
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _BadFrameError(f"its header is not one of ours: {error!r}") from None
    return content, blobs
