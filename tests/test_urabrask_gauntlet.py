"""Reports say what was checked and measured; ``tests/test_zoo.py`` tries each way of being wrong."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from urabrask_artifacts import Artifact, batch_normed, residual_mlp

from esper.config import EvaluatorSettings
from esper.contracts import Confidence, KernelStatus, UrabraskValidationReport
from esper.errors import ArtifactIntegrityError, ArtifactMismatchError
from esper.kasmina.program import Program
from esper.urabrask.gauntlet import Gauntlet
from esper.urabrask.inputs import draw
from esper.urabrask.oracle import Oracle
from esper.urabrask.sandbox import Sandbox

SETTINGS = EvaluatorSettings(
    timeout_s=30.0,
    memory_limit_bytes=2 * 2**30,
    batch_sizes=(1, 7),
    timed_rounds=5,
    timed_block_s=0.01,
)
ALL_CHECKS = [
    "manifest",
    "graph",
    "loads",
    "surroundings",
    "threads",
    "runs",
    "output",
    "unmodified",
    "bounds",
    "alias",
    "finite",
    "forward",
    "gradients",
    "gradcheck",
    "deterministic",
    "poisoned",
    "stateless",
    "second_backward",
    "autocast",
    "memory",
    "benchmark",
]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        yield sandbox


def examine(sandbox: Sandbox, specimen: Artifact) -> UrabraskValidationReport:
    return Gauntlet(SETTINGS, sandbox).run(*specimen)


def without_chance(report: UrabraskValidationReport) -> dict[str, object]:
    speeds = {"high_speed", "medium_speed", "low_speed"}
    tags = tuple(tag for tag in report.tags if tag not in speeds)
    checks = tuple(check for check in report.checks if check.name != "benchmark")
    by_chance = {"measurement": None, "tags": tags, "checks": checks, "hidden_seed": None}
    return report.model_copy(update=by_chance).model_dump()


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_honest_kernel_passes_every_check(sandbox: Sandbox, dtype: str) -> None:
    specimen = residual_mlp(dtype=dtype)
    report = examine(sandbox, specimen)

    assert report.status is KernelStatus.VALIDATED
    checks = [name for name in ALL_CHECKS if dtype == "float32" or name != "autocast"]
    assert [check.name for check in report.checks] == checks
    assert all(check.passed for check in report.checks)
    assert report.artifact_id == specimen[0].artifact_id
    assert report.tags[0] == "residual_mlp"
    assert "numerically_stable" in report.tags
    halves = dtype in ("float16", "bfloat16")
    assert report.confidence is (Confidence.MODERATE if halves else Confidence.HIGH)


def test_measures_latency_and_memory(sandbox: Sandbox) -> None:
    measured = examine(sandbox, residual_mlp()).measurement

    assert measured is not None
    assert measured.batch_size == SETTINGS.timed_batch_size
    assert 0 < measured.forward_p50_us <= measured.forward_p99_us
    assert measured.forward_p50_us < measured.forward_backward_p50_us
    # At the least: two hidden activations of width 8, and the output of width 4.
    assert measured.memory_bytes >= 32 * (2 * 8 + 4) * 4


def test_same_verdict_when_evaluated_again(sandbox: Sandbox) -> None:
    specimen = residual_mlp()
    assert without_chance(examine(sandbox, specimen)) == without_chance(examine(sandbox, specimen))


def test_dropout_is_compared_in_evaluation_only(sandbox: Sandbox) -> None:
    report = examine(sandbox, residual_mlp(dropout=0.5))
    assert report.status is KernelStatus.VALIDATED
    assert report.confidence is Confidence.MODERATE


def test_buffers_of_batch_norm_are_compared(sandbox: Sandbox) -> None:
    report = examine(sandbox, batch_normed())
    assert report.status is KernelStatus.VALIDATED, report.checks[-1].reason
    assert report.confidence is Confidence.HIGH


def test_tampered_files_are_refused_without_a_verdict(sandbox: Sandbox) -> None:
    manifest, files = residual_mlp()
    with pytest.raises(ArtifactIntegrityError, match=r"params.safetensors"):
        examine(sandbox, (manifest, files | {"params.safetensors": b"tampered"}))


def test_artifacts_for_other_machines_are_refused_without_a_verdict(sandbox: Sandbox) -> None:
    manifest, files = residual_mlp()
    other = manifest.model_copy(update={"torch_version": "1.0"})
    with pytest.raises(ArtifactMismatchError, match=r"is for torch 1\.0"):
        examine(sandbox, (other, files))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_artifacts_need_cuda(sandbox: Sandbox) -> None:
    manifest, files = residual_mlp()
    with pytest.raises(ArtifactMismatchError, match="is for cuda"):
        examine(sandbox, (manifest.model_copy(update={"device": "cuda"}), files))


def test_a_measurement_that_is_too_unsteady_is_undecided(sandbox: Sandbox) -> None:
    unsteady = SETTINGS.model_copy(update={"max_spread": 1e-12, "measured_again": 0})
    report = Gauntlet(unsteady, sandbox).run(*residual_mlp())
    assert report.status is KernelStatus.UNDECIDED
    assert report.confidence is Confidence.SPECULATIVE
    assert all(check.passed for check in report.checks)
    assert report.checks[-1].reason.startswith("undecided in ")


def test_says_what_held_the_candidate_and_what_was_hidden(sandbox: Sandbox) -> None:
    first, second = (examine(sandbox, residual_mlp()) for _ in range(2))
    assert first.sandbox.startswith("rlimits, seccomp")
    assert first.hidden_seed != second.hidden_seed


def test_a_reference_whose_gradients_are_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, files = residual_mlp()
    oracle = Oracle(manifest, files)
    given = draw(manifest, 3, torch.Generator().manual_seed(0), chunk=False)
    assert oracle.gradcheck(given, oracle.state) is None

    interpret = Program.interpret

    def wrong(program: Program, *args: Any, **kwargs: Any) -> Tensor:
        out = interpret(program, *args, **kwargs)
        return out.detach() + 1.01 * (out - out.detach())

    monkeypatch.setattr(Program, "interpret", wrong)
    assert "Jacobian" in (oracle.gradcheck(given, oracle.state) or "")
