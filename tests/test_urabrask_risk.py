"""The risk by the rules, and the confidence and the interest that follow, are as documented."""

import pytest
from urabrask_artifacts import residual_mlp

from esper.contracts import (
    Confidence,
    KernelManifest,
    KernelStatus,
    Measurement,
    Pipeline,
    UrabraskValidationReport,
)
from esper.urabrask.interest import ENOUGH_PEERS, interest, surprise
from esper.urabrask.risk import WEIGHTS, Experience, assessed, components, reach

MANIFEST, _ = residual_mlp()
NOTHING = MANIFEST.model_copy(update={"num_parameters": 0})
LARGEST = MANIFEST.model_copy(update={"num_parameters": 10**9, "pipeline": Pipeline.AGGRESSIVE})
WELL_KNOWN = Experience(kernels=10**6, adaptations=10**6)


def report(
    error: float = 0.0,
    spread: float = 0.0,
    speedup: float = 1.0,
    memory_bytes: int = 1000,
    status: KernelStatus = KernelStatus.VALIDATED,
    confidence: Confidence = Confidence.HIGH,
) -> UrabraskValidationReport:
    return UrabraskValidationReport(
        artifact_id=MANIFEST.artifact_id,
        status=status,
        checks=(),
        measurement=Measurement(
            batch_size=32,
            forward_p50_us=10.0,
            forward_p99_us=20.0,
            forward_backward_p50_us=30.0,
            eager_forward_p50_us=10.0 * speedup,
            spread=spread,
            memory_bytes=memory_bytes,
        ),
        max_relative_error=error,
        confidence=confidence,
        machine="test",
        torch_version="2.13",
    )


@pytest.mark.parametrize(
    ("name", "share", "manifest", "judged", "experience"),
    [
        ("drift", 0.0, NOTHING, report(2.0**-24), WELL_KNOWN),
        # Half of the logarithmic way from one rounding to a relative error of 1.
        ("drift", 0.5, NOTHING, report(2.0**-12), WELL_KNOWN),
        ("drift", 1.0, NOTHING, report(100.0), WELL_KNOWN),
        ("size", 0.0, NOTHING, report(), WELL_KNOWN),
        ("size", 1.0, LARGEST, report(), WELL_KNOWN),
        ("complexity", 0.0, NOTHING, report(), WELL_KNOWN),
        ("complexity", 1.0, LARGEST, report(), WELL_KNOWN),
        ("spread", 0.0, NOTHING, report(spread=0.25), WELL_KNOWN),
        ("spread", 0.5, NOTHING, report(spread=0.375), WELL_KNOWN),
        ("spread", 1.0, NOTHING, report(spread=9.0), WELL_KNOWN),
        ("novelty", 1.0, NOTHING, report(), Experience()),
        ("novelty", 0.25, NOTHING, report(), Experience(kernels=3)),
        ("field", 0.5, NOTHING, report(), Experience()),
        ("field", 0.75, NOTHING, report(), Experience(adaptations=2, failures=2)),
        ("field", 0.25, NOTHING, report(), Experience(adaptations=2, failures=0)),
    ],
)
def test_each_component(
    name: str,
    share: float,
    manifest: KernelManifest,
    judged: UrabraskValidationReport,
    experience: Experience,
) -> None:
    found = components(judged, manifest, experience)
    assert set(found) == set(WEIGHTS)
    assert found[name] == pytest.approx(share * WEIGHTS[name], abs=1e-6)


def test_the_score_is_their_sum_and_reaches_from_0_to_1() -> None:
    assert sum(WEIGHTS.values()) == pytest.approx(1.0)
    best = assessed(report(), NOTHING, WELL_KNOWN)
    worst = assessed(report(100.0, spread=9.0), LARGEST, Experience(0, 10**6, 10**6))
    assert (best.risk_score, worst.risk_score) == (0.0, 1.0)
    some = assessed(report(1e-6), MANIFEST, Experience())
    assert some.risk_score == pytest.approx(sum(some.risk_components.values()), abs=0.005)


@pytest.mark.parametrize(
    ("error", "reached", "expected"),
    [
        (0.0, Confidence.HIGH, Confidence.HIGH),
        (0.0, Confidence.MODERATE, Confidence.MODERATE),
        (0.0, Confidence.SPECULATIVE, Confidence.SPECULATIVE),
        (1.0, Confidence.HIGH, Confidence.MODERATE),
    ],
)
def test_confidence_follows_from_the_risk_and_from_what_the_checks_reached(
    error: float, reached: Confidence, expected: Confidence
) -> None:
    found = assessed(report(error, confidence=reached), NOTHING, Experience())
    assert found.conf_level is expected


def test_much_risk_is_speculative() -> None:
    assert assessed(report(1.0), LARGEST, Experience()).conf_level is Confidence.SPECULATIVE


def test_a_rejected_kernel_is_all_risk() -> None:
    rejected = report(status=KernelStatus.REJECTED, confidence=Confidence.SPECULATIVE)
    found = assessed(rejected, MANIFEST, WELL_KNOWN)
    assert (found.risk_score, found.conf_level) == (1.0, Confidence.SPECULATIVE)


def test_what_the_checks_reach() -> None:
    half = MANIFEST.model_copy(update={"dtype": "bfloat16"})
    assert reach(MANIFEST, random_training=False) is Confidence.HIGH
    assert reach(MANIFEST, random_training=True) is Confidence.MODERATE
    assert reach(half, random_training=False) is Confidence.MODERATE


PEERS = [report(1e-7, speedup=1 + index / 100, memory_bytes=1000 + index) for index in range(8)]


@pytest.mark.parametrize(
    ("unusual", "expected"),
    [
        (report(1e-7, speedup=1.2), 0.0),
        (report(1e-7, speedup=4.0), 1.0),
        (report(1e-7, speedup=0.25), 1.0),
        (report(1e-7, memory_bytes=100_000), 1.0),
        (report(1e-5), 1.0),
        # exp(0.4) times the median: four of the least standard deviations, half-way from 2 to 6.
        (report(1e-7, memory_bytes=round(1003.5 * 1.4918)), 0.5),
    ],
)
def test_surprise(unusual: UrabraskValidationReport, expected: float) -> None:
    assert surprise(unusual, PEERS) == pytest.approx(expected, abs=0.01)


def test_what_varies_among_peers_is_no_surprise() -> None:
    varied = [report(1e-7, memory_bytes=1000 * 2**index) for index in range(8)]
    assert surprise(report(1e-7, memory_bytes=256_000), varied) == 0.0


def test_interest_counts_what_is_new_twice_and_needs_peers() -> None:
    unusual = report(1e-7, speedup=4.0)
    assert interest(unusual, PEERS, novelty=1.0) == 1.0
    assert interest(unusual, PEERS, novelty=0.0) == 0.5
    assert interest(unusual, PEERS[: ENOUGH_PEERS - 1], novelty=1.0) == 0.0
