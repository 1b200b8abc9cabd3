"""Honest kernels pass, and each way of being wrong fails the check that is there for it."""

import re
from collections.abc import Iterator

import pytest
import torch
from urabrask_artifacts import (
    ACT,
    INP,
    SITE,
    Artifact,
    artifact,
    batch_normed,
    graph,
    repacked,
    residual_mlp,
)

from esper.config import EvaluatorSettings
from esper.contracts import Confidence, KernelStatus, UrabraskValidationReport
from esper.errors import ArtifactIntegrityError, ArtifactMismatchError
from esper.urabrask.candidate import KERNEL_LOADER
from esper.urabrask.gauntlet import Gauntlet
from esper.urabrask.sandbox import Sandbox

SETTINGS = EvaluatorSettings(
    timeout_s=10.0, memory_limit_bytes=2 * 2**30, batch_sizes=(1, 7), timed_rounds=5
)
ALL_CHECKS = [
    "manifest",
    "graph",
    "loads",
    "runs",
    "output",
    "unmodified",
    "alias",
    "finite",
    "forward",
    "gradients",
    "deterministic",
    "benchmark",
]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(SETTINGS) as sandbox:
        yield sandbox


def examine(
    sandbox: Sandbox, specimen: Artifact, loader: str = KERNEL_LOADER
) -> UrabraskValidationReport:
    return Gauntlet(SETTINGS, sandbox, loader).run(*specimen)


def without_latencies(report: UrabraskValidationReport) -> dict[str, object]:
    speeds = {"high_speed", "medium_speed", "low_speed"}
    tags = tuple(tag for tag in report.tags if tag not in speeds)
    return report.model_copy(update={"measurement": None, "tags": tags}).model_dump()


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_honest_kernel_passes_every_check(sandbox: Sandbox, dtype: str) -> None:
    specimen = residual_mlp(dtype=dtype)
    report = examine(sandbox, specimen)

    assert report.status is KernelStatus.VALIDATED
    assert [check.name for check in report.checks] == ALL_CHECKS
    assert all(check.passed for check in report.checks)
    assert report.artifact_id == specimen[0].artifact_id
    assert report.tags[0] == "residual_mlp"
    assert "numerically_stable" in report.tags
    assert 0 < report.risk_score < 0.5
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


def test_same_verdict_and_risk_when_evaluated_again(sandbox: Sandbox) -> None:
    specimen = residual_mlp()
    assert without_latencies(examine(sandbox, specimen)) == without_latencies(
        examine(sandbox, specimen)
    )


def test_dropout_is_compared_in_evaluation_only(sandbox: Sandbox) -> None:
    report = examine(sandbox, residual_mlp(dropout=0.5))
    assert report.status is KernelStatus.VALIDATED
    assert report.confidence is Confidence.MODERATE


def test_buffers_of_batch_norm_are_compared(sandbox: Sandbox) -> None:
    report = examine(sandbox, batch_normed())
    assert report.status is KernelStatus.VALIDATED, report.checks[-1].reason
    assert report.confidence is Confidence.HIGH


@pytest.mark.parametrize(
    ("name", "check", "reason"),
    [
        ("fails_to_load", "loads", "raised ValueError: no such luck"),
        ("loads_other_weights", "loads", "state.down__weight is not what the artifact's file"),
        ("wrong_shape", "output", r"\(1, 3\) on cpu, expected torch.float32 \(1, 4\) on cpu"),
        ("wrong_dtype", "output", "torch.float64"),
        ("subclass", "output", "is a torch.nn.parameter.Parameter, expected a torch.Tensor"),
        ("tuple_output", "output", "is a builtins.tuple"),
        ("modifies_act", "unmodified", "act was modified by the call"),
        ("modifies_parameter", "unmodified", "up__bias was modified by the call"),
        ("returns_act", "alias", "shares its memory with act"),
        ("nan_output", "finite", "1 of 4 elements of out are not finite"),
        ("scaled", "forward", "out is wrong at . of 4 elements"),
        ("one_element_off", "forward", r"out is wrong at 1 of 4 elements, by up to 1.00e-04"),
        ("wrong_branch", "gradients", "grad.state.up__weight is wrong"),
        ("wrong_gradient", "gradients", "grad.inp|grad.act"),
        ("detached_parameter", "gradients", "grad.state.up__bias is missing"),
        ("counts_calls", "deterministic", "out is different when run again"),
        ("exits", "runs", "ended without an answer, exit status 0"),
        ("segfaults", "runs", r"was killed by signal 11 \(Segmentation fault\)"),
        ("dies_of_a_nameless_signal", "runs", r"was killed by signal 40 \("),
        ("raises_nonsense", "runs", r"raised RuntimeError: \\ud800x"),
        ("hogs_memory", "runs", "can't allocate memory"),
        ("floods_stdout", "runs", "printed more than 65536 bytes"),
        ("writes_files", "runs", "File too large"),
        ("forges_an_answer", "runs", "without the nonce|sent more than an answer"),
        ("talks_garbage", "runs", "sent a frame with a header of"),
    ],
)
def test_broken_kernel_fails_the_right_check(
    sandbox: Sandbox, name: str, check: str, reason: str
) -> None:
    report = examine(sandbox, residual_mlp(), f"urabrask_candidates:{name}")

    assert report.status is KernelStatus.REJECTED
    assert report.risk_score == 1.0
    assert report.confidence is Confidence.SPECULATIVE
    *before, last = report.checks
    assert (last.name, last.passed) == (check, False), last.reason
    assert all(passed.passed for passed in before)
    assert re.search(reason, last.reason), last.reason


@pytest.mark.parametrize(
    ("specimen", "check", "reason"),
    [
        pytest.param(
            artifact(*2 * (graph(("aten.log.default", (ACT,))),)),
            "finite",
            r"out is not finite in float64 on ordinary inputs \(batch 1, initial",
            id="logarithm",
        ),
        pytest.param(
            artifact(*2 * (graph(("aten.matmul.default", (INP, ACT))),)),
            "runs",
            "mat1 and mat2 shapes cannot be multiplied",
            id="shapes that do not fit together",
        ),
        pytest.param(
            artifact(*2 * (graph(("aten.relu.default", (INP,))),)),
            "output",
            r"\(1, 6\) on cpu, expected torch.float32 \(1, 4\)",
            id="shape of the input",
        ),
    ],
)
def test_bad_artifact_fails_the_right_check(
    sandbox: Sandbox, specimen: Artifact, check: str, reason: str
) -> None:
    report = examine(sandbox, specimen)
    assert report.status is KernelStatus.REJECTED
    assert report.checks[-1].name == check
    assert re.search(reason, report.checks[-1].reason), report.checks[-1].reason


def test_forbidden_operator_is_rejected_unseen(sandbox: Sandbox) -> None:
    manifest, files = residual_mlp()
    text = files["graph.json"].replace(b"aten.gelu.default", b"aten.nonzero.default")
    report = examine(sandbox, repacked((manifest, files), {"graph.json": text}))
    assert report.checks[-1].name == "graph"
    assert "aten.nonzero.default" in report.checks[-1].reason


def test_manifest_must_state_what_the_graph_takes(sandbox: Sandbox) -> None:
    manifest, files = residual_mlp()
    wider = SITE.model_copy(update={"inp_shape": (None, 8)})
    report = examine(sandbox, (manifest.model_copy(update={"site": wider}), files))
    assert report.checks[-1].name == "graph"
    assert "the manifest says" in report.checks[-1].reason

    report = examine(sandbox, (manifest.model_copy(update={"num_parameters": 1}), files))
    assert "parameters, the manifest says 1" in report.checks[-1].reason

    report = examine(sandbox, (manifest.model_copy(update={"dtype": "int8"}), files))
    assert (report.checks[-1].name, report.checks[-1].passed) == ("manifest", False)


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
