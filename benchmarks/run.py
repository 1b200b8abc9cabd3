"""Runs the benchmark suite: ``python benchmarks/run.py [case ...] [--json PATH]``."""

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # started as a file, not as a module

from benchmarks.cases import CASES
from benchmarks.context import current_context
from benchmarks.gate import WrongResultError
from benchmarks.harness import Plan
from benchmarks.rows import print_context, print_table, write_json

PIPE_WIDTH = 160  # columns, where the output is no terminal


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen cases; a row that misses its target is printed and is no failure."""
    options = _options(arguments)
    torch.set_num_threads(1)
    plan = _plan(options)
    context = current_context(plan.device, plan.seed)
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    print_context(context, console)
    rows = []
    for name in options.cases or CASES:
        try:
            with console.status(f"{name} ..."):
                case_rows = CASES[name](plan, context)
        except WrongResultError as error:
            console.print(f"{name}: not timed, {error}", style="red")
            return 1
        print_table(case_rows, console)
        rows += case_rows
    if options.json is not None:
        write_json(rows, options.json)
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line, and refuse at once what would fail minutes later."""
    parser = argparse.ArgumentParser(prog="run.py", description="Measures what Esper costs.")
    parser.add_argument("cases", nargs="*", metavar="case", help=f"of {', '.join(CASES)}")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows, as a JSON list")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, metavar="N", help="pairs of runs per comparison")
    parser.add_argument("--quick", action="store_true", help="see that it runs; times mean nothing")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.cases if name not in CASES]
    if unknown:
        parser.error(f"unknown case {unknown[0]!r}, expected one of {', '.join(CASES)}")
    if options.rounds is not None and options.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {options.rounds}")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.parent}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no usable GPU")
    return options


def _plan(options: argparse.Namespace) -> Plan:
    quick = options.quick
    return Plan(
        device=torch.device(options.device),
        seed=options.seed,
        rounds=options.rounds or (4 if quick else 100),
        min_sample_ns=1e4 if quick else 2e6,
        count_instructions=options.device == "cpu" and not quick,
    )


if __name__ == "__main__":
    sys.exit(main())
