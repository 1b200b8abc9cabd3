"""No time is believed that the device cannot have kept."""

import pytest
import torch
from test_urabrask_measurement import SETTINGS, Clock
from urabrask_artifacts import ACT, INP, batch_normed, param, residual_mlp

from esper.kasmina.graph import Graph, Node, Ref
from esper.urabrask.inputs import draw
from esper.urabrask.measurement import Benchmark, ImplausibleError
from esper.urabrask.oracle import Oracle
from esper.urabrask.roofline import Ceilings, floor_us, read_bytes

BATCH = 3


def oracle_and_draw(specimen: tuple) -> tuple[Oracle, object]:
    manifest, files = specimen
    given = draw(manifest, BATCH, torch.Generator().manual_seed(0), chunk=False)
    return Oracle(manifest, files), given


def test_the_floor_is_the_higher_of_two() -> None:
    ceilings = Ceilings(memory_bytes_per_s=1e12, flops_per_s=1e13)
    assert floor_us(ceilings, read_bytes=2_000_000, flops=10_000_000) == pytest.approx(2.0)
    assert floor_us(ceilings, read_bytes=2_000_000, flops=50_000_000) == pytest.approx(5.0)
    assert floor_us(Ceilings(), read_bytes=2_000_000, flops=50_000_000) == 0.0


def test_only_what_must_be_read_counts() -> None:
    nodes = (
        Node("aten.narrow.default", (INP, 1, 0, 4), {}),
        Node("aten.mul.Tensor", (ACT, Ref("node", 0)), {}),
    )
    tensors = {INP: torch.ones(3, 6), ACT: torch.ones(3, 4), param("unused"): torch.ones(9)}
    assert read_bytes(Graph(nodes, Ref("node", 1)), tensors) == 3 * 4 * 4


def test_what_a_kernel_reads_and_computes() -> None:
    oracle, given = oracle_and_draw(residual_mlp())
    weights = 8 * 6 + 8 + 4 * 8 + 4
    assert oracle.read_bytes(given) == 4 * (BATCH * (6 + 4) + weights)
    assert oracle.flops(given) == 2 * BATCH * (6 * 8 + 8 * 4)


def test_counting_leaves_the_state_alone() -> None:
    oracle, given = oracle_and_draw(batch_normed())
    before = {name: tensor.clone() for name, tensor in oracle.state.items()}
    assert oracle.flops(given) == 0
    assert all(torch.equal(oracle.state[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(("floor", "believed"), [(7.9, True), (8.1, False)])
def test_a_forward_is_no_faster_than_the_floor(floor: float, believed: bool) -> None:
    benchmark = Benchmark(SETTINGS, floor)
    if believed:
        benchmark.run(Clock(iter([8.0] * 7)))
        assert benchmark.decided
    else:
        with pytest.raises(ImplausibleError, match=r"in 8\.00 us, .* 8\.10 us at the very least"):
            benchmark.run(Clock(iter([8.0] * 7)))
