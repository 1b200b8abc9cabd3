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


def check_all(folder: Path, story: str) -> tuple[int, list[int]]:
    """Tell a story, check what each crash left; return the entries of the whole and of the rest."""
    subprocess.run([sys.executable, CHILD, "states", folder, story], check=True)
    finished, *crashed = sorted(folder.iterdir(), key=lambda path: int(path.name))
    return check(finished), [check(root) for root in crashed]


@pytest.mark.timeout(300)
def test_a_crash_in_any_state_of_the_disk_loses_nothing(tmp_path: Path) -> None:
    finished, lengths = check_all(tmp_path, "new")
    assert finished == 9
    assert lengths == sorted(lengths), "a later crash must leave as much or more"
    assert set(lengths) == set(range(10))
    assert len(lengths) >= 24, "four blobs, a key, a schema and nine commits take more steps"


@pytest.mark.timeout(300)
def test_a_crash_while_an_older_library_is_migrated_loses_nothing(tmp_path: Path) -> None:
    finished, lengths = check_all(tmp_path, "older")
    assert finished == 12
    migrated = [length for length in lengths if length >= 11]
    assert migrated == lengths[-len(migrated) :]
    assert set(migrated) == {11, 12}
    assert len(migrated) >= 5, "a migration, a blob and a commit take more steps"


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
