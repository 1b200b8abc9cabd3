"""Counts the instructions of short calls with callgrind.

All variants take turns in one process. Importing torch under valgrind is slow, so one process is
quicker than one each; and counts from separate processes differ by 0.4% on ``nn.Linear``, because
their heaps happen to be in different states.

CPython's method cache is the other accident: two classes whose lookups fall into one slot have cost
up to 0.9% more on these models, whichever variant has them, and an A/A row cannot show that, its
classes being the same. The slot depends on a class's version tag, so every round begins with new
ones, and the fewest instructions of all rounds are those without such a collision.
"""

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import nn
from torch.utils.benchmark import Timer

from benchmarks.clocks import Work
from benchmarks.context import ROOT

CALLS = 50  # per count
ROUNDS = 5  # counts per variant
WARM_UP = 60  # calls per variant and round; CPython specializes its bytecode in the first calls
TAGS_SKIPPED = 7  # no power of 2: slots are the exclusive or of a tag and a name


def count(make_works: str, variants: int) -> list[list[float]]:
    """Return the instructions per call of each variant, once per round.

    ``make_works`` is a statement that makes ``works``, the list of variants, in the process that
    counts. Raises ``OSError`` if valgrind is missing or fails.
    """
    setup = f"{make_works}\nfrom benchmarks.instructions import turns\ncalls = turns(works)"
    with _child_environment():
        stats = Timer("next(calls)()", setup=setup).collect_callgrind(
            CALLS, repeats=ROUNDS * (1 + variants), collect_baseline=False, retain_out_file=False
        )
    counts = [one.counts() / CALLS for one in stats]
    return [counts[1 + variant :: 1 + variants] for variant in range(variants)]


def turns(works: Sequence[Work]) -> Iterator[Work]:
    """Return what each call of the statement has to do: rounds of ``CALLS`` calls per variant.

    The ``CALLS`` calls before them, of which the first one begins the round, are not to be counted.
    """

    def begin_round() -> None:
        renew_version_tags()
        for work in (*works,) * WARM_UP:
            work()

    timers_warm_up = itertools.repeat(works[0], min(CALLS, 10))
    not_counted = itertools.repeat(works[0], CALLS - 1)
    one_round = [begin_round, *not_counted, *(work for work in works for _ in range(CALLS))]
    return itertools.chain(timers_warm_up, one_round * ROUNDS)


def renew_version_tags() -> None:
    """Have CPython give ``nn.Module`` and all of its subclasses new version tags."""
    nn.Module._esper_renewed = None  # type: ignore[attr-defined]
    del nn.Module._esper_renewed  # type: ignore[attr-defined]
    for _ in range(TAGS_SKIPPED):
        hasattr(type("", (), {}), "__doc__")  # what is looked up on a class gives it a tag


@contextlib.contextmanager
def _child_environment() -> Iterator[None]:
    """Have torch, which starts ``python``, find this interpreter, and that one this suite."""
    before = dict(os.environ)
    os.environ["PATH"] = _prepended(Path(sys.executable).parent, before.get("PATH"))
    os.environ["PYTHONPATH"] = _prepended(ROOT, before.get("PYTHONPATH"))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _prepended(folder: Path, paths: str | None) -> str:
    return os.pathsep.join([str(folder), *([paths] if paths else [])])
