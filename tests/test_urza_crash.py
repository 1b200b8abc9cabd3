"""Invariant 5: a crash at any instant leaves a library that opens, and nothing in it is lost."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from urza_samples import digest

from esper.urza import Urza

CHILD = Path(__file__).with_name("urza_crash_child.py")


def check(root: Path) -> int:
    """Open what a crash left, check all of it and return the number of audit entries."""
    with Urza(root) as urza:
        urza.verify()
        for blob in root.glob("blobs/??/*"):
            assert digest(blob.read_bytes()) == blob.name, "a blob appears whole or not at all"
        return urza.audit.verify()


@pytest.mark.timeout(300)
def test_a_crash_in_any_state_of_the_disk_loses_nothing(tmp_path: Path) -> None:
    subprocess.run([sys.executable, CHILD, "states", tmp_path], check=True)
    finished, *crashed = sorted(tmp_path.iterdir(), key=lambda path: int(path.name))
    assert check(finished) == 5
    lengths = [check(root) for root in crashed]
    assert lengths == sorted(lengths), "a later crash must leave as much or more"
    assert set(lengths) == {0, 1, 2, 3, 4, 5}
    assert len(crashed) >= 20, "three blobs, a key, a schema and five commits take more steps"


@pytest.mark.timeout(300)
def test_kills_at_random_instants_lose_nothing(tmp_path: Path) -> None:
    chance = random.Random(0)
    acknowledged: list[str] = []
    for round_ in range(5):
        command = [sys.executable, str(CHILD), "forever", str(tmp_path), str(1000 * round_)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            acknowledged.append(child.stdout.readline().strip())
            with pytest.raises(subprocess.TimeoutExpired):
                child.wait(timeout=chance.uniform(0, 0.1))
            child.kill()
            acknowledged += [line.strip() for line in child.stdout if line.endswith("\n")]
        check(tmp_path)
    with Urza(tmp_path) as urza:
        stored = {record.artifact_id for record in urza.kernels()}
    assert stored >= set(acknowledged)
    assert len(stored) - len(acknowledged) <= 5, "at most one kernel a round was in flight"
