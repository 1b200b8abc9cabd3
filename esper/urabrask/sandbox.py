"""The evaluator's end of the sandbox: starts candidates, asks them, and survives them.

Every candidate is a process of its own, forked from a server that has torch loaded. It is told
the artifact and the inputs, never what is expected of it, and it is believed nothing but bytes:
an answer counts if it is complete, carries the nonce of its question and parses. How a candidate
ends proves nothing.
"""

import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import ValidationError
from torch import Tensor

from esper.config import EvaluatorSettings
from esper.contracts import Contract
from esper.errors import WorkerError
from esper.urabrask import wire
from esper.urabrask.forkserver import MESSAGE_LIMIT_BYTES
from esper.urabrask.questions import Ready, ReadyQuestion

AnswerT = TypeVar("AnswerT", bound=Contract)
T = TypeVar("T")

_CHUNK_BYTES = 2**20
_ERROR_LIMIT_CHARS = 500
_THREAD_GRACE_S = 0.5  # a thread that was joined is gone only a moment later
_CPUCLOCK_SCHED = 2  # see clock_getcpuclockid(3)
_INHERITED = ("PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")


class CandidateError(Exception):
    """A candidate failed; the message says how, in words that can stand in a report."""


class BreakoutError(CandidateError):
    """A candidate tried what the sandbox forbids."""


class Sandbox:
    """Starts candidates, one at a time, from a fork server that is started when first needed.

    ``readable`` are folders that candidates may read besides those of Python and PyTorch.
    """

    def __init__(self, readable: Iterable[Path] = ()) -> None:
        self._readable = tuple(map(str, readable))
        self._server: _ForkServer | None = None

    def launch(self, settings: EvaluatorSettings) -> "Candidate":
        """Fork a candidate that is confined and has not seen its artifact yet.

        ``settings`` are its limits.

        A fork server that an earlier one managed to kill is replaced. Raises
        :class:`WorkerError` if the sandbox itself does not work.
        """
        try:
            return self._launch(settings)
        except OSError:
            self.close()
        try:
            return self._launch(settings)
        except OSError as error:
            raise WorkerError(f"the sandbox's fork server does not start: {error}") from error

    def _launch(self, settings: EvaluatorSettings) -> "Candidate":
        if self._server is None:
            self._server = _ForkServer()
        candidate = Candidate(self._server, settings, self._readable)
        try:
            candidate.ask(ReadyQuestion(), {}, Ready)
        except CandidateError as error:
            candidate.close()
            raise WorkerError(
                f"a candidate without an artifact {error}: {candidate.printed}"
            ) from error
        return candidate

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class Candidate:
    """One kernel in a process of its own, for the length of a ``with`` block."""

    def __init__(
        self, server: "_ForkServer", settings: EvaluatorSettings, readable: tuple[str, ...]
    ) -> None:
        self._server = server
        self._settings = settings
        self._readable = readable
        self._budget_s = settings.timeout_s
        self._key = secrets.token_bytes(32)
        self._printed = b""
        self._channel, channel_there = socket.socketpair()
        self._log, log_there = os.pipe()
        self._channel.setblocking(False)
        os.set_blocking(self._log, False)
        try:
            started = server.fork(self._job(), channel_there.fileno(), log_there)
            self._pid: int = started["pid"]
            self.confinement: str = started["confinement"]  # for the report
        except OSError:
            self.close()
            raise
        finally:
            channel_there.close()
            os.close(log_there)

    @property
    def printed(self) -> str:
        """The end of what it has printed."""
        return self._printed[-_ERROR_LIMIT_CHARS:].decode(errors="replace").strip()

    def threads(self, expected: int = 0) -> int:
        """Return how many threads it has, counted from outside; it must not have ended.

        If there are more than ``expected``, those that are just ending are waited for.
        """
        deadline = time.monotonic() + _THREAD_GRACE_S
        while True:
            found = len(list(Path(f"/proc/{self._pid}/task").iterdir()))
            if found <= expected or not expected or time.monotonic() > deadline:
                return found
            time.sleep(1e-3)

    def cpu_time_s(self) -> float:
        """Return the processor time of all its threads, by the kernel's count."""
        return time.clock_gettime((~self._pid << 3) | _CPUCLOCK_SCHED)

    def ask(
        self, question: Contract, tensors: Mapping[str, Tensor], kind: type[AnswerT]
    ) -> tuple[AnswerT, dict[str, Tensor]]:
        """Return the candidate's answer, or raise :class:`CandidateError`.

        Blocks until it is there, but over all questions no longer than ``timeout_s``.
        """
        nonce = secrets.token_bytes(wire.NONCE_BYTES)
        asked = wire.pack(nonce, question.model_dump(mode="json"), tensors)
        exchange = _Exchange(asked, self._settings)
        started = time.monotonic()
        try:
            self._run(exchange, deadline=started + self._budget_s)
        finally:
            self._budget_s -= time.monotonic() - started
        return _checked(exchange, self._key, nonce, kind)

    def _run(self, exchange: "_Exchange", deadline: float) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._channel, selectors.EVENT_READ | selectors.EVENT_WRITE, exchange)
            selector.register(self._log, selectors.EVENT_READ)
            while not exchange.complete:
                remaining_s = deadline - time.monotonic()
                if remaining_s <= 0:
                    raise CandidateError(f"took more than {self._settings.timeout_s:g} s")
                for key, events in selector.select(remaining_s):
                    if key.fileobj is self._channel:
                        self._pump_channel(exchange, events, selector)
                    elif not self._pump_log():
                        selector.unregister(self._log)

    def _pump_channel(
        self, exchange: "_Exchange", events: int, selector: selectors.BaseSelector
    ) -> None:
        try:
            if events & selectors.EVENT_WRITE and not exchange.send_to(self._channel):
                selector.modify(self._channel, selectors.EVENT_READ)
            if events & selectors.EVENT_READ and not exchange.receive_from(self._channel):
                raise CandidateError(self._how_it_ended())
        except ConnectionError:
            raise CandidateError(self._how_it_ended()) from None

    def _pump_log(self) -> bool:
        """Take what it has printed; return False at the end. Printing without end is a failure."""
        try:
            data = os.read(self._log, _CHUNK_BYTES)
        except BlockingIOError:
            return False
        self._printed += data
        if len(self._printed) > self._settings.log_limit_bytes:
            raise CandidateError(f"printed more than {self._settings.log_limit_bytes} bytes")
        return bool(data)

    def _how_it_ended(self) -> str:
        code = os.waitstatus_to_exitcode(self._server.reap())
        if code == -signal.SIGSYS:
            raise BreakoutError("made a system call that the sandbox forbids")
        while self._pump_log():
            pass
        if code == -signal.SIGXCPU:
            return f"used more than {self._settings.cpu_time_s} s of CPU time"
        if code < 0:
            return f"was killed by signal {-code} ({signal.strsignal(-code)})"
        return f"ended without an answer, exit status {code}"

    def _job(self) -> dict[str, Any]:
        return {
            "do": "fork",
            "key": self._key.hex(),
            "cpu_time_s": self._settings.cpu_time_s,
            "memory_limit_bytes": self._settings.memory_limit_bytes,
            "scratch_limit_bytes": self._settings.scratch_limit_bytes,
            "readable": self._readable,
        }

    def close(self) -> None:
        """Kill it with everything that it started."""
        self._server.reap()
        self._channel.close()
        os.close(self._log)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class _Exchange:
    """The bytes of one question still to be sent, and of its answer as far as they have come."""

    def __init__(self, question: bytes, settings: EvaluatorSettings) -> None:
        self._unsent = memoryview(question)
        self._limit_bytes = settings.answer_limit_bytes
        self._received = bytearray()
        self._prefix: wire.Prefix | None = None

    @property
    def complete(self) -> bool:
        return self._prefix is not None and len(self._received) >= self._prefix.frame_bytes

    def send_to(self, channel: socket.socket) -> bool:
        """Send what fits; return whether anything is left."""
        self._unsent = self._unsent[channel.send(self._unsent[:_CHUNK_BYTES]) :]
        return bool(self._unsent)

    def receive_from(self, channel: socket.socket) -> bool:
        """Take what is there; return False at the end of the stream."""
        data = channel.recv(_CHUNK_BYTES)
        self._received += data
        if self._prefix is None and len(self._received) >= wire.PREFIX_BYTES:
            self._prefix = _readable(wire.unpack_prefix, self._received, self._limit_bytes)
        return bool(data)

    def answer(self, key: bytes, nonce: bytes) -> wire.Frame:
        assert self._prefix is not None
        if len(self._received) > self._prefix.frame_bytes:
            raise CandidateError("sent more than an answer")
        if not wire.is_sealed(self._received, key, nonce):
            raise CandidateError("sent an answer without the seal of its question")
        return _readable(wire.unpack, self._received, self._prefix)


class _ForkServer:
    """Handle of a process of :mod:`esper.urabrask.forkserver`; ``OSError`` once that has died."""

    def __init__(self) -> None:
        # Removed by the server when this process dies, and by this process when the server does.
        self._scratch = tempfile.TemporaryDirectory(
            prefix="esper-sandbox-", ignore_cleanup_errors=True
        )
        self._control, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arguments = [str(there.fileno()), self._scratch.name]
        with there:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "esper.urabrask.forkserver", *arguments],
                pass_fds=[there.fileno()],
                env=_clean_environment(),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._has_candidate = False
        self._last_status = 0

    def fork(self, job: Mapping[str, Any], channel_fd: int, log_fd: int) -> dict[str, Any]:
        socket.send_fds(self._control, [json.dumps(job).encode()], [channel_fd, log_fd])
        started = self._receive()
        self._has_candidate = True
        return started

    def reap(self) -> int:
        """Kill the candidate with all its descendants; return its wait status, also if asked again.

        A server that is gone took its candidate along; that reads like a SIGKILL.
        """
        if self._has_candidate:
            self._has_candidate = False
            try:
                self._control.send(b'{"do": "reap"}')
                self._last_status = self._receive()["status"]
            except OSError:
                self._last_status = signal.SIGKILL
        return self._last_status

    def close(self) -> None:
        self._control.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._scratch.cleanup()

    def _receive(self) -> dict[str, Any]:
        message = self._control.recv(MESSAGE_LIMIT_BYTES)
        if not message:
            raise ConnectionResetError("the fork server of the sandbox is gone")
        answer: dict[str, Any] = json.loads(message)
        return answer


def _clean_environment() -> dict[str, str]:
    """What the fork server needs to import torch and Esper, and no secret of ours."""
    inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    return inherited | {
        "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",  # numpy starts its threads on import
    }


def _readable(unpack: Callable[..., T], *args: Any) -> T:
    try:
        return unpack(*args)
    except wire.WireError as error:
        raise CandidateError(f"sent {error}") from error


def _checked(
    exchange: _Exchange, key: bytes, nonce: bytes, kind: type[AnswerT]
) -> tuple[AnswerT, dict[str, Tensor]]:
    frame = exchange.answer(key, nonce)
    if "error" in frame.header:
        # JSON can carry lone surrogates, which no report may.
        text = str(frame.header["error"]).encode(errors="backslashreplace").decode()
        raise CandidateError(f"raised {text[:_ERROR_LIMIT_CHARS]}")
    try:
        return kind.model_validate(frame.header), frame.tensors
    except ValidationError as error:
        raise CandidateError(f"sent an answer of the wrong form: {error}") from error
