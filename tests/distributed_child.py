"""One rank of tests/test_distributed.py: runs the checks that it is told, and writes what came of it.

python distributed_child.py FOLDER RANK SIZE CHECK...
"""

import json
import os
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import distributed_loading  # noqa: F401 - registers its checks
import distributed_sharded  # noqa: F401
import distributed_training  # noqa: F401
import pytest
import torch
import torch.distributed as dist
from distributed_parts import CHECKS, Library, check, wrapped

import esper
from esper.errors import DistributedError


@check
def a_rank_that_dies(folder: Path) -> None:
    model = esper.distribute(wrapped(Library()), timeout=timedelta(seconds=20))
    for _ in range(3):
        model.step()
    if dist.get_rank() == dist.get_world_size() - 1:
        report(folder, "a_rank_that_dies", "passed")
        os._exit(0)
    with pytest.raises(DistributedError, match=r"lost the others while agreeing: a rank is gone"):
        model.step()


@check
def a_rank_that_does_not_come(folder: Path) -> None:
    model = esper.distribute(wrapped(Library()), timeout=timedelta(seconds=2))
    model.step()
    if dist.get_rank() == 0:
        told = [folder / f"rank{rank}.told" for rank in range(1, dist.get_world_size())]
        deadline = time.monotonic() + 30
        while not all(file.exists() for file in told) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert all(file.exists() for file in told)
        return
    with pytest.raises(DistributedError, match=r"did not come within 2 s: .*[Tt]imed out"):
        model.step()
    (folder / f"rank{dist.get_rank()}.told").touch()


def report(folder: Path, name: str, outcome: str) -> None:
    with (folder / f"rank{sys.argv[2]}.jsonl").open("a") as file:
        file.write(json.dumps([name, outcome]) + "\n")


def main() -> None:
    folder, rank, size, *names = sys.argv[1:]
    torch.set_num_threads(1)
    warnings.simplefilter("error", UserWarning)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=int(rank),
        world_size=int(size),
        timeout=timedelta(seconds=30),
    )
    for name in names:
        try:
            CHECKS[name](Path(folder))
        except BaseException:
            report(Path(folder), name, traceback.format_exc())
            os._exit(1)  # the others' collectives no longer fit ours
        report(Path(folder), name, "passed")
    os._exit(0)


if __name__ == "__main__":
    main()
