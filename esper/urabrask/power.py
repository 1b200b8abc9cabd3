"""The energy that a GPU takes, by its own counter, read through NVML from outside the candidate."""

import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from esper.contracts import Contract

logger = logging.getLogger(__name__)


class Power(Contract):
    """Of the whole GPU, its idle power included."""

    power_w: float
    energy_per_sample_mj: float


class EnergyMeter:
    """Counts millijoules since the driver was loaded. Reading it takes microseconds.

    ``nvml`` is the module ``pynvml``, initialised. ``Error`` is what it raises.
    """

    def __init__(self, nvml: Any, device_uuid: str) -> None:
        self.Error: type[Exception] = nvml.NVMLError
        self._nvml = nvml
        self._device = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{device_uuid.removeprefix('GPU-')}")
        self.read_mj()

    def read_mj(self) -> int:
        return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device))


def energy_meter(device_uuid: str) -> EnergyMeter | None:
    """Return None where there is no ``pynvml``, no driver, or no counter (older than Volta, MIG)."""
    if not device_uuid or find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        return EnergyMeter(pynvml, device_uuid)
    except pynvml.NVMLError:
        return None


def measure(
    meter: EnergyMeter, run: Callable[[], None], samples: int, now_s: Callable[[], float]
) -> Power | None:
    """Return what the GPU takes while ``run`` computes so many samples; it waits for the device.

    The counter moves on every 20 to 100 ms, so it should last some seconds. None if it fails
    meanwhile: a verdict does not hang on it.
    """
    try:
        before_mj, began_s = meter.read_mj(), now_s()
        run()
        energy_mj, elapsed_s = meter.read_mj() - before_mj, now_s() - began_s
    except meter.Error as error:
        logger.warning("the power of the GPU was not measured: %s", error)
        return None
    return Power(power_w=energy_mj / 1e3 / elapsed_s, energy_per_sample_mj=energy_mj / samples)
