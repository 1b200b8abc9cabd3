"""Which autograd functions serve: those in C++ for the torch that they were built with."""

import importlib
from collections.abc import Iterator

import pytest
import torch

import esper._host
from esper import native


@pytest.fixture
def reloaded() -> Iterator[None]:
    yield
    importlib.reload(native)


def test_the_torch_of_the_build_gets_them() -> None:
    assert str(torch.__version__) == esper._host.AUTOGRAD_TORCH
    assert native.autograd is importlib.import_module("esper._autograd")


@pytest.mark.usefixtures("reloaded")
def test_another_torch_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(esper._host, "AUTOGRAD_TORCH", "2.12.0")
    assert importlib.reload(native).autograd is None
