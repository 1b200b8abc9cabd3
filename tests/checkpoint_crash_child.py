"""Children of ``test_checkpoint_crash``: they die in the middle of saving.

``states FOLDER`` saves a first checkpoint and then a second in its place, and forks one child for
every state that the folder passes through on the way; the child that dies by SIGKILL before the
Nth line of ``checkpoint_files.py`` leaves its folder in ``FOLDER/N``. ``forever FOLDER`` saves
until somebody kills it.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import esper
import esper.kasmina.checkpoint_files as checkpoint_files
from esper.kasmina.model import MorphableModel


def numbered(number: int) -> MorphableModel:
    """A model whose every weight is ``number``."""
    model = esper.wrap(nn.Sequential(nn.Linear(64, 64)))
    for parameter in model.parameters():
        nn.init.constant_(parameter, number)
    return model


def save(folder: Path, number: int) -> None:
    esper.save(numbered(number), folder, extra={"number": number})


def before_each_line(act: Callable[[int], None]) -> None:
    """Call ``act(N)`` before the Nth line of ``checkpoint_files.py`` that this process executes."""
    numbers = count(1)

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != checkpoint_files.__file__:
            return None
        if event == "line":
            act(next(numbers))
        return trace

    sys.settrace(trace)


def state(folder: Path) -> list[tuple[str, int, int]]:
    stats = [(path.name, path.stat()) for path in folder.iterdir()]
    return sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)


def lines_after_a_change(folder: Path) -> list[int]:
    """Return the lines before which the folder is in a state that it was not in one line ago."""
    states: list[list[tuple[str, int, int]]] = []
    save(folder, 1)
    before_each_line(lambda _: states.append(state(folder)))
    save(folder, 2)
    sys.settrace(None)
    return [n for n in range(2, len(states) + 1) if states[n - 1] != states[n - 2]]


def die_before(number: int, folder: Path) -> None:
    save(folder, 1)
    child = os.fork()
    if child == 0:
        before_each_line(lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == number else None)
        save(folder, 2)
        os._exit(1)
    if os.waitpid(child, 0)[1] != signal.SIGKILL:
        raise RuntimeError(f"the child that should die before line {number} did not")


def die_in_every_state(root: Path) -> None:
    for number in lines_after_a_change(root / "rehearsal"):
        die_before(number, root / str(number))
    shutil.rmtree(root / "rehearsal")


def save_forever(folder: Path) -> None:
    for number in count(1):
        save(folder, number)
        print(number, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "states":
        die_in_every_state(Path(sys.argv[2]))
    else:
        save_forever(Path(sys.argv[2]))
