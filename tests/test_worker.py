"""Worker processes that crash, hang and lie, and the parent that outlives them."""

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from esper import worker
from esper.errors import BlueprintError, WorkerError
from esper.worker import WorkerProcess

TIMEOUT_S = 60.0


def make_worker(memory_limit_bytes: int = 2**30) -> WorkerProcess:
    return WorkerProcess("worker_child", niceness=3, memory_limit_bytes=memory_limit_bytes)


@pytest.fixture
async def child() -> AsyncIterator[WorkerProcess]:
    process = make_worker()
    yield process
    await process.close()


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


async def pid_of(child: WorkerProcess) -> int:
    header, _ = await child.call("echo", {}, {}, timeout_s=TIMEOUT_S)
    return int(header["pid"])


def wait_until_dead(pid: int) -> None:
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ready, _, _ = select.select([handle], [], [], TIMEOUT_S)
    os.close(handle)
    assert ready, f"process {pid} lives"


async def test_answers_from_one_warm_process(child: WorkerProcess) -> None:
    blobs = {"a": b"\0\xff" * 3, "empty": b""}
    header, returned = await child.call("echo", {"n": [1, None]}, blobs, timeout_s=TIMEOUT_S)
    assert header["n"] == [1, None]
    assert header["threads"] == "1"
    assert returned == blobs
    assert await pid_of(child) == header["pid"] != os.getpid()


async def test_large_blobs(child: WorkerProcess) -> None:
    blobs = {"a": os.urandom(2**20) * 24, "b": b"x"}
    _, returned = await child.call("echo", {}, blobs, timeout_s=TIMEOUT_S)
    assert returned == blobs


async def test_prints_and_stdin_do_not_touch_the_protocol(child: WorkerProcess) -> None:
    header, _ = await child.call("niceness", {}, {}, timeout_s=TIMEOUT_S)
    assert header == {"niceness": os.nice(0) + 3, "stdin": ""}


async def test_errors_come_back_and_the_process_stays(child: WorkerProcess) -> None:
    pid = await pid_of(child)
    with pytest.raises(BlueprintError, match=r"^not like this$"):
        await child.call("refuse", {"message": "not like this"}, {}, timeout_s=TIMEOUT_S)
    with pytest.raises(WorkerError, match=r"(?s)'fail' raised.*ZeroDivisionError: by nought"):
        await child.call("fail", {"message": "by nought"}, {}, timeout_s=TIMEOUT_S)
    with pytest.raises(WorkerError, match=r"(?s)'nothing' raised.*KeyError"):
        await child.call("nothing", {}, {}, timeout_s=TIMEOUT_S)
    assert await pid_of(child) == pid


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("leave", r"(?s)the process ended.*exit status 7, stderr ends: .*last words"),
        ("segfault", r"the process ended.*exit status -11"),
    ],
)
async def test_a_crash_is_told_and_the_process_replaced(
    child: WorkerProcess, method: str, message: str
) -> None:
    pid = await pid_of(child)
    with pytest.raises(WorkerError, match=message):
        await child.call(method, {}, {}, timeout_s=TIMEOUT_S)
    assert await pid_of(child) != pid


@pytest.mark.parametrize(
    "text", ["this is not a frame, only text", "ESPERWK1" + "\x7f" * 40], ids=["text", "huge"]
)
async def test_garbage_is_refused_and_the_process_replaced(child: WorkerProcess, text: str) -> None:
    pid = await pid_of(child)
    with pytest.raises(WorkerError, match="the answer is garbage"):
        await child.call("garbage", {"text": text}, {}, timeout_s=TIMEOUT_S)
    wait_until_dead(pid)
    assert await pid_of(child) != pid


async def test_a_hang_ends_at_the_timeout(child: WorkerProcess, fifo: Path) -> None:
    pid = await pid_of(child)
    unread = {"fifo": str(fifo)}  # nobody reads it, so the handler hangs in opening it
    with pytest.raises(WorkerError, match=r"'hang': no answer within 0\.2 s; exit status -9"):
        await child.call("hang", unread, {}, timeout_s=0.2)
    wait_until_dead(pid)
    assert await pid_of(child) != pid


async def test_cancellation_kills_the_whole_group(child: WorkerProcess, fifo: Path) -> None:
    call = asyncio.create_task(child.call("hang", {"fifo": str(fifo)}, {}, timeout_s=TIMEOUT_S))
    pids = await asyncio.to_thread(fifo.read_text)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    for pid in map(int, pids.split()):
        wait_until_dead(pid)
    await pid_of(child)


async def test_cancellation_before_the_process_has_started(child: WorkerProcess) -> None:
    call = asyncio.create_task(child.call("echo", {}, {}, timeout_s=TIMEOUT_S))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await pid_of(child)


async def test_close_in_the_middle_of_a_call(child: WorkerProcess, fifo: Path) -> None:
    call = asyncio.create_task(child.call("hang", {"fifo": str(fifo)}, {}, timeout_s=TIMEOUT_S))
    pids = await asyncio.to_thread(fifo.read_text)
    await child.close()
    with pytest.raises(WorkerError, match="'hang': the process ended"):
        await call
    for pid in map(int, pids.split()):
        wait_until_dead(pid)


async def test_calls_take_turns(child: WorkerProcess) -> None:
    async with asyncio.TaskGroup() as tasks:
        calls = [
            tasks.create_task(child.call("echo", {"i": i}, {"b": bytes([i])}, timeout_s=TIMEOUT_S))
            for i in range(20)
        ]
    answers = [call.result() for call in calls]
    assert [(header["i"], blobs) for header, blobs in answers] == [
        (i, {"b": bytes([i])}) for i in range(20)
    ]
    assert len({header["pid"] for header, _ in answers}) == 1


async def test_memory_limit() -> None:
    child = make_worker(memory_limit_bytes=2**28)
    with pytest.raises(WorkerError, match="MemoryError"):
        await child.call("allocate", {"bytes": 2**29}, {}, timeout_s=TIMEOUT_S)
    await child.close()


async def test_refuses_to_send_more_than_the_limit(
    child: WorkerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "MAX_BLOB_BYTES", 10)
    with pytest.raises(WorkerError, match="more than the limits"):
        await child.call("echo", {}, {"b": b"x" * 11}, timeout_s=TIMEOUT_S)


async def test_a_module_that_does_not_exist() -> None:
    child = WorkerProcess("esper.no_such_module", niceness=0, memory_limit_bytes=2**30)
    with pytest.raises(WorkerError, match="No module named"):
        await child.call("echo", {}, {}, timeout_s=TIMEOUT_S)


_TRAINER = """
import asyncio, sys
from esper.worker import WorkerProcess

async def main():
    child = WorkerProcess("worker_child", niceness=0, memory_limit_bytes=2**30)
    header, _ = await child.call("echo", {}, {}, timeout_s=60)
    print(header["pid"], flush=True)
    if sys.argv[1]:
        await child.call("hang", {"fifo": sys.argv[1]}, {}, timeout_s=60)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("busy", [False, True])
def test_dies_with_the_trainer(busy: bool, fifo: Path) -> None:
    trainer = subprocess.Popen(
        [sys.executable, "-c", _TRAINER, str(fifo) if busy else ""],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with trainer:
        assert trainer.stdout is not None
        pid = int(trainer.stdout.readline())
        grandchild = int(fifo.read_text().split()[1]) if busy else None
        trainer.kill()
    wait_until_dead(pid)
    if grandchild is not None:
        os.kill(grandchild, signal.SIGKILL)
