"""The session for a machine with a GPU, as far as a machine without one can run it."""

import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def session() -> ModuleType:
    spec = importlib.util.spec_from_file_location("session", ROOT / "tests" / "gpu" / "session.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["session"] = module  # where its dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_each_steps_outcome_is_told(
    session: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = sys.executable
    hang = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    steps = [
        session.Step("good", (python, "-c", "print('fine')"), 30),
        session.Step("bad one", (python, "-c", "print('why'); raise SystemExit(9)"), 30),
        session.Step("slow", (python, "-c", hang), 0.5),
        session.Step("absent", ("no-such-program",), 30),
        session.Step(
            "told", (python, "-c", "import os; print(os.environ['A'])"), 30, (("A", "b"),)
        ),
    ]
    results = session.run_together(steps, tmp_path, time.monotonic() + 30)
    assert [(result.name, result.verdict) for result in results] == [
        ("good", "passed"),
        ("bad one", "failed (exit status 9)"),
        ("slow", "out of time"),
        ("absent", "its program is missing"),
        ("told", "passed"),
    ]
    assert (tmp_path / "bad-one.log").read_text() == "why\n"
    assert (tmp_path / "told.log").read_text() == "b\n"
    assert session.report(results, tmp_path) == 1
    assert "--- bad one: failed (exit status 9)\nwhy\n" in capsys.readouterr().out
    assert session.report(results[:1], tmp_path) == 0


def test_nothing_runs_beyond_the_sessions_end(session: ModuleType, tmp_path: Path) -> None:
    late = session.Step("late", (sys.executable, "-c", "import time; time.sleep(60)"), 60)
    [result] = session.run_together([late], tmp_path, time.monotonic())
    assert result.verdict == "out of time"


def test_the_needed_packages_are_those_of_the_project(session: ModuleType) -> None:
    needed = session.needed_packages()
    assert {"torch", "pybind11", "ninja", "safetensors", "sqlalchemy", "pytest-asyncio"} <= {
        *needed
    }
    assert len(needed) == len(set(needed))
    assert all(">" not in name for name in needed)


def test_what_is_missing_is_named(session: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(session, "needed_packages", lambda: ["torch", "no-such-package"])
    monkeypatch.setattr(session, "prints_true", lambda program: False)
    missing = [*session.missing_parts()]
    assert [line.split(" (")[0] for line in missing] == [
        "the Python package no-such-package",
        "an NVIDIA GPU with a driver and a torch that can use it",
        "nvcc on PATH",
        "compute-sanitizer on PATH",
    ]


def test_every_sanitizer_runs_every_op_test(session: ModuleType) -> None:
    steps = session.sanitizer_steps()
    assert [step.command[2] for step in steps] == ["memcheck", "racecheck", "synccheck"]
    tests = {f"tests/{path.name}" for path in (ROOT / "tests").glob("test_ops_*.py")}
    assert all(tests <= {*step.command} for step in steps)


def test_every_benchmark_case_writes_its_rows(session: ModuleType) -> None:
    [step] = [step for step in session.benchmark_steps() if step.name == "bench dormant"]
    assert step.command[-1].endswith("benchmarks/results/cuda-dormant.json")
