"""The evaluator on a GPU: verdicts, cold caches, the roofline and the energy counter."""

import statistics
import time

import pytest
import torch
from urabrask_artifacts import repacked, residual_mlp

from esper.config import EvaluatorSettings
from esper.contracts import KernelStatus
from esper.urabrask import stopwatch
from esper.urabrask.gauntlet import Gauntlet
from esper.urabrask.power import energy_meter
from esper.urabrask.sandbox import Sandbox

pytestmark = pytest.mark.cuda


def test_a_kernel_is_judged_and_measured() -> None:
    manifest, files = repacked(residual_mlp(), {})
    with Sandbox() as sandbox:
        settings = EvaluatorSettings(batch_sizes=(1, 7))
        on_cuda = manifest.model_copy(update={"device": "cuda"})
        report = Gauntlet(settings, sandbox).run(on_cuda, files)
    assert report.status is KernelStatus.VALIDATED, report.checks[-1].reason
    assert report.machine == torch.cuda.get_device_name()
    assert report.measurement is not None
    if energy_meter(str(torch.cuda.get_device_properties().uuid)) is not None:
        assert report.measurement.power_w is not None
        assert 1 < report.measurement.power_w < 2000


def test_every_round_reads_from_memory() -> None:
    """A tensor that fits into the second-level cache is read no faster than from memory."""
    gpu = torch.cuda.get_device_properties()
    values = torch.ones(gpu.L2_cache_size // 4 // 4, device="cuda")
    values.sum()
    [times_us] = stopwatch.in_turn([values.sum], 50, lambda index: None)
    bytes_per_s = 2e3 * gpu.memory_clock_rate * gpu.memory_bus_width / 8
    assert statistics.median(times_us) > 1e6 * values.nbytes / bytes_per_s


def test_the_energy_counter_moves_on() -> None:
    meter = energy_meter(str(torch.cuda.get_device_properties().uuid))
    if meter is None:
        pytest.skip("this GPU's energy is not counted")
    before_mj, deadline = meter.read_mj(), time.monotonic() + 10
    values = torch.ones(2048, 2048, device="cuda")
    while meter.read_mj() == before_mj and time.monotonic() < deadline:
        values @ values
        torch.cuda.synchronize()
    assert meter.read_mj() > before_mj
