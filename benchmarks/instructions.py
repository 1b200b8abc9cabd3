"""Counts the instructions of short calls with callgrind.

All variants take turns in one process. Importing torch under valgrind is slow, so one process is
quicker than one each; and counts from separate processes differ by 0.4% on ``nn.Linear``, because
their heaps happen to be in different states.

What remains is CPython's method cache: two classes whose lookups fall into one slot cost up to
0.9% more on these models, whichever variant has them. An A/A row cannot show that, its classes
being the same.
"""

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch.utils.benchmark import Timer

from benchmarks.clocks import Work
from benchmarks.context import ROOT

CALLS = 50  # per count
ROUNDS = 3  # counts per variant
WARM_UP = 100  # calls per variant; CPython specializes its bytecode in the first calls


def count(make_works: str, variants: int) -> list[list[float]]:
    """Return the instructions per call of each variant, once per round.

    ``make_works`` is a statement that makes ``works``, the list of variants, in the process that
    counts. Raises ``OSError`` if valgrind is missing or fails.
    """
    setup = f"{make_works}\nfrom benchmarks.instructions import turns\ncalls = turns(works)"
    with _child_environment():
        stats = Timer("next(calls)()", setup=setup).collect_callgrind(
            CALLS, repeats=ROUNDS * variants, collect_baseline=False, retain_out_file=False
        )
    counts = [one.counts() / CALLS for one in stats]
    return [counts[variant::variants] for variant in range(variants)]


def turns(works: Sequence[Work]) -> Iterator[Work]:
    """Return what each call of the statement has to do: rounds of ``CALLS`` calls per variant."""
    for work in (*works,) * WARM_UP:
        work()
    timers_warm_up = itertools.repeat(works[0], min(CALLS, 10))
    blocks = (itertools.repeat(work, CALLS) for _ in range(ROUNDS) for work in works)
    return itertools.chain(timers_warm_up, *blocks)


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
