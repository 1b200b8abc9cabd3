"""The benchmark suite: its statistics on known ratios, its gate, its rows, and a run of it.

No test looks at a measured time.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from benchmarks import instructions, run
from benchmarks.cases import dormant
from benchmarks.clocks import Work
from benchmarks.gate import WrongResultError, check_identical
from benchmarks.harness import (
    Contest,
    Estimate,
    Plan,
    balanced_orders,
    compare,
    estimate,
    measure,
    paired_sample,
    repeats_needed,
)
from benchmarks.models import MLP, SUITE, Subject, unwrapped, wrapped
from benchmarks.rows import Baseline, Context, Row, print_table, read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
PLAN = Plan(device=CPU, seed=0, rounds=60, min_sample_ns=1_000, count_instructions=False)


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


def contest(ratio: float, log: list[str]) -> Contest:
    return Contest(lambda: FakeWork("A", 100.0, log), lambda: FakeWork("B", 100.0 * ratio, log))


def test_a_known_ratio_is_recovered_in_spite_of_a_drifting_clock() -> None:
    clock = FakeClock(drift=1.0)
    result = compare({"one": contest(1.0, [])}, clock, PLAN, np.random.default_rng(0))["one"]
    assert result.ratio.value == pytest.approx(1.0, abs=1e-12)
    assert result.ratio.low == pytest.approx(result.ratio.high, abs=1e-12)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.01, 3.0])
def test_contests_keep_their_own_samples(ratio: float) -> None:
    contests = {"variant": contest(ratio, []), "control": contest(1.0, [])}
    results = compare(contests, FakeClock(), PLAN, np.random.default_rng(0))
    assert results["variant"].ratio.value == pytest.approx(ratio)
    assert results["control"].ratio.value == pytest.approx(1.0)
    assert results["variant"].baseline_ns == pytest.approx(100.0)


def test_a_slower_variant_is_told_from_noise() -> None:
    contests = {"variant": contest(1.05, []), "control": contest(1.0, [])}
    results = compare(contests, FakeClock(noise=0.02), PLAN, np.random.default_rng(0))
    assert results["variant"].ratio.low > 1.0
    assert results["control"].ratio.low < 1.0 < results["control"].ratio.high


def test_the_interval_covers_the_median_about_99_times_in_100() -> None:
    rng = np.random.default_rng(0)
    estimates = [estimate(rng.lognormal(0.0, 0.1, 40).tolist(), rng) for _ in range(400)]
    covered = sum(one.low <= 1.0 <= one.high for one in estimates) / len(estimates)
    assert 0.975 <= covered <= 0.999


def test_an_estimate_of_known_samples() -> None:
    result = estimate([1.0, 2.0, 3.0, 4.0, 100.0], np.random.default_rng(0))
    assert result.value == 3.0
    assert result.low >= 1.0
    assert result.high <= 100.0
    assert result.spread == pytest.approx((1.8, 23.2))


@pytest.mark.parametrize(("baseline_first", "order"), [(True, "ABBA"), (False, "BAAB")])
def test_a_round_warms_up_and_runs_in_the_order_it_was_given(
    baseline_first: bool, order: str
) -> None:
    log: list[str] = []
    pair = paired_sample(contest(2.0, log), baseline_first, FakeClock(), repeats=1)
    assert pair == pytest.approx((100.0, 200.0))
    assert "".join(log) == order[:2] + order


def test_orders_are_random_but_balanced_and_repeatable() -> None:
    orders = balanced_orders(100, np.random.default_rng(3))
    assert sum(orders) == 50
    assert orders not in ([True, False] * 50, [False, True] * 50)
    assert orders == balanced_orders(100, np.random.default_rng(3))
    assert orders != balanced_orders(100, np.random.default_rng(4))


def test_samples_are_as_long_as_asked_for() -> None:
    assert repeats_needed(FakeWork("A", 100.0, []), FakeClock(), 1_000) == 16
    assert repeats_needed(FakeWork("A", 5_000.0, []), FakeClock(), 1_000) == 1


def test_a_single_work_is_measured_as_often_as_planned() -> None:
    log: list[str] = []
    result = measure(FakeWork("A", 2_000.0, log), FakeClock(), PLAN, np.random.default_rng(0))
    assert result.value == 2_000.0
    assert len(log) == PLAN.rounds + 1


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
    spread = (0.9, 1.1)
    assert dormant.is_free(Estimate(*ratio, spread), Estimate(control, 0.9, 1.1, spread)) is free


@pytest.mark.parametrize("subject", SUITE, ids=lambda subject: subject.name)
def test_variants_share_every_tensor_and_no_module(subject: Subject) -> None:
    net, inp = subject.prepare(CPU, 0)
    for copy in (unwrapped(net), wrapped(net, inp)):
        tensors = zip(copy.named_parameters(), net.named_parameters(), strict=True)
        buffers = zip(copy.named_buffers(), net.named_buffers(), strict=True)
        assert all(name == other and ours is own for (name, ours), (other, own) in tensors)
        assert all(name == other and ours is own for (name, ours), (other, own) in buffers)
        assert not set(map(id, copy.modules())) & set(map(id, net.modules()))


def biased(net: nn.Module) -> nn.Module:
    model = unwrapped(net)
    model.get_submodule("4").bias = nn.Parameter(torch.ones(10))
    return model


def deaf(net: nn.Module) -> nn.Module:
    """Compute the same outputs, but let no gradient reach the first layer."""
    model = unwrapped(net)
    model.get_submodule("0").register_forward_hook(lambda _module, _args, out: out.detach())
    return model


def forgetful(net: nn.Module) -> nn.Module:
    model = unwrapped(net)
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
        check_identical("mlp", unwrapped(net), spoil(net), inp)


@pytest.mark.parametrize("subject", SUITE, ids=lambda subject: subject.name)
def test_the_gate_lets_equal_models_pass_and_leaves_them_as_found(
    subject: Subject,
) -> None:
    net, inp = subject.prepare(CPU, 0)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    check_identical(subject.name, unwrapped(net), unwrapped(net), inp)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_wrong_model_is_reported_and_never_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(dormant, "SUITE", (MLP,))
    monkeypatch.setattr(dormant, "wrapped", lambda net, _inp: biased(net))
    monkeypatch.setattr(dormant, "times", lambda *_: pytest.fail("timed"))
    path = tmp_path / "rows.json"
    assert run.main(["dormant", "--quick", "--json", str(path)]) == 1
    assert (
        "dormant: not timed, MLP 128-512-512-10: output in eval is not" in capsys.readouterr().out
    )
    assert not path.exists()


def test_without_valgrind_one_line_says_that_instructions_are_not_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: object) -> None:
        raise OSError("Missing: valgrind")

    monkeypatch.setattr(dormant, "count", missing)
    assert dormant.instructions_if_possible(PLAN, Row) == []
    assert capsys.readouterr().err == "instructions are not counted: Missing: valgrind\n"


def test_every_variant_takes_its_turn_in_every_round() -> None:
    log: list[str] = []
    calls = instructions.turns([FakeWork(name, 1.0, log) for name in "AB"])
    log.clear()  # of the warm-up
    for work in calls:
        work()
    blocks = "A" * instructions.CALLS + "B" * instructions.CALLS
    assert "".join(log) == "A" * 10 + blocks * instructions.ROUNDS


def sample_row(*, met: bool | None) -> Row:
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
        case="dormant",
        row="Linear",
        metric="time ratio",
        value=1.25,
        low=1.0,
        high=1.5,
        spread=(0.75, 1.75),
        unit="x",
        baseline=Baseline(name="unwrapped", value=1234.0, unit="ns"),
        target=None if met is None else "<= 1.0",
        met=met,
        context=context,
    )


def test_rows_survive_json(tmp_path: Path) -> None:
    rows = [sample_row(met=True), sample_row(met=None)]
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
        (["nothing"], "unknown case 'nothing', expected one of dormant"),
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


def test_a_quick_run_writes_every_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    subprocess.run(
        [sys.executable, "benchmarks/run.py", "dormant", "--quick", "--json", str(path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    rows = {row.row: row for row in read_json(path)}
    compared = [f"{subject.name}, {mode.name}" for subject in SUITE for mode in dormant.MODES]
    stepped = [f"model.step(), nothing due, {seeds} seeds" for seeds in ("20", "10,000")]
    assert list(rows) == [
        *(name for row in compared for name in (row, f"{row}, A/A")),
        *stepped,
    ]
    for name, row in rows.items():
        assert row.case == "dormant"
        assert row.low <= row.value <= row.high
        assert (row.met is None) == (row.target is None) == name.endswith("A/A")
        assert row.context.threads == 1
        assert row.context.device == "cpu"
