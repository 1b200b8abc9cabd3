"""Children of ``test_urza_crash``: they die in the middle of using a library.

``states FOLDER STORY`` tells a story that writes everything a library can hold, and forks one child for
every state that the disk passes through on the way; the child that dies by SIGKILL before the Nth
line of ``esper/urza`` leaves its library in ``FOLDER/N``. ``forever ROOT START`` publishes until
somebody kills it, and prints the id of each kernel once it is stored.
"""

import os
import signal
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

from urza_first_library import make_first_library
from urza_samples import blueprint, field_report, graph, judge, publish, submit

import esper.urza
import esper.urza.migrations  # now, or only the first child would execute its lines
from esper.contracts import BlueprintStatus
from esper.urza import Urza

OURS = str(Path(esper.urza.__file__).parent)


def new_library(root: Path) -> None:
    with Urza(root) as urza:
        blueprint_id = submit(urza)
        urza.set_interest(blueprint_id, "tamiyo", 1.0)
        urza.claim_blueprint("forge", lease_s=600)
        artifact_id = publish(urza)
        urza.set_blueprint_status(blueprint_id, BlueprintStatus.COMPILED, owner="forge")
        judge(urza, artifact_id)
        told = field_report(artifact_id)
        urza.record_field_report(told)
        urza.archive(artifact_id)
        urza.submit_blueprint(blueprint("gated"), graph("gated"), evolved_from=[told.digest()])


def older_library(root: Path) -> None:
    make_first_library(root)
    with Urza(root) as urza:
        submit(urza, "new")


STORIES = {"new": new_library, "older": older_library}


def before_each_line(act: Callable[[int], None]) -> None:
    """Call ``act(N)`` before the Nth line of ``esper/urza`` that this process executes."""
    numbers = count(1)

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        if event == "line":
            act(next(numbers))
        return trace

    sys.settrace(trace)


def state(root: Path) -> list[tuple[str, int, int]]:
    """What a crash would leave; not the index of the WAL, which is rebuilt from it."""
    found = [path for path in root.rglob("*") if not path.name.endswith("-shm")]
    return sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in found)


def lines_after_a_change(root: Path, story: Callable[[Path], None]) -> list[int]:
    """Return the lines before which the disk is in a state that it was not in one line ago."""
    states: list[list[tuple[str, int, int]]] = []
    before_each_line(lambda _: states.append(state(root)))
    story(root)
    sys.settrace(None)
    return [n for n in range(2, len(states) + 1) if states[n - 1] != states[n - 2]]


def die_before(number: int, root: Path, story: Callable[[Path], None]) -> None:
    child = os.fork()
    if child == 0:
        before_each_line(lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == number else None)
        story(root)
        os._exit(1)
    if os.waitpid(child, 0)[1] != signal.SIGKILL:
        raise RuntimeError(f"the child that should die before line {number} did not")


def die_in_every_state(folder: Path, story: Callable[[Path], None]) -> None:
    for number in lines_after_a_change(folder / "0", story):
        die_before(number, folder / str(number), story)


def publish_forever(root: Path, start: int) -> None:
    with Urza(root) as urza:
        for number in count(start):
            print(publish(urza, f"design{number}"), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "states":
        die_in_every_state(Path(sys.argv[2]), STORIES[sys.argv[3]])
    else:
        publish_forever(Path(sys.argv[2]), int(sys.argv[3]))
