"""The benchmark suite: its statistics on known ratios, its gate, its rows, its plots, its runs.

No test looks at a measured time.
"""

import itertools
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks import findings, instructions, peers, plot, run, schedule
from benchmarks.cases import (
    CASES,
    active,
    bandwidth,
    bank,
    compiled,
    dormant,
    isolated,
    observed,
)
from benchmarks.clocks import Work
from benchmarks.compiled_life import WAYS
from benchmarks.gate import WrongResultError, check_alike, check_close, check_identical
from benchmarks.harness import (
    MIN_ROUNDS,
    Plan,
    Times,
    Trial,
    estimate,
    measure,
    one_round,
    orders,
    repeats_needed,
)
from benchmarks.kernels import Kernels
from benchmarks.models import MLP, SUITE, Subject, copied, wrapped
from benchmarks.modes import MODES
from benchmarks.rows import (
    Baseline,
    Context,
    Finding,
    Point,
    Row,
    print_table,
    read_json,
    write_json,
)
from esper.config import SeedSettings

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
PLAN = Plan(device=CPU, seed=0, rounds=60, trial_s=60.0, min_sample_ns=1_000, quick=True)


class FakeWork:
    """Work of a known duration that notes when it runs."""

    def __init__(self, name: str, cost_ns: float, log: list[str]):
        self.name = name
        self.cost_ns = cost_ns
        self.log = log

    def __call__(self) -> None:
        self.log.append(self.name)


class FakeClock:
    """A clock that drifts, so that whatever comes later takes longer, and is noisy if asked."""

    def __init__(self, drift: float = 0.0, noise: float = 0.0):
        self.drift = drift
        self.noise = noise
        self.readings = 0
        self.rng = np.random.default_rng(1)

    def time_ns(self, work: Work, repeats: int) -> float:
        assert isinstance(work, FakeWork)
        work()
        self.readings += 1
        drifted = work.cost_ns + self.drift * self.readings
        return drifted * (1 + self.noise * self.rng.standard_normal())


def trial(ratio: float, log: list[str], cost_ns: float = 100.0) -> Trial:
    works = {
        "A": lambda: FakeWork("A", cost_ns, log),
        "B": lambda: FakeWork("B", cost_ns * ratio, log),
        "C": lambda: FakeWork("C", cost_ns, log),
    }
    return Trial("fake", works, check=lambda: None, report=lambda times: [])


def measured(ratio: float, clock: FakeClock, plan: Plan = PLAN) -> Times:
    return measure(trial(ratio, []), plan, np.random.default_rng(0), clock)


def test_a_known_ratio_is_recovered_in_spite_of_a_drifting_clock() -> None:
    times = measured(1.0, FakeClock(drift=1.0))
    for work in "BC":
        ratio = times.ratio(work, "A")
        assert ratio.value == pytest.approx(1.0, abs=1e-12)
        assert ratio.low == pytest.approx(ratio.high, abs=1e-12)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.01, 3.0])
def test_works_keep_their_own_samples(ratio: float) -> None:
    times = measured(ratio, FakeClock())
    assert times.ratio("B", "A").value == pytest.approx(ratio)
    assert times.ratio("C", "A").value == pytest.approx(1.0)
    assert times.median("A") == pytest.approx(100.0)
    assert times.time("B").value == pytest.approx(100.0 * ratio)
    assert times.time("B").samples == PLAN.rounds


def test_a_slower_variant_is_told_from_noise() -> None:
    times = measured(1.05, FakeClock(noise=0.02))
    assert times.ratio("B", "A").low > 1.0
    assert times.ratio("C", "A").low < 1.0 < times.ratio("C", "A").high


def test_what_is_added_is_related_to_what_a_peer_adds() -> None:
    times = Times(
        {
            name: np.full(9, cost)
            for name, cost in (("plain", 10.0), ("ours", 14.0), ("peer", 30.0))
        },
        np.random.default_rng(0),
    )
    assert times.added_ratio("ours", "peer", "plain").value == pytest.approx(0.2)
    row = findings.added_ratio(times, "ours", "peer", "plain", "row", at_most=0.1)
    assert row.baseline == Baseline(name="added by peer", value=20.0, unit="ns")
    assert (row.target, row.met) == ("<= 0.1 x", False)


def test_a_cost_that_is_spent_less_often_is_diluted() -> None:
    times = measured(1.64, FakeClock())
    row = findings.ratio(times, "B", "A", "row", diluted=64, at_most=1.01)
    assert row.value == pytest.approx(1.01)
    row = findings.ratio(times, "B", "A", "row", diluted=1 / 8)
    assert row.value == pytest.approx(1 + 8 * 0.64)
    assert row.met is None


def test_a_duration_is_given_in_its_unit() -> None:
    times = measured(25.0, FakeClock())
    row = findings.duration(times, "B", "row", unit="us", at_most=2.5)
    assert row.value == row.high == pytest.approx(2.5)
    assert (row.unit, row.met) == ("us", True)


def test_the_interval_covers_the_median_about_99_times_in_100() -> None:
    rng = np.random.default_rng(0)
    estimates = [estimate(rng.lognormal(0.0, 0.1, 40), rng) for _ in range(400)]
    covered = sum(one.low <= 1.0 <= one.high for one in estimates) / len(estimates)
    assert 0.975 <= covered <= 0.999


def test_an_estimate_of_known_samples() -> None:
    result = estimate(np.array([1.0, 2.0, 3.0, 4.0, 100.0]), np.random.default_rng(0))
    assert result.value == 3.0
    assert result.low >= 1.0
    assert result.high <= 100.0
    assert result.spread == pytest.approx((1.8, 23.2))


def test_a_round_warms_up_and_goes_there_and_back() -> None:
    log: list[str] = []
    works = trial(2.0, log).works
    times = one_round({name: works[name] for name in "BCA"}, FakeClock(), repeats=1)
    assert times == pytest.approx({"B": 200.0, "C": 100.0, "A": 100.0})
    assert "".join(log) == "BCA" + "BCA" + "ACB"


def test_orders_are_random_but_balanced_and_repeatable() -> None:
    drawn = list(orders("ABC", 99, np.random.default_rng(3)))
    for place in range(3):
        assert Counter(order[place] for order in drawn) == dict.fromkeys("ABC", 33)
    assert len({tuple(order) for order in drawn}) == 6
    assert drawn == list(orders("ABC", 99, np.random.default_rng(3)))
    assert drawn != list(orders("ABC", 99, np.random.default_rng(4)))


def test_samples_are_as_long_as_asked_for() -> None:
    assert repeats_needed(FakeWork("A", 100.0, []), FakeClock(), 1_000) == 16
    assert repeats_needed(FakeWork("A", 5_000.0, []), FakeClock(), 1_000) == 1


def test_a_slow_first_call_does_not_shorten_the_samples() -> None:
    class Compiling(FakeWork):
        def __call__(self) -> None:
            self.cost_ns = 100.0 if self.log else 1e9
            super().__call__()

    assert repeats_needed(Compiling("A", 0.0, []), FakeClock(), 1_000) == 16


def test_a_trial_ends_in_time_but_not_before_it_has_some_rounds() -> None:
    hasty = Plan(device=CPU, seed=0, rounds=60, trial_s=0.0, min_sample_ns=1_000, quick=True)
    assert measured(1.0, FakeClock(), hasty).time("A").samples == MIN_ROUNDS


def ratio_of(value: float, low: float, high: float) -> Finding:
    return Finding(row="row", metric="time ratio", value=value, low=low, high=high, unit="x")


@pytest.mark.parametrize(
    ("ratio", "control", "free"),
    [
        ((1.000, 0.995, 1.005), 1.000, True),
        ((1.004, 1.001, 1.007), 1.004, False),  # the interval misses 1.00 from above,
        ((0.990, 0.985, 0.999), 1.000, False),  # and from below
        ((1.012, 0.990, 1.020), 1.000, False),  # too far above the control
        ((1.012, 0.990, 1.020), 1.003, True),
    ],
)
def test_met_is_both_conditions(
    ratio: tuple[float, float, float], control: float, free: bool
) -> None:
    assert dormant.is_free(ratio_of(*ratio), ratio_of(control, 0.9, 1.1)) is free


@pytest.mark.parametrize("subject", SUITE, ids=lambda subject: subject.name)
def test_variants_share_every_tensor_and_no_module(subject: Subject) -> None:
    net, inp = subject.prepare(CPU, 0)
    for copy in (copied(net), wrapped(net, inp)):
        tensors = zip(copy.named_parameters(), net.named_parameters(), strict=True)
        buffers = zip(copy.named_buffers(), net.named_buffers(), strict=True)
        assert all(name == other and ours is own for (name, ours), (other, own) in tensors)
        assert all(name == other and ours is own for (name, ours), (other, own) in buffers)
        assert not set(map(id, copy.modules())) & set(map(id, net.modules()))


def biased(net: nn.Module) -> nn.Module:
    model = copied(net)
    model.get_submodule("4").bias = nn.Parameter(torch.ones(10))
    return model


def deaf(net: nn.Module) -> nn.Module:
    """Compute the same outputs, but let no gradient reach the first layer."""
    model = copied(net)
    model.get_submodule("0").register_forward_hook(lambda _module, _args, out: out.detach())
    return model


def forgetful(net: nn.Module) -> nn.Module:
    model = copied(net)
    model.register_buffer("extra", torch.zeros(1))
    return model


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (biased, "mlp: output in eval is not bit-identical"),
        (deaf, "mlp: expected .*'gradient of 0.weight'.*, got "),
        (forgetful, "mlp: expected .*, got .*'state of extra'"),
    ],
)
def test_the_gate_names_what_differs(spoil: Callable[[nn.Module], nn.Module], message: str) -> None:
    net, inp = MLP.prepare(CPU, 0)
    with pytest.raises(WrongResultError, match=message):
        check_identical("mlp", copied(net), spoil(net), inp)


@pytest.mark.parametrize("subject", SUITE, ids=lambda subject: subject.name)
def test_the_gate_lets_equal_models_pass_and_leaves_them_as_found(
    subject: Subject,
) -> None:
    net, inp = subject.prepare(CPU, 0)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    check_identical(subject.name, copied(net), copied(net), inp)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.fixture(scope="module")
def kernels() -> Iterator[Kernels]:
    with Kernels(CPU) as kernels:
        yield kernels


@pytest.fixture(scope="module")
def at(kernels: Kernels) -> active.Bench:
    return active.bench(active.one_linear(128, 64), PLAN, kernels)


@pytest.mark.parametrize("design", ["low_rank", "residual_mlp"])
def test_the_network_by_hand_computes_what_the_grown_one_does(
    at: active.Bench, design: str
) -> None:
    for seeds, seeds_per_layer in (([0], 1), ([1, 3], 4), (range(4), 4)):
        grown = at.grown({active.ONLY: seeds}, design, seeds_per_layer)()
        check_alike("grown", peers.by_hand(at.net, grown), grown, at.inp)
        with pytest.raises(WrongResultError, match=r"grown: expected .*, got "):
            check_alike("grown", at.net, grown, at.inp)  # which has no weights beside the host's


def test_the_gate_refuses_a_grown_model_that_is_off(at: active.Bench) -> None:
    grown = at.grown({active.ONLY: [0]}, seeds_per_layer=1)()
    written = peers.by_hand(at.net, grown)
    check_alike("grown", written, grown, at.inp)
    written.get_submodule("0").register_forward_hook(lambda _module, _args, out: out * 1.001)
    with pytest.raises(WrongResultError, match=r"grown: output in eval is off by 1.0e-03"):
        check_alike("grown", written, grown, at.inp)


def test_the_gate_refuses_shapes_and_nan() -> None:
    with pytest.raises(WrongResultError, match=r"y should have shape \(3,\), has \(3, 1\)"):
        check_close("y", torch.ones(3), torch.ones(3, 1))
    with pytest.raises(WrongResultError, match="y is off by nan"):
        check_close("y", torch.ones(3), torch.full((3,), torch.nan))


def test_a_wrong_model_is_reported_and_never_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(dormant, "SUITE", (MLP,))
    monkeypatch.setattr(dormant, "wrapped", lambda net, _inp: biased(net))
    monkeypatch.setattr(run, "measure", lambda *_: pytest.fail("timed"))
    path = tmp_path / "rows.json"
    assert run.main(["dormant", "--quick", "--json", str(path)]) == 1
    assert (
        "dormant: not timed, MLP 128-512-512-10: output in eval is not" in capsys.readouterr().out
    )
    assert not path.exists()


def spoil_observations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Observe, but every other time only."""
    monkeypatch.setattr(
        "benchmarks.cases.observed.SeedSettings",
        lambda observe_every: SeedSettings(observe_every=2 * observe_every),
    )


def spoil_isolation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernels be heard."""
    monkeypatch.setattr(Kernels, "isolate", Kernels.graft)


def spoil_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.NaiveWrapper, "forward", lambda self, inp: self.host(inp))


def spoil_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esper.ops.observe_grad", lambda *_: None)


def spoil_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esper.kasmina.bank.SeedBank.tick", lambda self, max_errors: None)


@pytest.mark.parametrize(
    ("case", "spoil", "message"),
    [
        (observed, spoil_observations, "expected 2 observations in 3 blocks of 1 steps, got 1"),
        (isolated, spoil_isolation, "one seed, trained: expected .*, got .*esper_seeds"),
        (active, spoil_peer, "Linear.128, 64.: expected .*, got "),
        (bandwidth, spoil_op, "64 KiB, float32: energy of the gradient is off by 1.0e.00"),
        (bank, spoil_tick, "tick, 10 seeds: alpha_blend is off by 1.0e.00"),
    ],
    ids=lambda value: value.__name__.rpartition(".")[2] if isinstance(value, ModuleType) else "",
)
def test_every_case_refuses_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
    kernels: Kernels,
    case: ModuleType,
    spoil: Callable[[pytest.MonkeyPatch], None],
    message: str,
) -> None:
    spoil(monkeypatch)
    with pytest.raises(WrongResultError, match=message):
        check_all(case.trials(PLAN, kernels))


def check_all(trials: list[Trial]) -> None:
    for trial in trials:
        trial.check()


def test_without_peft_one_line_says_so_and_its_rows_are_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kernels: Kernels
) -> None:
    monkeypatch.setattr(peers, "HAS_PEFT", False)
    trials = active.trials(PLAN, kernels)
    assert capsys.readouterr().err == f"{peers.NO_PEFT}\n"
    assert not any("PEFT" in work for trial in trials for work in trial.works)


def test_without_valgrind_one_line_says_that_instructions_are_not_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: object) -> None:
        raise OSError("Missing: valgrind")

    monkeypatch.setattr(dormant, "count", missing)
    assert dormant.instructions_if_possible(PLAN) == []
    assert capsys.readouterr().err == "instructions are not counted: Missing: valgrind\n"


def test_every_variant_takes_its_turn_in_every_round() -> None:
    log: list[str] = []
    for work in instructions.turns([FakeWork(name, 1.0, log) for name in "AB"]):
        work()
    not_counted = "AB" * instructions.WARM_UP + "A" * (instructions.CALLS - 1)
    blocks = "A" * instructions.CALLS + "B" * instructions.CALLS
    assert "".join(log) == "A" * 10 + (not_counted + blocks) * instructions.ROUNDS


def test_a_round_begins_with_new_version_tags_of_modules() -> None:
    cpython = pytest.importorskip("_testcapi")

    def tags() -> list[int]:
        classes = (nn.Module, nn.Linear)
        for cls in classes:
            hasattr(cls, "forward")  # gives it a tag
        return [cpython.type_get_version(cls) for cls in classes]

    before = tags()
    instructions.renew_version_tags()
    assert not set(tags()) & set(before)


def sample_row(*, met: bool | None, point: Point | None = None, case: str = "dormant") -> Row:
    context = Context(
        commit=None,
        dirty=True,
        machine="a machine",
        versions={"torch": "2"},
        threads=1,
        seed=0,
        device="cpu",
    )
    return Row(
        case=case,
        row="Linear",
        metric="time ratio",
        value=1.25,
        low=1.0,
        high=1.5,
        spread=(0.75, 1.75),
        samples=20,
        unit="x",
        baseline=Baseline(name="unwrapped", value=1234.0, unit="ns"),
        point=point,
        target=None if met is None else "<= 1.0",
        met=met,
        context=context,
    )


def test_rows_survive_json(tmp_path: Path) -> None:
    point = Point(curve="forward", axis="width", x=64)
    rows = [sample_row(met=True), sample_row(met=None, point=point)]
    write_json(rows, tmp_path / "rows.json")
    assert read_json(tmp_path / "rows.json") == rows


def test_the_table_marks_what_falls_short() -> None:
    console = Console(width=160)
    with console.capture() as printed:
        print_table([sample_row(met=False), sample_row(met=True)], console)
    lines = printed.get().splitlines()
    assert any("1.2500 x" in line and "1,234 ns" in line and "NO" in line for line in lines)
    assert any("yes" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "unknown case 'nothing', expected one of dormant, observed, isolated, "),
        (["--rounds", "1"], "--rounds must be at least 2, got 1"),
        (["--json", "nowhere/rows.json"], "--json: there is no folder nowhere"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert message in capsys.readouterr().err


def test_trials_have_names_of_their_own(kernels: Kernels) -> None:
    plan = Plan(device=CPU, seed=0, rounds=2, trial_s=1.0, min_sample_ns=1.0, quick=False)
    timed = (case for name, case in CASES.items() if name != "forge")  # which compiles for minutes
    for case in timed:
        names = [trial.name for trial in case.trials(plan, kernels)]
        assert len(set(names)) == len(names)


def test_a_compiled_life_that_goes_wrong_is_not_timed(kernels: Kernels, tmp_path: Path) -> None:
    with pytest.raises(WrongResultError, match="nowhere: KeyError: 'nowhere'"):
        compiled.told("nowhere", tmp_path, kernels)


def test_every_row_of_the_compiled_lives_says_which_way_it_is_of() -> None:
    forms = {"TRAINING": 1.0, "GRAFTING": 1.0, "STABILIZATION": 1.0}
    told = {"dormant_ms": 1.0, "longest_ms": forms, "life_s": 1.0}
    told |= {"num_graphs": 3, "num_at_culling": 1}
    found = [row for way in WAYS for row in compiled.rows(compiled.NAMES[way], told)]
    assert len({finding.row for finding in found}) == 6 * len(WAYS)
    assert [finding.met for finding in found if finding.target] == [False] * len(WAYS)


def test_plots_show_ratios_and_curves(tmp_path: Path) -> None:
    points = [Point(curve=curve, axis="width", x=x) for curve in "ab" for x in (64, 128)]
    rows = [sample_row(met=met) for met in (None, True, False)]
    rows += [sample_row(met=None, point=point, case="active") for point in points]
    write_json(rows, tmp_path / "rows.json")
    assert plot.main([str(tmp_path / "rows.json"), "--plots", str(tmp_path / "plots")]) == 0
    files = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert files == ["cpu-active-against-width.png", "cpu-dormant.png"]
    (curves,) = (figure for _, figure in plot.curve_figures(rows))
    lines = curves.axes[0].get_lines()
    assert [list(line.get_xdata()) for line in lines] == [[64, 128], [64, 128]]
    assert [line.get_label() for line in lines] == ["a", "b"]


def test_shares_of_a_bandwidth_are_drawn_in_bytes_a_second() -> None:
    point = Point(curve="observe", axis="size of a float32 tensor", x=2**20)
    row = sample_row(met=None, point=point, case="bandwidth")
    row = row.model_copy(update={"baseline": Baseline(name="copy_", value=20.0, unit="GB/s")})
    ((name, figure),) = plot.curve_figures([row])
    assert name == "cpu-bandwidth-against-size-of-a-float32-tensor"
    (line,) = figure.axes[0].get_lines()
    assert list(line.get_ydata()) == [25.0]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["1 MiB"]


@pytest.fixture(scope="module")
def quick_rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    folder = tmp_path_factory.mktemp("quick")
    path = folder / "rows.json"
    options = ["--quick", "--json", str(path), "--plots", str(folder)]
    subprocess.run(
        [sys.executable, "benchmarks/run.py", *options], cwd=ROOT, check=True, capture_output=True
    )
    assert (folder / "cpu-active-against-width-of-the-linear.png").exists()
    return read_json(path)


@pytest.mark.timeout(600)  # the run itself, on a machine that others load
def test_a_quick_run_writes_every_row(quick_rows: list[Row], kernels: Kernels) -> None:
    quick_cases = [case for case in CASES if case != "compile"]  # which takes minutes at least
    assert [case for case, _ in itertools.groupby(row.case for row in quick_rows)] == quick_cases
    names = [(row.case, row.row) for row in quick_rows]
    assert len(set(names)) == len(names)
    for row in quick_rows:
        assert row.low <= row.value <= row.high
        assert (row.met is None) == (row.target is None)
        assert (row.samples is None) == (row.spread is None)  # counted, or measured once
        assert row.samples is None or row.metric != "memory"
        assert row.baseline is None or row.unit == "x"
        assert row.context.threads == 1
        assert row.context.device == "cpu"


def test_a_quick_run_has_the_rows_with_targets(quick_rows: list[Row]) -> None:
    targets = {(row.case, row.row): row.target for row in quick_rows if row.target is not None}
    for subject in SUITE:
        for mode in MODES:
            row = f"{subject.name}, {mode.name}"
            assert targets["dormant", row] == "interval includes 1.00; <= A/A + 0.01"
    for seeds in ("20", "10,000"):
        assert targets["dormant", f"model.step(), nothing due, {seeds} seeds"] == "<= 1,000 ns"
    for subject in observed.SUBJECTS:
        assert targets["observed", f"{subject.name}, an observed step"] == "<= 1.1 x"
        row = f"{subject.name}, one step in 64 observed (derived from the row above)"
        assert targets["observed", row] == "<= 1.002 x"
    row = "MLP 128-512-512-10, low_rank, forward, 4 seeds of layer '2' / 1 seed"
    assert targets["active", row] == "<= 1.3 x"
    for number in bank.NUMBERS:
        start = f"host memory of a seed, {number:,} seeds"
        assert [limit for (_, row), limit in targets.items() if row.startswith(start)] == [
            "<= 64 B"
        ]


def test_the_clock_of_the_run_queue_is_the_one_that_linux_shows() -> None:
    shown = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
    with schedule._queue_clock() as queued_ns:
        before, queued, after = shown.read_text(), queued_ns(), shown.read_text()
    assert int(before.split()[1]) <= queued <= int(after.split()[1])


@pytest.mark.skipif(not peers.HAS_PEFT, reason="peft is not installed")
def test_a_quick_run_compares_with_peft(quick_rows: list[Row]) -> None:
    targets = {row.row: row.target for row in quick_rows if "PEFT" in row.row}
    for what, mode in itertools.product(("the model", "the layer alone"), MODES):
        row = f"Linear(128, 64), {what}, {mode.name}"
        assert targets[f"{row}, added by 1 active seed / by PEFT LoRA"] == "<= 0.5 x"
        assert targets[f"{row}, PEFT LoRA disabled / unwrapped"] is None
