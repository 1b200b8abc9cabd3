"""Forges that share a library: leases kept, lost and taken over, and whose fault a failure is."""

import asyncio
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from forge_doubles import InlineWorker
from forge_samples import SITES
from urza_backends import Place

from esper import blueprints
from esper.config import ForgeSettings
from esper.contracts import BlueprintStatus, BlueprintSubmitted, Design, Pipeline, Topic
from esper.errors import LeaseError, LibraryError, WorkerError
from esper.oona import MemoryBus
from esper.tezzeret import Tezzeret, child, forge
from esper.tezzeret.trace import trace
from esper.urza import Urza
from esper.worker import Blobs, Header

UNVALIDATED, COMPILING, COMPILED, INVALID = BlueprintStatus
LINEAR = SITES["linear"]
LONG_S = 3600.0
DESIGNS = ("residual_mlp", "low_rank", "gated", "norm")


@pytest.fixture(autouse=True)
def _inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forge, "WorkerProcess", InlineWorker)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The disk of the library's blobs is full until the event is set."""
    freed = threading.Event()
    fsync = os.fsync

    def fail_or_sync(descriptor: int) -> None:
        if not freed.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("esper.urza.blobs.os.fsync", fail_or_sync)
        yield freed


def store(urza: Urza, name: str = "residual_mlp") -> str:
    blueprint, graph, _ = trace(blueprints.get(name), LINEAR, "float32")
    return urza.submit_blueprint(blueprint, graph)


def expire(place: Place) -> None:
    place.execute("UPDATE blueprints SET lease_expires_at = 1 WHERE lease_owner IS NOT NULL")


def hold(tezzeret: Tezzeret) -> InlineWorker:
    """Let the forge's child hang until the gate is opened."""
    worker = tezzeret._worker
    assert isinstance(worker, InlineWorker)
    worker.gate.clear()
    return worker


async def test_forges_share_the_work_and_do_nothing_twice(urza: Urza) -> None:
    stored = [store(urza, name) for name in DESIGNS]
    forges = [Tezzeret(urza) for _ in range(3)]
    await asyncio.gather(*(tezzeret.run() for tezzeret in forges))
    assert [urza.blueprint_status(i)[0] for i in stored] == [COMPILED] * 4
    assert urza.forge_status().compiled == {Pipeline.FAST: 4}
    mine = [(await tezzeret.status()).compiled.get(Pipeline.FAST, 0) for tezzeret in forges]
    assert sum(mine) == 4
    urza.verify()


async def test_a_lease_is_renewed_while_the_child_works(
    urza: Urza, monkeypatch: pytest.MonkeyPatch
) -> None:
    blueprint_id = store(urza)
    tezzeret = Tezzeret(urza, settings=ForgeSettings(lease_s=0.1))
    worker = hold(tezzeret)
    renewals = threading.Semaphore(0)
    renew = urza.renew_lease

    def renew_and_count(*terms: object) -> None:
        renew(*terms)
        renewals.release()

    monkeypatch.setattr(urza, "renew_lease", renew_and_count)
    compiling = asyncio.create_task(tezzeret.compile(blueprint_id))
    for _ in range(3):
        await asyncio.to_thread(renewals.acquire)
    worker.gate.set()
    await compiling
    assert urza.blueprint_status(blueprint_id)[0] is COMPILED


async def test_a_library_out_of_reach_is_asked_again(
    urza: Urza, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tezzeret = Tezzeret(urza, settings=ForgeSettings(lease_s=0.1))
    blueprint_id = store(urza)
    worker = hold(tezzeret)
    failed = threading.Semaphore(0)

    def fail(*terms: object) -> None:
        failed.release()
        raise LibraryError("the server is away")

    monkeypatch.setattr(urza, "renew_lease", fail)
    compiling = asyncio.create_task(tezzeret.compile(blueprint_id))
    for _ in range(2):
        await asyncio.to_thread(failed.acquire)
    worker.gate.set()
    await compiling
    assert "a lease was not renewed: the server is away" in caplog.text


async def test_a_lost_lease_stops_the_work_quietly(
    urza: Urza, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    blueprint_id = store(urza)
    bus = MemoryBus()
    slow = Tezzeret(urza, bus, ForgeSettings(lease_s=0.2, poll_interval_s=LONG_S))
    hold(slow)
    running = asyncio.create_task(slow.run())
    while urza.blueprint_record(blueprint_id).lease_owner != slow.owner:
        await asyncio.to_thread(urza.blueprint_record, blueprint_id)
    expire(place)
    while urza.claim_blueprint("heir", LONG_S) is None:  # a renewal may have come in between
        expire(place)
    caplog.set_level("INFO", logger="esper.tezzeret")
    await bus.drained()
    assert f"blueprint {blueprint_id} is leased to heir, not to {slow.owner}" in caplog.text
    assert urza.blueprint_record(blueprint_id).lease_owner == "heir"
    assert urza.kernels() == []
    loud = {r.name for r in caplog.records if r.levelname in ("WARNING", "ERROR")}
    assert loud <= {"esper.urza.gate"}  # a server tells what it refuses
    bus.close()
    await running


async def test_who_was_too_slow_cannot_settle(urza: Urza, place: Place) -> None:
    blueprint_id = store(urza)
    slow = Tezzeret(urza)
    worker = hold(slow)
    compiling = asyncio.create_task(slow.compile(blueprint_id))
    await worker.called.wait()
    expire(place)
    await Tezzeret(urza).run()
    assert urza.blueprint_status(blueprint_id) == (COMPILED, "")
    worker.gate.set()
    with pytest.raises(LeaseError, match="is leased to nobody, not to tezzeret@"):
        await compiling
    assert len(urza.kernels()) == 1
    urza.verify()


async def test_what_another_forge_has_cannot_be_compiled(urza: Urza) -> None:
    blueprint_id = store(urza)
    urza.claim_blueprint("other", LONG_S)
    with pytest.raises(LibraryError, match=f"^blueprint {blueprint_id} is COMPILING; it cannot"):
        await Tezzeret(urza).compile(blueprint_id)


async def test_a_full_disk_is_no_fault_of_the_blueprint(
    tmp_path: Path, full_disk: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    full_disk.set()
    with Urza(tmp_path) as urza:
        blueprint_id = store(urza)
        tezzeret = Tezzeret(urza)
        full_disk.clear()
        await tezzeret.run()
        log = "[Errno 28] No space left on device"
        assert urza.blueprint_status(blueprint_id) == (UNVALIDATED, log)
        assert f"the forge cannot work: {log}" in caplog.text
        full_disk.set()
        await tezzeret.run()
        assert urza.blueprint_status(blueprint_id) == (COMPILED, "")
        urza.verify()


async def test_a_forge_that_waits_for_room_goes_on_when_there_is(
    tmp_path: Path, full_disk: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk.set()
    with Urza(tmp_path) as urza:
        blueprint_id = store(urza)
        release, released = urza.release_blueprint, asyncio.Event()
        loop = asyncio.get_running_loop()

        def release_and_tell(*terms: str) -> None:
            release(*terms)
            loop.call_soon_threadsafe(released.set)

        monkeypatch.setattr(urza, "release_blueprint", release_and_tell)
        bus = MemoryBus()
        tezzeret = Tezzeret(urza, bus, ForgeSettings(poll_interval_s=0.01))
        ready = bus.subscribe(Topic.KERNEL_READY, "test")
        full_disk.clear()
        running = asyncio.create_task(tezzeret.run())
        await released.wait()
        full_disk.set()
        await anext(ready)
        assert urza.blueprint_status(blueprint_id)[0] is COMPILED
        bus.close()
        await running
        await ready.aclose()


async def test_where_not_even_giving_back_works_the_lease_runs_out(
    urza: Urza, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    blueprint_id = store(urza)

    def fail(*terms: object) -> None:
        raise LibraryError("library: database or disk is full")

    with monkeypatch.context() as patch:
        for name in ("publish_kernel", "release_blueprint"):
            patch.setattr(urza, name, fail)
        await Tezzeret(urza).run()
    assert urza.blueprint_status(blueprint_id)[0] is COMPILING
    expire(place)
    await Tezzeret(urza).run()
    assert urza.blueprint_status(blueprint_id)[0] is COMPILED


async def test_crash_and_hang_of_a_design_make_it_invalid_with_the_log_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # real children
    moods = {}
    with Urza(tmp_path / "library") as urza:
        for mood in ("crash", "hang"):
            folder = tmp_path / mood
            folder.mkdir()
            hparams = {"folder": str(folder)}
            design = Design(name=mood, builder="forge_samples:Moody", hparams=hparams)
            blueprint, graph, _ = trace(design, LINEAR, "float32")
            moods[mood] = urza.submit_blueprint(blueprint, graph)
            (folder / mood).touch()
        os.mkfifo(tmp_path / "hang" / "fifo")
        reader = os.open(tmp_path / "hang" / "fifo", os.O_RDONLY | os.O_NONBLOCK)
        async with Tezzeret(urza, settings=ForgeSettings(timeout_s=15.0)) as tezzeret:
            await tezzeret.run()
        os.close(reader)
        statuses = {mood: urza.blueprint_status(i) for mood, i in moods.items()}
        assert [status for status, _ in statuses.values()] == [INVALID, INVALID]
        assert "exit status 3" in statuses["crash"][1]
        assert "no answer within 15.0 s" in statuses["hang"][1]
        assert urza.forge_status().failed == 2
        urza.verify()


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with nothing to do, on which every pipeline makes what FAST makes."""
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(forge, "check_available", lambda pipeline: None)
    package = child.HANDLERS["package"]
    monkeypatch.setitem(
        child.HANDLERS,
        "package",
        lambda header, blobs: package(header | {"pipeline": Pipeline.FAST}, blobs),
    )


async def made_anew(urza: Urza, settings: ForgeSettings) -> int:
    """Let a forge recompile until it has enough; return how often it did."""
    tezzeret = Tezzeret(urza, settings=settings)
    count = 0
    while await tezzeret._recompile_next():
        count += 1
    return count


@pytest.mark.usefixtures("idle")
async def test_an_idle_forge_makes_anew_what_is_wanted(
    urza: Urza, caplog: pytest.LogCaptureFixture
) -> None:
    blueprint_id = store(urza)
    await Tezzeret(urza).run()
    assert await made_anew(urza, ForgeSettings()) == 0
    urza.set_interest(blueprint_id, "tamiyo", 1.0)
    caplog.set_level("INFO", logger="esper.tezzeret")
    assert await made_anew(urza, ForgeSettings()) == 1
    assert f"{blueprint_id}: AGGRESSIVE again: the controller's interest is 1" in caplog.text
    assert urza.forge_status().compiled == {Pipeline.FAST: 1, Pipeline.AGGRESSIVE: 1}
    assert urza.forge_status().recompilations_today == 1
    urza.verify()


@pytest.mark.usefixtures("idle")
async def test_a_newer_torch_is_a_reason(urza: Urza, monkeypatch: pytest.MonkeyPatch) -> None:
    store(urza)
    await Tezzeret(urza).run()
    monkeypatch.setattr(forge, "torch_release", lambda: "99.0")
    assert await made_anew(urza, ForgeSettings()) == 1


@pytest.mark.usefixtures("idle")
async def test_the_daily_budget_holds(urza: Urza) -> None:
    for name in DESIGNS:
        urza.set_interest(store(urza, name), "tamiyo", 1.0)
    await Tezzeret(urza).run()
    assert await made_anew(urza, ForgeSettings(max_recompilations_per_day=3)) == 3
    assert await made_anew(urza, ForgeSettings(max_recompilation_cpu_s_per_day=0.0)) == 0
    assert await made_anew(urza, ForgeSettings()) == 1


@pytest.mark.usefixtures("idle")
async def test_a_busy_machine_is_left_alone(urza: Urza, monkeypatch: pytest.MonkeyPatch) -> None:
    urza.set_interest(store(urza), "tamiyo", 1.0)
    await Tezzeret(urza).run()
    monkeypatch.setattr(os, "getloadavg", lambda: (1e9, 0.0, 0.0))
    assert await made_anew(urza, ForgeSettings()) == 0


@pytest.mark.usefixtures("idle")
async def test_a_recompilation_that_fails_is_not_tried_again(
    urza: Urza, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(header: Header, blobs: Blobs) -> tuple[Header, Blobs]:
        raise WorkerError("exit status -11")

    blueprint_id = store(urza)
    urza.set_interest(blueprint_id, "tamiyo", 1.0)
    await Tezzeret(urza).run()
    monkeypatch.setitem(child.HANDLERS, "package", crash)
    assert await made_anew(urza, ForgeSettings()) == 1
    assert urza.blueprint_status(blueprint_id) == (COMPILED, "exit status -11")


@pytest.mark.usefixtures("idle")
async def test_what_waits_need_not_wait_for_a_recompilation(urza: Urza) -> None:
    urza.set_interest(store(urza), "tamiyo", 1.0)
    bus = MemoryBus()
    settings = ForgeSettings(recompiles_when_idle=True, poll_interval_s=0.01)
    tezzeret = Tezzeret(urza, bus, settings)
    recompiler = tezzeret._recompiler
    assert isinstance(recompiler, InlineWorker)
    recompiler.gate.clear()
    running = asyncio.create_task(tezzeret.run())
    await recompiler.called.wait()
    late = await tezzeret.submit(blueprints.get("norm"), LINEAR, "float32")
    await bus.drained([Topic.BLUEPRINT_SUBMITTED])
    assert urza.blueprint_status(late)[0] is COMPILED
    assert Pipeline.AGGRESSIVE not in urza.forge_status().compiled
    bus.close()
    recompiler.gate.set()
    await running  # what is at hand is finished
    assert urza.forge_status().compiled == {Pipeline.FAST: 2, Pipeline.AGGRESSIVE: 1}


async def test_what_is_announced_while_it_is_compiled_is_compiled_once(
    urza: Urza, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = MemoryBus()
    tezzeret = Tezzeret(urza, bus, ForgeSettings(poll_interval_s=0.01))
    worker = hold(tezzeret)
    tezzeret._announce(Topic.BLUEPRINT_SUBMITTED, BlueprintSubmitted(blueprint_id="f" * 64))
    running = asyncio.create_task(tezzeret.run())
    bus.subscribe(Topic.BLUEPRINT_SUBMITTED, "tezzeret")
    await bus.drained([Topic.BLUEPRINT_SUBMITTED])  # it has begun
    blueprint_id = store(urza)
    await worker.called.wait()  # it was found, not announced
    looked, status = threading.Event(), urza.blueprint_status

    def look(blueprint_id: str) -> tuple[BlueprintStatus, str]:
        answer = status(blueprint_id)
        looked.set()
        return answer

    monkeypatch.setattr(urza, "blueprint_status", look)
    tezzeret._announce(Topic.BLUEPRINT_SUBMITTED, BlueprintSubmitted(blueprint_id=blueprint_id))
    await asyncio.to_thread(looked.wait)
    worker.gate.set()
    await bus.drained([Topic.BLUEPRINT_SUBMITTED])
    assert urza.forge_status().compiled == {Pipeline.FAST: 1}
    bus.close()
    await running


async def test_an_announcement_of_an_unknown_blueprint_is_passed_over(
    urza: Urza, caplog: pytest.LogCaptureFixture
) -> None:
    bus = MemoryBus()
    tezzeret = Tezzeret(urza, bus)
    tezzeret._announce(Topic.BLUEPRINT_SUBMITTED, BlueprintSubmitted(blueprint_id="f" * 64))
    running = asyncio.create_task(tezzeret.run())
    bus.subscribe(Topic.BLUEPRINT_SUBMITTED, "tezzeret")
    await bus.drained()
    bus.close()
    await running
    assert "was not compiled: the library holds no blueprint" in caplog.text
