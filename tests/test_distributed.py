"""Runs of several processes: ``esper.distribute`` under DDP and FSDP2, over gloo on the CPU.

The checks are in ``distributed_*.py`` and run within few groups of processes, one after the other;
a test reads what each rank says of its check. A check that failed ends its group.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

TRAINING = [
    "a_whole_life_equals_that_in_one_process",
    "kernels_unknown_to_ddp_would_drift_apart",
    "ddp_variants",
    "statistics_that_kernels_track",
    "a_layer_that_only_some_ranks_run",
    "accumulated_gradients",
    "a_backward_pass_that_raised",
    "held_out_losses_of_all_ranks",
    "followers_have_the_epoch_of_rank_0",
    "a_checkpoint_of_rank_0",
    "models_that_differ_are_refused",
    "ddp_around_kernels_in_place",
    "leaving",
]
LOADING = [
    "a_rank_that_lacks_the_kernel",
    "a_rank_whose_copy_was_tampered_with",
    "a_rank_that_loads_slowly",
    "a_load_that_rank_0_gives_up",
    "moved_by_hand_on_every_rank",
    "seeds_that_moved_apart",
    "numbers_that_are_not_finite_on_one_rank",
    "a_kernel_that_raises_on_one_rank",
]
SHARDED = [
    "fsdp_equals_one_process",
    "fsdp_clipping_and_accumulation",
    "fsdp_goes_on_from_a_full_state_dict",
    "fsdp_in_another_dtype_than_the_kernels",
    "fsdp_refusals",
]
CHECKS = {
    2: [*TRAINING, *LOADING, *SHARDED, "a_rank_that_does_not_come"],
    4: [
        "a_whole_life_equals_that_in_one_process",
        "accumulated_gradients",
        "a_rank_whose_copy_was_tampered_with",
        "a_rank_that_loads_slowly",
        "numbers_that_are_not_finite_on_one_rank",
        "held_out_losses_of_all_ranks",
        "fsdp_equals_one_process",
        "a_rank_that_dies",
    ],
}
TIMEOUT_S = 170  # for each group, also where processes share cores

Outcomes = dict[int, list[dict[str, str]]]  # by number of ranks: what each says of its checks


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Run one group after the other: all at once they would compete for the cores."""
    return {size: _outcomes(size, tmp_path_factory.mktemp(f"of{size}")) for size in CHECKS}


def _outcomes(size: int, folder: Path) -> list[dict[str, str]]:
    child = Path(__file__).parent / "distributed_child.py"
    deadline = time.monotonic() + TIMEOUT_S
    with contextlib.ExitStack() as stack:
        for rank in range(size):
            log = stack.enter_context((folder / f"rank{rank}.log").open("w"))
            process = subprocess.Popen(
                [sys.executable, str(child), str(folder), str(rank), str(size), *CHECKS[size]],
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            stack.callback(_end, process, deadline)
    return [_told_by(folder, rank) for rank in range(size)]


def _end(process: subprocess.Popen[bytes], deadline: float) -> None:
    """Wait for a rank; what it has not told when it is killed is missing in its report."""
    try:
        process.wait(max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _told_by(folder: Path, rank: int) -> dict[str, str]:
    file = folder / f"rank{rank}.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    log = (folder / f"rank{rank}.log").read_text()
    return {"log": log, **dict(json.loads(line) for line in lines)}


@pytest.mark.timeout(2 * TIMEOUT_S)
@pytest.mark.parametrize(
    ("size", "check"), [(size, check) for size, checks in CHECKS.items() for check in checks]
)
def test_several_ranks(outcomes: Outcomes, size: int, check: str) -> None:
    for rank, told in enumerate(outcomes[size]):
        outcome = told.get(check, f"did not get there:\n{told['log']}")
        assert outcome == "passed", f"rank {rank} of {size}: {outcome}"
