"""Every kernel of the zoo gets the verdict that it deserves, for the right reason.

``python tests/test_zoo.py --runs 20 --load 4`` does it so many times, with so many busy processes
beside it, and counts.
"""

import argparse
import multiprocessing
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import zoo

from esper.config import EvaluatorSettings
from esper.contracts import KernelStatus, UrabraskValidationReport
from esper.urabrask.gauntlet import Gauntlet
from esper.urabrask.sandbox import Sandbox

TIMEOUT_S = 30.0
SETTINGS = EvaluatorSettings(
    timeout_s=TIMEOUT_S,
    memory_limit_bytes=2 * 2**30,
    batch_sizes=(1, 7),
    timed_rounds=5,
    timed_block_s=0.01,
)


class Keeper:
    """Sends specimens through the gauntlet, the endless ones with less patience."""

    def __init__(self) -> None:
        self._sandbox = Sandbox(readable=(Path(__file__).parent,))

    def judge(self, kind: str, name: str) -> tuple[UrabraskValidationReport, object]:
        module, (manifest, files), loader = zoo.specimen(kind, name)
        timeout_s = getattr(module, "TIMEOUT_S", TIMEOUT_S)
        settings = SETTINGS.model_copy(update={"timeout_s": timeout_s})
        return Gauntlet(settings, self._sandbox, loader).run(manifest, files), module

    def close(self) -> None:
        self._sandbox.close()


@pytest.fixture(scope="module")
def keeper() -> Iterator[Keeper]:
    keeper = Keeper()
    yield keeper
    keeper.close()


def fault(keeper: Keeper, kind: str, name: str) -> str:
    """Return what is wrong with the verdict; empty if nothing is."""
    report, module = keeper.judge(kind, name)
    last = report.checks[-1]
    found = f"{report.status}: {last.name}: {last.reason}"
    if kind == "honest":
        return "" if report.status is KernelStatus.VALIDATED else found
    expected = KernelStatus.REJECTED, module.CHECK, False  # type: ignore[attr-defined]
    if (report.status, last.name, last.passed) != expected:
        return found
    matches = re.search(module.REASON, last.reason)  # type: ignore[attr-defined]
    return "" if matches else found


def test_the_zoo_is_large() -> None:
    assert len(zoo.names("hostile")) >= 40
    assert len(zoo.names("honest")) >= 20


@pytest.mark.parametrize("name", zoo.names("hostile"))
def test_hostile_kernels_are_rejected_for_the_right_reason(keeper: Keeper, name: str) -> None:
    assert fault(keeper, "hostile", name) == ""


@pytest.mark.parametrize("name", zoo.names("honest"))
def test_honest_kernels_pass(keeper: Keeper, name: str) -> None:
    assert fault(keeper, "honest", name) == ""


def test_the_evaluators_process_does_not_notice(keeper: Keeper) -> None:
    """The sandbox is that of all the others, and they were all there before."""
    before = torch.get_default_dtype(), torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    for name in ("patches_allclose", "segfaults", "changes_default_dtype", "handles_signals"):
        assert fault(keeper, "hostile", name) == ""
    after = torch.get_default_dtype(), torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    assert after == before
    assert not Path("/tmp/trace").exists()
    assert fault(keeper, "honest", "residual_mlp") == ""


def busy() -> None:
    while True:
        torch.randn(200, 200) @ torch.randn(200, 200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--load", type=int, default=os.cpu_count(), help="busy processes beside it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    spawn = multiprocessing.get_context("spawn")
    beside = [spawn.Process(target=busy, daemon=True) for _ in range(options.load)]
    for process in beside:
        process.start()
    keeper, faults, started = Keeper(), Counter[str](), time.monotonic()
    specimens = [(kind, name) for kind in ("hostile", "honest") for name in zoo.names(kind)]
    for run in range(options.runs):
        for kind, name in specimens:
            if found := fault(keeper, kind, name):
                faults[name] += 1
                print(f"{kind} {name}: {found}", flush=True)
        print(
            f"run {run + 1}: {faults.total()} faults, {time.monotonic() - started:.0f} s",
            flush=True,
        )
    keeper.close()
    for process in beside:
        process.kill()
    print(f"{options.runs * len(specimens)} verdicts, {faults.total()} wrong: {dict(faults)}")


if __name__ == "__main__":
    main()
