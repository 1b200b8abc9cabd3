"""A save that is killed at any instant leaves a whole checkpoint: the former one or the new one."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import esper

CHILD = Path(__file__).with_name("checkpoint_crash_child.py")


def number_in(folder: Path) -> int:
    """Load the checkpoint and check that all its parts belong together."""
    net = nn.Sequential(nn.Linear(64, 64))
    number = int(esper.load(folder, net)["number"])
    assert all(bool((parameter == number).all()) for parameter in net.parameters())
    return number


@pytest.mark.timeout(300)
def test_a_crash_in_any_state_of_the_folder_leaves_a_checkpoint(tmp_path: Path) -> None:
    subprocess.run([sys.executable, CHILD, "states", tmp_path], check=True)
    crashed = sorted(tmp_path.iterdir(), key=lambda path: int(path.name))
    numbers = [number_in(folder) for folder in crashed]
    assert set(numbers) == {1, 2}
    assert numbers == sorted(numbers), "a later crash must leave as much or more"
    assert len(numbers) >= 10, "three files, a manifest and three removals take more steps"


@pytest.mark.timeout(300)
def test_kills_at_random_instants_leave_a_checkpoint(tmp_path: Path) -> None:
    chance = random.Random(0)
    for _ in range(4):
        command = [sys.executable, str(CHILD), "forever", str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            child.stdout.readline()
            with pytest.raises(subprocess.TimeoutExpired):
                child.wait(timeout=chance.uniform(0, 0.1))
            child.kill()
            printed = [int(line) for line in child.stdout if line.endswith("\n")]
        last = printed[-1] if printed else 1
        assert number_in(tmp_path) in (last, last + 1)
