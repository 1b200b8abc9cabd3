"""The examples run as a user starts them: from any folder, each in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def output_of(example: str, folder: Path) -> str:
    command = [sys.executable, "-W", "error", str(EXAMPLES / example)]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_design_of_ones_own_grows_and_helps(tmp_path: Path) -> None:
    losses, seed = output_of("own_design.py", tmp_path).splitlines()
    words = losses.split()
    assert float(words[-4]) < 0.1 * float(words[1])
    assert seed.startswith("seed 0 is FOSSILIZED with Kernel(sine, ")


@pytest.mark.timeout(300)  # where processes share cores, they wait for each other often
def test_several_processes_grow_one_model(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    example = [str(EXAMPLES / "ddp.py"), str(tmp_path / "library")]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", *example],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert second == first.replace("rank 0", "rank 1")
    assert float(first.split()[3].rstrip(",")) < 0.1
    assert first.endswith("FOSSILIZED")


def test_a_kernel_made_and_moved_by_hand(tmp_path: Path) -> None:
    verdict, grafted, stable, culled = output_of("by_hand.py", tmp_path).splitlines()
    assert verdict.startswith("residual_mlp: VALIDATED, ")
    assert grafted.startswith("seed 0: GRAFTING, alpha 0.3, kernel Kernel(residual_mlp, ")
    assert stable.startswith("seed 0: STABILIZATION, alpha 1.0, kernel Kernel(residual_mlp, ")
    assert culled == "seed 0: CULLED, alpha 0.0, kernel None"
