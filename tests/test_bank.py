"""SeedBank: what the host writes, what the device decides, and how each learns of the other.

Tests with a ``line`` have a bank whose arena lies apart from the mirror, as on CUDA, but in host
memory. Copies to the host arrive when the test says so; until then their target holds rubbish, so
that whoever reads it too early shows.
"""

import copy
import gc
import threading

import pytest
import torch
from kasmina_library import MemoryLibrary, NotANumber
from torch import Tensor, nn

import esper
from esper.config import SeedSettings
from esper.contracts import GraftingStrategy, RampCurve, SeedState
from esper.kasmina.bank import SeedBank, typed_views
from esper.kasmina.model import MorphableModel
from esper.kasmina.observation import Observation
from esper.kasmina.transfer import PendingCopy, host_bytes

S = SeedState
CPU = torch.device("cpu")
SIZES = (10, 1_000, 10_000, 1_000_000)


class Line:
    """The way from the device to the host."""

    def __init__(self) -> None:
        self.is_open = False

    def copy(self, source: Tensor, target: Tensor) -> "_LateCopy":
        return _LateCopy(self, source.clone(), target.fill_(0xA5))


class _LateCopy:
    def __init__(self, line: Line, sent: Tensor, target: Tensor) -> None:
        self.line, self.sent, self.target = line, sent, target

    def completed(self) -> bool:
        if self.line.is_open:
            self.target.copy_(self.sent)
        return self.line.is_open


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Line:
    """While this is in use, banks are far from the host."""
    line = Line()
    monkeypatch.setattr("esper.kasmina.bank.arena_on", lambda device, mirror: mirror.clone())
    monkeypatch.setattr("esper.kasmina.bank.PendingCopy", line.copy)
    return line


def occupied(num_seeds: int = 100) -> SeedBank:
    bank = SeedBank(num_seeds, CPU)
    for index in range(num_seeds):
        bank.write("lifecycle_states", index, S.GRAFTING)
    return bank


def refresh(bank: SeedBank, line: Line) -> None:
    bank.begin_refresh()
    line.is_open = True
    bank.finish_refresh()
    line.is_open = False


@pytest.mark.parametrize("num_seeds", SIZES)
def test_a_seed_takes_at_most_64_bytes_on_device_and_host(
    num_seeds: int,
    line: Line,
) -> None:
    bank = SeedBank(num_seeds, CPU)
    padded = -(-num_seeds // 64) * 64
    assert bank.arena.untyped_storage().nbytes() <= 64 * padded
    assert bank.block.nbytes <= 64 * padded
    assert bank.arena.data_ptr() != bank._host_arena.data_ptr()
    assert not bank._spare


@pytest.mark.parametrize("num_seeds", SIZES)
def test_all_of_it_works_at_every_size(num_seeds: int) -> None:
    bank = SeedBank(num_seeds, CPU)
    last = num_seeds - 1
    bank.write("lifecycle_states", last, S.GRAFTING)
    bank.start_ramp(last, 0.5, 2, RampCurve.LINEAR)
    bank.tick(3)
    bank.begin_snapshot()
    snapshot = bank.take_snapshot()
    assert snapshot.fields["alpha_blend"].count_nonzero() == 1
    assert snapshot.fields["alpha_blend"][last] == 0.25
    assert bank.mirror["alpha_blend"][last] == 0.25


def test_addresses_never_change() -> None:
    bank = occupied()
    before = {name: view.data_ptr() for name, view in bank.fields.items()}
    with bank.writes_together():
        bank.set_alpha(3, 0.5)
    bank.tick(3)
    bank.begin_snapshot()
    bank.take_snapshot()
    bank.reset_health()
    assert {name: view.data_ptr() for name, view in bank.fields.items()} == before


# ------------------------------------------------------------------ what the host writes


def test_a_write_reaches_the_device_at_once(line: Line) -> None:
    bank = SeedBank(100, CPU)
    bank.write("active_kernel_id", 70, 2**59 + 1)
    bank.write("alpha_blend", 99, 0.5)
    assert bank.fields["active_kernel_id"][70] == 2**59 + 1
    assert bank.fields["alpha_blend"].nonzero().tolist() == [[99]]
    assert bank.mirror["alpha_blend"][99] == 0.5


def test_writes_together_reach_the_device_at_the_end_of_the_block(
    line: Line,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bank = SeedBank(100, CPU)
    copies = []

    def counted(num_bytes: int, device: torch.device) -> Tensor:
        copies.append(num_bytes)
        return host_bytes(num_bytes, device)

    monkeypatch.setattr("esper.kasmina.bank.host_bytes", counted)
    with bank.writes_together():
        bank.start_ramp(7, 0.75, 5, RampCurve.SIGMOID)
        bank.write("active_kernel_id", 99, 2**59 + 3)
        bank.write("error_count", 99, 1)
        bank.write("error_count", 99, 2)
        assert not bank.arena.any()
    assert torch.equal(bank.arena, bank._host_arena)
    assert bank.fields["alpha_target"][7] == 0.75
    assert bank.fields["active_kernel_id"][99] == 2**59 + 3
    assert bank.fields["error_count"][99] == 2
    assert len(copies) == 1
    with bank.writes_together():
        pass
    assert len(copies) == 1


def test_writes_together_change_nothing_else_of_a_seed(line: Line) -> None:
    bank = occupied()
    with bank.writes_together():
        bank.write("last_update_epoch", 5, 9)
        bank.fields["alpha_blend"][5] = 0.25  # the device is ahead of the mirror
    assert bank.fields["alpha_blend"][5] == 0.25
    assert bank.fields["last_update_epoch"][5] == 9


def test_writes_before_an_error_still_reach_the_device(line: Line) -> None:
    bank = SeedBank(10, CPU)

    def fail() -> None:
        with bank.writes_together():
            bank.write("error_count", 3, 2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert bank.fields["error_count"][3] == 2
    bank.write("error_count", 4, 1)
    assert bank.fields["error_count"][4] == 1


def test_silencing_keeps_the_devices_alpha_not_the_mirrors(line: Line) -> None:
    bank = occupied(10)
    bank.start_ramp(2, 1.0, 4, RampCurve.LINEAR)
    bank.tick(3)
    with bank.silenced(2):
        assert bank.fields["alpha_blend"][2] == 0.0
    assert bank.fields["alpha_blend"][2] == 0.25
    assert bank.mirror["alpha_blend"][2] == 0.0


# ------------------------------------------------------------------ what the device decides


def test_the_mirror_learns_of_a_quarantine_once_the_copy_has_completed(
    line: Line,
) -> None:
    bank = occupied()
    bank.set_alpha(42, 0.5)
    bank.fields["fault"][42] = 1
    bank.tick(1)
    bank.begin_refresh()
    for _ in range(3):
        bank.finish_refresh()
        assert bank.mirror["fallback_active"][42] == 0
        assert bank.mirror["alpha_blend"][42] == 0.5
    line.is_open = True
    bank.finish_refresh()
    assert bank.mirror["fallback_active"][42] == 1
    assert bank.mirror["error_count"][42] == 1
    assert bank.mirror["alpha_blend"][42] == 0.0
    assert sum(bank.mirror["fallback_active"]) == 1


def test_every_field_that_the_device_writes_is_refreshed_and_no_other(
    line: Line,
) -> None:
    bank = occupied()
    bank.arena.fill_(3)  # bytes that make a valid number of each type
    refresh(bank, line)
    seen = {name for name, values in bank.mirror.items() if name != "health_accumulator"}
    refreshed = {name for name in seen if bank.mirror[name][17] == bank.fields[name][17]}
    assert refreshed == {
        "alpha_blend",
        "alpha_slope",
        "ramp_progress",
        "error_count",
        "fallback_active",
        "fault",
    }


def test_a_write_between_begin_and_completion_is_not_undone(line: Line) -> None:
    bank = occupied()
    for index in (7, 8):
        bank.fields["fallback_active"][index] = 1
    bank.begin_refresh()
    bank.clear(7)  # culled and given to another kernel while the copy is on its way
    with bank.writes_together():
        bank.write("lifecycle_states", 9, S.GRAFTING)
        bank.set_alpha(9, 0.75)
    line.is_open = True
    bank.finish_refresh()
    assert bank.mirror["fallback_active"][7] == 0
    assert bank.mirror["fallback_active"][8] == 1
    assert bank.mirror["alpha_blend"][9] == 0.75
    bank.fields["fallback_active"][7] = 1
    refresh(bank, line)
    assert bank.mirror["fallback_active"][7] == 1


def test_seeds_without_a_kernel_are_not_refreshed(line: Line) -> None:
    bank = occupied(10)
    bank.write("lifecycle_states", 4, S.DORMANT)
    bank.write("error_count", 4, 2)
    bank.fields["error_count"].zero_()
    bank.fields["fault"].fill_(1)
    refresh(bank, line)
    assert bank.mirror["error_count"][4] == 2
    assert bank.mirror["fault"].tolist()[:10] == [1, 1, 1, 1, 0, 1, 1, 1, 1, 1]


def test_one_refresh_at_a_time(line: Line) -> None:
    bank = occupied(10)
    bank.begin_refresh()
    bank.fields["error_count"][1] = 1
    bank.begin_refresh()
    line.is_open = True
    bank.finish_refresh()
    assert bank.mirror["error_count"][1] == 0
    refresh(bank, line)
    assert bank.mirror["error_count"][1] == 1


def seeded(builder: type[nn.Module], **settings: object) -> MorphableModel:
    library = MemoryLibrary()
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    options = SeedSettings(seeds_per_layer=2, deterministic=True, **settings)
    model = esper.wrap(net, settings=options)
    model.connect(library)
    strategy = GraftingStrategy(training_steps=10_000)
    model.kasmina_layers["0"].request_germination(1, library.add(builder), strategy)
    model.step()
    return model


def train(model: nn.Module, steps: int) -> None:
    for _ in range(steps):
        model(torch.randn(5, 8)).square().mean().backward()
        model.step()


@pytest.mark.parametrize("telemetry", [True, False])
def test_a_quarantined_seed_is_culled_within_a_few_steps_of_the_copys_arrival(
    telemetry: bool,
    line: Line,
) -> None:
    model = seeded(NotANumber, telemetry_enabled=telemetry, max_errors=2)
    layer = model.kasmina_layers["0"]
    train(model, 20)
    assert model.kasmina.bank.fields["fallback_active"][1] == 1
    assert layer.state(1) is S.TRAINING
    line.is_open = True
    train(model, 9)
    assert layer.state(1) is S.CULLED
    assert type(model[0]) is nn.Linear
    assert model.kasmina.bank.fields["fallback_active"][1] == 0


def test_a_life_on_a_far_device_is_that_on_the_cpu(line: Line) -> None:
    strategy = GraftingStrategy(training_steps=2, grafting_steps=4, stabilization_steps=2)
    line.is_open = True
    library = MemoryLibrary()
    model = esper.wrap(
        nn.Sequential(nn.Linear(8, 8)), settings=SeedSettings(seeds_per_layer=2, deterministic=True)
    )
    model.connect(library)
    model.kasmina_layers["0"].request_germination(1, library.add(), strategy)
    bank, alphas = model.kasmina.bank, []
    for _ in range(12):
        train(model, 1)
        alphas.append((bank.state(1), round(bank.fields["alpha_blend"][1].item(), 3)))
        assert bank.fields["lifecycle_states"][1] == bank.state(1)
    assert alphas[1:8] == [
        (S.TRAINING, 0.0),
        (S.GRAFTING, 0.146),
        (S.GRAFTING, 0.5),
        (S.GRAFTING, 0.854),
        (S.GRAFTING, 1.0),
        (S.STABILIZATION, 1.0),
        (S.STABILIZATION, 1.0),
    ]
    assert bank.state(1) is S.EVALUATING


# ------------------------------------------------------------------ snapshots


def test_a_snapshot_is_handed_out_once_its_copy_has_completed(line: Line) -> None:
    bank = SeedBank(10, CPU)
    bank.write("error_count", 3, 2)
    bank.begin_snapshot()
    bank.write("error_count", 3, 5)
    assert bank.take_snapshot() is None
    assert bank.snapshot_pending
    line.is_open = True
    snapshot = bank.take_snapshot()
    assert snapshot.fields["error_count"][3] == 2
    assert not bank.snapshot_pending
    assert bank.take_snapshot() is None


def take(bank: SeedBank) -> "esper.kasmina.bank.Snapshot":
    bank.begin_snapshot()
    snapshot = bank.take_snapshot()
    assert snapshot is not None
    return snapshot


def test_a_snapshot_that_is_held_keeps_its_values() -> None:
    bank = SeedBank(10, CPU)
    held = []
    for count in range(5):
        bank.write("error_count", 3, count)
        held.append(take(bank))
    assert [int(snapshot.fields["error_count"][3]) for snapshot in held] == [0, 1, 2, 3, 4]


def test_memory_of_a_snapshot_that_nobody_holds_is_used_again() -> None:
    bank = SeedBank(10, CPU)
    addresses = set()
    for _ in range(6):
        snapshot = take(bank)  # while the last one is still held
        addresses.add(snapshot.fields["error_count"].data_ptr())
    assert len(addresses) == 2
    del snapshot
    held = [take(bank) for _ in range(5)]
    del held
    gc.collect()
    assert len(bank._spare) == 2


def test_a_snapshot_may_be_dropped_on_another_thread() -> None:
    bank = SeedBank(10, CPU)
    box = [take(bank)]
    address = box[0].fields["error_count"].data_ptr()
    thread = threading.Thread(target=box.clear)
    thread.start()
    thread.join()
    assert take(bank).fields["error_count"].data_ptr() == address


def test_a_moved_or_copied_bank_begins_anew(line: Line) -> None:
    bank = occupied(10)
    bank.fields["error_count"][3] = 2
    bank.begin_snapshot()
    bank.begin_refresh()
    twin = copy.deepcopy(bank)
    assert twin.fields["error_count"][3] == 2
    assert not twin.snapshot_pending
    bank.move_to(torch.device("meta"))  # to another device than before
    assert bank.mirror["error_count"][3] == 2
    assert not bank.snapshot_pending
    line.is_open = True
    bank.finish_refresh()
    assert bank.mirror["error_count"][3] == 2


def test_nothing_is_copied_for_nobody() -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(8, 8)), settings=SeedSettings(observe_every=4))
    train(model, 5)
    assert model.kasmina.next_due == 8
    assert not model.kasmina.bank.snapshot_pending
    assert not model.kasmina.bank._spare
    observed: list[Observation] = []
    model.kasmina.emit_observation = observed.append
    train(model, 8)
    assert [observation.step for observation in observed] == [8, 12]
    assert observed[0].layers[0].execution_time_us > 0
    assert observed[0].layers[0].num_seeds == 4


def test_a_pending_copy_completes(device: str) -> None:
    source = torch.arange(256, dtype=torch.uint8, device=device)
    target = host_bytes(256, torch.device(device))
    pending = PendingCopy(source, target)
    if device == "cuda":
        assert target.is_pinned()
        torch.cuda.synchronize()
    assert pending.completed()
    assert torch.equal(target, source.cpu())


@pytest.mark.cuda
def test_the_mirror_follows_a_real_device() -> None:
    bank = SeedBank(100, torch.device("cuda", 0))
    with torch.cuda.device(0):
        torch.cuda.set_sync_debug_mode("error")
        try:
            with bank.writes_together():
                bank.write("lifecycle_states", 42, S.GRAFTING)
                bank.set_alpha(42, 0.5)
            bank.fields["fault"][42].fill_(1)
            bank.tick(1)
            bank.begin_refresh()
            bank.begin_snapshot()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    bank.finish_refresh()
    assert bank.mirror["fallback_active"][42] == 1
    assert bank.mirror["alpha_blend"][42] == 0.0
    snapshot = bank.take_snapshot()
    assert snapshot.fields["fallback_active"][42] == 1
    assert torch.equal(bank.arena.cpu(), bank._host_arena)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize("index", [-1, 10, 63])
def test_an_index_out_of_range_is_refused(index: int) -> None:
    bank = SeedBank(10, CPU)
    message = rf"seed index must lie in \[0, 9\], got {index}"
    with pytest.raises(IndexError, match=message):
        bank.write("alpha_blend", index, 0.5)
    with pytest.raises(IndexError, match=message), bank.silenced(index):
        pass
    assert not bank.arena.any()


@pytest.mark.parametrize("alpha", [-0.1, 1.4, float("nan"), float("inf")])
def test_an_alpha_out_of_range_is_refused(alpha: float) -> None:
    bank = SeedBank(10, CPU)
    message = rf"seed 3 of the bank: alpha must lie in \[0, 1\], got {alpha}"
    with pytest.raises(ValueError, match=message):
        bank.set_alpha(3, alpha)
    with pytest.raises(ValueError, match=message):
        bank.start_ramp(3, alpha, 5, RampCurve.LINEAR)
    assert not bank.arena.any()


def test_a_ramp_without_a_step_is_refused() -> None:
    bank = SeedBank(10, CPU)
    with pytest.raises(ValueError, match="seed 3 of the bank: num_steps must be at least 1, got 0"):
        bank.start_ramp(3, 0.5, 0, RampCurve.LINEAR)
    assert not bank.arena.any()


def test_typed_views_show_the_same_memory() -> None:
    bank = SeedBank(10, CPU)
    views = typed_views(bank.arena, bank.block.fields())
    bank.write("fault", 9, 1)
    assert views["fault"][9] == 1


@pytest.mark.usefixtures("line")
def test_a_far_bank_is_captured_on_both_sides_and_restored_on_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    far, twin, newcomer = (SeedBank(3, CPU) for _ in range(3))
    far.start_ramp(1, 0.5, 4, RampCurve.LINEAR)
    far.fields["alpha_blend"][1] = 0.25  # decided by the device; the host does not know yet
    twin.restore(far.capture())
    assert twin.mirror["alpha_blend"][1] == 0
    assert twin.fields["alpha_blend"][1] == 0.25
    assert bytes(twin.block) == bytes(far.block)
    assert torch.equal(twin.arena, far.arena)
    monkeypatch.undo()
    near = SeedBank(3, CPU)
    near.restore(far.capture())
    assert near.mirror["alpha_blend"][1] == 0.25
    newcomer.restore(near.capture())
    assert newcomer.fields["alpha_blend"][1] == newcomer.mirror["alpha_blend"][1] == 0.25
