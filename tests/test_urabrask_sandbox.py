"""Whatever a candidate does, the evaluator's process goes on and nothing is left of it."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import zoo

from esper.config import EvaluatorSettings
from esper.contracts import KernelStatus
from esper.errors import WorkerError
from esper.urabrask.gauntlet import Gauntlet
from esper.urabrask.sandbox import Sandbox

SETTINGS = EvaluatorSettings(
    timeout_s=60.0,
    cpu_time_s=2,
    batch_sizes=(7,),
    timed_rounds=5,
    timed_block_s=0.01,
    timed_blocks=3,
)
TESTS = Path(__file__).parent
HOSTILE = {
    "loops_forever": "used more than 2 s of CPU time",
    "exits": "ended without an answer",
    "segfaults": "was killed by signal 11",
    "floods_stdout": "printed more than",
    "writes_files": "",
    "talks_garbage": "",
    "leaves_a_daemon": "",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sandboxes")


@pytest.fixture(scope="module")
def sandbox(folder: Path) -> Iterator[Sandbox]:
    with pytest.MonkeyPatch.context() as patch, Sandbox((TESTS,)) as sandbox:
        patch.setattr(tempfile, "tempdir", str(folder))
        yield sandbox


def reason(sandbox: Sandbox, name: str, settings: EvaluatorSettings = SETTINGS) -> str:
    _, artifact, loader = zoo.specimen("hostile", name)
    report = Gauntlet(settings, sandbox, loader).run(*artifact)
    assert report.status is KernelStatus.REJECTED
    return report.checks[-1].reason


def judge_honest(sandbox: Sandbox) -> KernelStatus:
    _, artifact, loader = zoo.specimen("honest", "residual_mlp")
    return Gauntlet(SETTINGS, sandbox, loader).run(*artifact).status


def descendants(pid: int) -> list[int]:
    """Return the processes below ``pid``, dead ones that nobody has waited for included."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def test_wall_time_is_limited(sandbox: Sandbox) -> None:
    settings = SETTINGS.model_copy(update={"timeout_s": 2.0})
    assert "took more than 2 s" in reason(sandbox, "sleeps", settings)


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_is_left_of_a_candidate(sandbox: Sandbox, folder: Path, name: str) -> None:
    sandbox.launch(SETTINGS).close()  # so that the fork server runs
    before = descendants(os.getpid())

    assert HOSTILE[name] in reason(sandbox, name)

    assert descendants(os.getpid()) == before
    assert judge_honest(sandbox) is KernelStatus.VALIDATED
    assert list(folder.glob("esper-sandbox-*/*")) == []


def test_a_fork_server_that_was_killed_is_replaced() -> None:
    before = descendants(os.getpid())  # of other tests
    with Sandbox((TESTS,)) as sandbox:
        sandbox.launch(SETTINGS).close()
        [server] = set(descendants(os.getpid())) - set(before)
        os.kill(server, signal.SIGKILL)
        assert judge_honest(sandbox) is KernelStatus.VALIDATED


def test_a_candidate_inherits_nothing(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_TEST_SECRET", "hunter2")
    names = sorted({"HOME", "TMPDIR"} | {"CUDA_VISIBLE_DEVICES"} & os.environ.keys())
    # 0 to 3 are its own; 4 is the folder that it is listing.
    expected = f"environment {names}, descriptors [0, 1, 2, 3, 4]"
    assert expected in reason(sandbox, "tells_what_it_sees")


def test_closing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = descendants(os.getpid())
    with Sandbox((TESTS,)) as sandbox:
        assert "was killed by signal 11" in reason(sandbox, "segfaults")
        assert judge_honest(sandbox) is KernelStatus.VALIDATED
    assert descendants(os.getpid()) == before
    assert list(tmp_path.iterdir()) == []


def test_a_sandbox_that_cannot_confine_is_no_verdict(sandbox: Sandbox) -> None:
    """It is not the artifact's fault that there is no such limit."""
    settings = SETTINGS.model_copy(update={"memory_limit_bytes": 2**70})
    with pytest.raises(WorkerError, match=r"(?s)without.*Overflow"):
        reason(sandbox, "exits", settings)


def test_the_sandbox_goes_with_an_evaluator_that_was_killed(tmp_path: Path) -> None:
    """The fork server sees the end of its socket, and takes the candidate along."""
    script = (
        "import os, pathlib, signal\n"
        "from esper.config import EvaluatorSettings\n"
        "from esper.urabrask.sandbox import Sandbox\n"
        "sandbox = Sandbox()\n"
        "candidate = sandbox.launch(EvaluatorSettings())\n"
        "server = sandbox._server._process.pid\n"
        "print(pathlib.Path(f'/proc/{server}/task/{server}/children').read_text(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    # Returns when stdout, which the fork server has inherited, was closed by all who had it.
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    candidate = int(done.stdout)
    assert done.returncode == -signal.SIGKILL
    assert not Path(f"/proc/{candidate}").exists()
    assert list(tmp_path.iterdir()) == []
