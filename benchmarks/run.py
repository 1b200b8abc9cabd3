"""Runs the benchmark suite: ``python benchmarks/run.py [case ...] [--json PATH] [--plots DIR]``."""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.status import Status

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # started as a file, not as a module

from benchmarks.cases import CASES, Case
from benchmarks.context import current_context
from benchmarks.gate import WrongResultError
from benchmarks.harness import Plan, measure
from benchmarks.kernels import Kernels
from benchmarks.plot import write_plots
from benchmarks.rows import Finding, Row, print_context, print_table, write_json

PIPE_WIDTH = 160  # columns, where the output is no terminal


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen cases; a row that misses its target is printed and is no failure."""
    options = _options(arguments)
    torch.set_num_threads(1)
    plan = _plan(options)
    context = current_context(plan.device, plan.seed)
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    print_context(context, console)
    rows: list[Row] = []
    with Kernels(plan.device) as kernels:
        for name in options.cases or CASES:
            try:
                with console.status(f"{name} ...") as status:
                    findings = run_case(CASES[name], plan, kernels, status)
            except WrongResultError as error:
                console.print(f"{name}: not timed, {error}", style="red")
                return 1
            case_rows = [Row(case=name, context=context, **dict(found)) for found in findings]
            if case_rows:  # not where what the case needs is missing
                print_table(case_rows, console)
            rows += case_rows
    if options.json is not None:
        write_json(rows, options.json)
    if options.plots is not None:
        for path in write_plots(rows, options.plots):
            console.print(f"wrote {path}")
    return 0


def run_case(case: Case, plan: Plan, kernels: Kernels, status: Status) -> list[Finding]:
    """Check all trials of a case, and only then time them."""
    rng = np.random.default_rng(plan.seed)
    trials = case.trials(plan, kernels)
    for number, trial in enumerate(trials, 1):
        status.update(f"checking {number} of {len(trials)}: {trial.name}")
        trial.check()
    findings: list[Finding] = []
    for number, trial in enumerate(trials, 1):
        status.update(f"timing {number} of {len(trials)}: {trial.name}")
        findings += trial.report(measure(trial, plan, rng))
    return [*findings, *case.samples(plan, kernels), *case.counts(plan)]


def _options(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line, and refuse at once what would fail minutes later."""
    parser = argparse.ArgumentParser(prog="run.py", description="Measures what Esper costs.")
    parser.add_argument("cases", nargs="*", metavar="case", help=f"of {', '.join(CASES)}")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows, as a JSON list")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw the rows, as PNG files")
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
    if options.plots is not None and find_spec("matplotlib") is None:
        parser.error("--plots needs matplotlib, which is not installed")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no usable GPU")
    return options


def _plan(options: argparse.Namespace) -> Plan:
    quick = options.quick
    return Plan(
        device=torch.device(options.device),
        seed=options.seed,
        rounds=options.rounds or (2 if quick else 100),
        trial_s=0.0 if quick else 4.0,
        min_sample_ns=1e4 if quick else 2e6,
        quick=quick,
    )


if __name__ == "__main__":
    sys.exit(main())
