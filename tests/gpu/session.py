"""Builds, tests, sanitises and measures on a machine with an NVIDIA GPU, in one command.

``make test-gpu``, or ``python tests/gpu/session.py [--logs FOLDER] [--limit-s SECONDS]``. Works in
the environment of the Python that runs it and fetches nothing. What is missing is said at once, all
of it. Each step writes a log of its own; the last lines printed are a table of all steps.
"""

import argparse
import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TEST_PACKAGES = ("pytest", "pytest-timeout", "pytest-asyncio", "hypothesis", "numpy", "triton")
SANITIZERS = ("memcheck", "racecheck", "synccheck")
OP_TESTS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/test_ops_*.py"))
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Step:
    name: str
    command: Sequence[str]
    limit_s: float
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Result:
    name: str
    verdict: str  # "passed", or what happened instead
    seconds: float


def main() -> int:
    options = _options()
    missing = [*missing_parts()]
    for line in missing:
        print(f"missing: {line}")
    if missing and not options.keep_going:
        print("nothing was run; --keep-going runs what it can")
        return 2
    options.logs.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.limit_s
    results = [run_together([step], options.logs, deadline) for step in first_steps()]
    results.append(run_together(sanitizer_steps(), options.logs, deadline))
    results += [run_together([step], options.logs, deadline) for step in benchmark_steps()]
    return report([result for batch in results for result in batch], options.logs)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="session.py", description=__doc__)
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "gpu-session")
    parser.add_argument("--limit-s", type=float, default=480, help="for everything together")
    parser.add_argument("--keep-going", action="store_true", help="although something is missing")
    return parser.parse_args()


def missing_parts() -> Iterator[str]:
    """Yield what this machine and this Python lack, in words."""
    for package in needed_packages():
        try:
            importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            yield f"the Python package {package} (for {sys.executable})"
    if not prints_true("import torch; print(torch.cuda.is_available())"):
        yield "an NVIDIA GPU with a driver and a torch that can use it (torch.cuda.is_available())"
    for tool in ("nvcc", "compute-sanitizer"):
        if shutil.which(tool) is None:
            yield f"{tool} on PATH (part of the CUDA toolkit)"


def needed_packages() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    names = [re.match(r"[\w.-]+", requirement) for requirement in (*wanted, *TEST_PACKAGES)]
    return list(dict.fromkeys(name.group() for name in names if name))


def prints_true(program: str) -> bool:
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    return run.stdout.strip() == b"True"


def first_steps() -> Iterator[Step]:
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install")
    offline = ("--no-build-isolation", "--no-deps", "--no-index", "-v", "-e", ".")
    yield Step("build", (*pip, *offline), 180, (("ESPER_CUDA", "ON"),))
    yield Step("cuda tests", (*PYTEST, "-m", "cuda"), 240)
    compiled = ("tests/test_ptxas.py", *(str(path) for path in ROOT.glob("tests/test_triton_*.py")))
    yield Step("registers and spills", (*PYTEST, *compiled), 120)


def sanitizer_steps() -> list[Step]:
    """One a tool; they run side by side."""
    # Every tensor in an allocation of its own, or writes beyond its end hit another tensor.
    environment = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    tests = (*PYTEST, "-o", "timeout=0", "-m", "cuda", *OP_TESTS)
    return [
        Step(
            tool,
            ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *tests),
            180,
            environment,
        )
        for tool in SANITIZERS
    ]


def benchmark_steps() -> Iterator[Step]:
    """Yield one a case, so that a slow one costs no other its result."""
    listing = "from benchmarks.cases import CASES; print(*CASES)"
    run = subprocess.run(
        [sys.executable, "-c", listing], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if run.returncode != 0:
        yield Step("benchmarks", (sys.executable, "-c", listing), 60)
    for case in run.stdout.split():
        path = RESULTS / f"cuda-{case}.json"
        command = (sys.executable, "benchmarks/run.py", case, "--device", "cuda", "--json", path)
        yield Step(f"bench {case}", tuple(map(str, command)), 120)


def run_together(steps: Sequence[Step], logs: Path, deadline: float) -> list[Result]:
    """Run the steps side by side, none beyond its limit or the session's."""
    begin = time.monotonic()
    running = [(step, start(step, logs)) for step in steps]
    results = []
    for step, process in running:
        verdict = outcome(process, min(begin + step.limit_s, deadline))
        results.append(Result(step.name, verdict, time.monotonic() - begin))
        print(f"{step.name}: {verdict}", flush=True)
    return results


def start(step: Step, logs: Path) -> "subprocess.Popen[bytes] | None":
    """Start a step, or return None where its program is not there."""
    if shutil.which(step.command[0]) is None:
        return None
    with log_of(step.name, logs).open("wb") as log:
        return subprocess.Popen(
            step.command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **dict(step.environment)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that it can be ended with all that it started
        )


def outcome(process: "subprocess.Popen[bytes] | None", deadline: float) -> str:
    if process is None:
        return "its program is missing"
    try:
        code = process.wait(max(0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "out of time"
    return "passed" if code == 0 else f"failed (exit status {code})"


def log_of(name: str, logs: Path) -> Path:
    return logs / f"{name.replace(' ', '-')}.log"


def report(results: Sequence[Result], logs: Path) -> int:
    """Print what failed with the end of its log, then the table; 1 if anything failed."""
    failed = [result for result in results if result.verdict != "passed"]
    for result in failed:
        log = log_of(result.name, logs)
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        print(f"\n--- {result.name}: {result.verdict}", *lines[-15:], sep="\n")
    print(f"\n{'step':<24}{'seconds':>8}  verdict")
    for result in results:
        print(f"{result.name:<24}{result.seconds:>8.0f}  {result.verdict}")
    print(f"logs: {logs}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
