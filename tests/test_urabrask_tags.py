"""Tags follow fixed rules."""

import pytest
from urabrask_artifacts import residual_mlp

from esper.contracts import Measurement
from esper.urabrask import tags

MANIFEST, _ = residual_mlp()


def measurement(speedup: float, memory_bytes: int) -> Measurement:
    return Measurement(
        batch_size=32,
        forward_p50_us=10.0,
        forward_p99_us=20.0,
        forward_backward_p50_us=30.0,
        eager_forward_p50_us=10.0 * speedup,
        memory_bytes=memory_bytes,
    )


@pytest.mark.parametrize(
    ("speedup", "memory_bytes", "error", "expected"),
    [
        (1.1, 200, 1e-7, ("high_speed", "low_memory", "numerically_stable")),
        (1.0, 300, 1e-7, ("medium_speed", "numerically_stable")),
        (0.9, 400, 1e-5, ("medium_speed", "high_memory")),
        (0.5, 400, 1e-5, ("low_speed", "high_memory")),
    ],
)
def test_tags(speedup: float, memory_bytes: int, error: float, expected: tuple[str, ...]) -> None:
    found = tags.tags(MANIFEST, measurement(speedup, memory_bytes), error, given_bytes=100)
    assert found == ("residual_mlp", *expected)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (0, ("residual_mlp", "high_speed", "low_memory", "numerically_stable")),
        (3, ("residual_mlp", "high_speed", "low_memory", "numerically_stable")),
        (4, ("residual_mlp", "medium_speed", "low_memory", "numerically_stable")),
        (10, ("residual_mlp", "medium_speed", "numerically_stable")),
        (14, ("residual_mlp", "low_speed", "numerically_stable")),
        (19, ("residual_mlp", "low_speed", "high_memory", "numerically_stable")),
    ],
)
def test_tags_among_peers(place: int, expected: tuple[str, ...]) -> None:
    """The kernel has the latency and memory of the peer in that place of twenty."""
    peers = [ranked(rank) for rank in range(20)]
    found = ("residual_mlp", "low_speed", "high_memory", "numerically_stable")
    assert tags.among_peers(found, peers, ranked(place)) == expected
    assert tags.among_peers(found, peers[1:], ranked(place)) == found


def ranked(rank: int) -> Measurement:
    return measurement(1.0, 1000 + rank).model_copy(update={"forward_p50_us": 10.0 + rank})
