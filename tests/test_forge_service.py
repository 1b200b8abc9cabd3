"""``esper forge``: real processes at one library, killed, told to stop, and sharing the work."""

import argparse
import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_line import refusal
from forge_samples import SITES
from urza_backends import Place
from urza_samples import submit
from urza_servers import served

import esper.forge_worker as forge_worker
from esper import blueprints
from esper.cli import main
from esper.contracts import BlueprintStatus, Design, KernelStatus, Pipeline
from esper.errors import BusError
from esper.oona import MemoryBus
from esper.tezzeret import Tezzeret
from esper.tezzeret.trace import trace
from esper.urza import Library, Urza
from esper.urza.access import Tokens
from esper.urza.server import create_app

pytestmark = pytest.mark.timeout(300)

UNVALIDATED, COMPILING, COMPILED, INVALID = BlueprintStatus
DEADLINE_S = 200.0
_FORGE = [sys.executable, "-m", "esper", "forge", "--no-recompiling"]


@contextmanager
def forge(environment: dict[str, str], *options: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*_FORGE, *options],
        env=os.environ | environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def store(urza: Library, design: Design) -> str:
    blueprint, graph, _ = trace(design, SITES["linear"], "float32")
    return urza.submit_blueprint(blueprint, graph)


def moody(folder: Path) -> Design:
    folder.mkdir()
    os.mkfifo(folder / "fifo")
    return Design(name=folder.name, builder="forge_samples:Moody", hparams={"folder": str(folder)})


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it has not come true"
        time.sleep(0.05)  # what it waits for happens in other processes


def pid_of(owner: str | None) -> int:
    """Return the process that a lease's owner names, as in "tezzeret@host:123-a1b2c3"."""
    assert owner is not None
    return int(owner.rpartition(":")[2].partition("-")[0])


def test_processes_work_off_what_waits_and_do_nothing_twice(
    urza: Library, place: Place, tmp_path: Path
) -> None:
    good = [store(urza, blueprints.get(name)) for name in ("low_rank", "norm")]
    bad = store(urza, moody(tmp_path / "bad"))
    (tmp_path / "bad" / "crash").touch()
    with forge(place.environment(), "--once", "--tezzeret", "2", "--urabrask", "2") as process:
        _, log = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, log
    assert [urza.blueprint_status(i)[0] for i in good] == [COMPILED] * 2
    assert urza.blueprint_status(bad)[0] is INVALID
    assert "exit status 3" in urza.blueprint_status(bad)[1]
    status = urza.forge_status()
    assert (status.compiled, status.failed) == ({Pipeline.FAST: 2}, 1)
    assert 0 < status.utilisation < 2
    assert [kernel.status for kernel in urza.kernels()] == [KernelStatus.VALIDATED] * 2
    events = [entry.event for entry in urza.audit.entries()]
    assert events.count("kernel.reported") == 2
    urza.verify()


@pytest.mark.parametrize("place", ["http"], indirect=True)  # leases elsewhere: test_urza_leases.py
def test_killed_taken_over_and_told_to_stop(urza: Library, place: Place, tmp_path: Path) -> None:
    first, second = moody(tmp_path / "first"), moody(tmp_path / "second")
    lost, unfinished = store(urza, first), store(urza, second)
    for folder in ("first", "second"):
        (tmp_path / folder / "hang").touch()
    options = ("--urabrask", "0", "--poll-s", "0.1", "--drain-s", "0.1")
    with forge(place.environment(), *options) as process:
        assert (tmp_path / "first" / "fifo").read_text() == "reached"
        os.kill(pid_of(urza.blueprint_record(lost).lease_owner), signal.SIGKILL)
        (tmp_path / "first" / "hang").unlink()
        # It is started again; what was lost is leased for another minute, so it takes the second.
        assert (tmp_path / "second" / "fifo").read_text() == "reached"
        assert urza.blueprint_status(lost)[0] is COMPILING
        place.execute("UPDATE blueprints SET lease_expires_at = 1 WHERE blueprint_id = :i", i=lost)
        with forge(place.environment(), *options, "--once") as heir:
            _, log = heir.communicate(timeout=DEADLINE_S)
        assert heir.returncode == 0, log
        assert urza.blueprint_status(lost) == (COMPILED, "")
        assert urza.blueprint_status(unfinished)[0] is COMPILING
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, log
    assert "tezzeret 0 ended with -9; again in 1 s" in log
    assert "what was not finished was given back" in log
    assert "Traceback" not in log
    assert urza.blueprint_status(unfinished) == (UNVALIDATED, "cancelled")
    assert urza.forge_status().compiled == {Pipeline.FAST: 1}
    urza.verify()


def test_workers_stop_when_the_service_is_killed(tmp_path: Path) -> None:
    with Urza(tmp_path / "library") as urza:
        blueprint_id = store(urza, moody(tmp_path / "design"))
        (tmp_path / "design" / "hang").touch()
        options = ("--library", str(tmp_path / "library"), "--urabrask", "0", "--drain-s", "0.1")
        process = subprocess.Popen(
            [*_FORGE, *options],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stderr=subprocess.DEVNULL,
        )
        with process:
            assert (tmp_path / "design" / "fifo").read_text() == "reached"
            process.kill()
        wait_for(lambda: urza.blueprint_status(blueprint_id)[0] is UNVALIDATED)


def worker_options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    forge_worker.add_arguments(parser)
    return argparse.Namespace(role="tezzeret", **vars(parser.parse_args(words)))


async def test_a_worker_whose_bus_ends_by_itself_has_failed(tmp_path: Path) -> None:
    with Urza(tmp_path / "library") as urza:
        bus = MemoryBus()
        bus.close()
        with pytest.raises(BusError, match=r"^the bus has ended though nobody had told it to"):
            await forge_worker.work(urza, bus, worker_options())


async def test_a_worker_that_a_signal_stops_has_not_and_names_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "esper")
    with Urza(tmp_path / "library") as urza:
        bus = MemoryBus()
        asyncio.get_running_loop().call_soon(signal.raise_signal, signal.SIGTERM)
        await forge_worker.work(urza, bus, worker_options())
    assert "told to stop by SIGTERM" in caplog.messages


async def test_a_worker_that_is_cancelled_by_nobody_it_knows_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lose_heart(_: Tezzeret) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(Tezzeret, "run", lose_heart)
    with Urza(tmp_path / "library") as urza, pytest.raises(asyncio.CancelledError):
        await forge_worker.work(urza, MemoryBus(), worker_options())


def test_the_status_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Urza(tmp_path / "library") as library, served(create_app(library, Tokens([]))) as url:
        submit(library)
        main(["forge", "--status", "--library", str(tmp_path / "library")])
        main(["forge", "--status", "--library", url])
        monkeypatch.setenv("URZA_API_URL", url)
        main(["forge", "--status"])
    assert capsys.readouterr().out.count('"waiting_blueprints": 1') == 3


@pytest.mark.parametrize(
    ("words", "because"),
    [
        ([], "a library without a folder needs URZA_URL"),
        (["--status"], "a library without a folder needs URZA_URL"),
        (["--status", "--library", "none"], "no library at "),
        (["--library", "{url}"], "signing a verdict needs URZA_KEY"),
        (["--library", "{url}", "--urabrask", "0", "--bus", "http://x"], "the bus is at redis://"),
        (["--library", "{url}", "--urabrask", "0", "--bus", "unix:///x"], "cannot reach Redis at"),
    ],
)
def test_what_the_workers_lack_is_said_once_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], because: str
) -> None:
    with Urza(tmp_path / "library") as library, served(create_app(library, Tokens([]))) as url:
        said = refusal(["forge", *(word.format(url=url) for word in words)], capsys)
    assert said.startswith(f"esper forge: {because}")
