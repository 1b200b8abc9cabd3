"""Fixtures of the tests of compiling."""

from collections.abc import Iterator

import pytest
from compile_cases import HeldCompiler, net, wrapped
from kasmina_library import MemoryLibrary
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from esper.kasmina import compilation
from esper.kasmina.model import MorphableModel


@pytest.fixture
def library() -> MemoryLibrary:
    return MemoryLibrary()


@pytest.fixture
def model(library: MemoryLibrary) -> MorphableModel:
    return wrapped(net(), library)


@pytest.fixture
def counter() -> CompileCounterWithBackend:
    return CompileCounterWithBackend("aot_eager")


@pytest.fixture
def eager_counter() -> CompileCounterWithBackend:
    return CompileCounterWithBackend("eager")  # many graphs, which are only counted


@pytest.fixture(autouse=True)
def _no_graph_break(fresh_compiler: None) -> Iterator[None]:
    yield
    assert not counters["graph_break"]


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> HeldCompiler:
    compiler = HeldCompiler()
    monkeypatch.setattr(compilation, "BackgroundCompiler", lambda: compiler)
    return compiler
