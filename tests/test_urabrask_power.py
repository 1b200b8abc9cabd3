"""The energy counter is read through NVML's own functions; here by a stand-in for the driver's."""

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest

from esper.contracts import Measurement
from esper.urabrask import power
from esper.urabrask.power import EnergyMeter, energy_meter, measure

UUID = "5f2c2c12-0b1e-8d5a-2d6c-0123456789ab"


class NVMLError(Exception):
    pass


class Nvml(ModuleType):
    """The functions of ``pynvml`` that are used, with their units: a counter of millijoules."""

    NVMLError = NVMLError

    def __init__(self, counter_mj: Iterator[int], *, supported: bool = True) -> None:
        super().__init__("pynvml")
        self.__spec__ = ModuleSpec("pynvml", None)
        self._counter_mj = counter_mj
        self.supported = supported
        self.initialised = False

    def nvmlInit(self) -> None:  # noqa: N802
        self.initialised = True

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if not self.initialised or uuid != f"GPU-{UUID}":
            raise NVMLError(f"Not Found: {uuid}")
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        assert handle == "handle"
        if not self.supported:
            raise NVMLError("Not Supported")
        return next(self._counter_mj)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(nvml: Nvml) -> Nvml:
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        return nvml

    return install


@pytest.mark.parametrize("uuid", [UUID, f"GPU-{UUID}"])  # as torch writes it, and as NVML does
def test_power_and_energy_follow_from_the_counter(install: Any, uuid: str) -> None:
    install(Nvml(iter([5_000, 10_000, 11_400])))
    meter = energy_meter(uuid)
    assert meter is not None
    clock_s, ran = iter([100.0, 102.0]), []
    found = measure(meter, lambda: ran.append(1), samples=700, now_s=lambda: next(clock_s))
    assert ran == [1]
    assert (found.power_w, found.energy_per_sample_mj) == (0.7, 2.0)
    assert set(found.model_dump()) <= set(Measurement.model_fields)


def test_a_counter_that_fails_meanwhile_fails_nothing_else(
    install: Any, caplog: pytest.LogCaptureFixture
) -> None:
    nvml = install(Nvml(iter([5_000, 10_000])))
    meter = energy_meter(UUID)
    assert meter is not None

    def run() -> None:
        nvml.supported = False

    assert measure(meter, run, samples=700, now_s=lambda: 1.0) is None
    assert "the power of the GPU was not measured: Not Supported" in caplog.text


def test_none_without_a_gpu_a_counter_or_the_package(
    install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(Nvml(iter([1]), supported=False))
    assert energy_meter(UUID) is None
    nvml = install(Nvml(iter([1])))
    assert energy_meter("another-gpu") is None
    nvml.initialised = False
    assert energy_meter("") is None
    assert not nvml.initialised
    monkeypatch.setattr(power, "find_spec", lambda name: None)
    assert energy_meter(UUID) is None


def test_the_functions_are_those_of_the_package() -> None:
    pynvml = pytest.importorskip("pynvml")
    for name in ("nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetTotalEnergyConsumption"):
        assert callable(getattr(pynvml, name))
    assert issubclass(pynvml.NVMLError, Exception)
    with pytest.raises(pynvml.NVMLError):
        EnergyMeter(pynvml, UUID)  # nobody has initialised it, and there is no such GPU
