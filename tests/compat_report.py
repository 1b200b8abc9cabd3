"""Print what works under Esper, module type by module type and model family by family.

``python tests/compat_report.py`` runs the checks of compat_checks.py, prints the tables, and writes
them between the markers of docs/compatibility.md. Module types or families as arguments restrict
it to them, and the document stays as it is. Exits with 1 if a check failed. Uses all cores.
"""

import logging
import multiprocessing
import sys
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from compat_cases import FAMILIES, NO_SEEDS, Case, family_case, module_cases, module_names
from compat_checks import CHECKS, FAILED, verdict

from esper.kasmina.site_types import site_type

DOCUMENT = Path(__file__).parents[1] / "docs" / "compatibility.md"
Row = list[str]


def module_row(name: str) -> Row:
    cases = module_cases(name)
    return [name, _seeds(cases[0]), *(verdict(check, cases) for check in CHECKS.values())]


def family_row(name: str) -> Row:
    case = family_case(name)
    return [name, FAMILIES[name].kind, *(verdict(check, [case]) for check in CHECKS.values())]


def _seeds(case: Case) -> str:
    kind = site_type(case.build().get_submodule(case.seeded))
    if kind is None:
        return f"no: {case.no_seeds}"
    return "by default" if kind.by_default else "by name"


def table(header: Row, rows: Iterable[Row]) -> str:
    """Return a Markdown table in which a reason that a row repeats is given once."""
    lines = [_line([*header, *CHECKS]), _line(["---"] * (len(header) + len(CHECKS)))]
    for row in rows:
        reasons = {f"no: {NO_SEEDS.get(row[0])}"}
        lines.append(_line([*row[:2], *("no" if cell in reasons else cell for cell in row[2:])]))
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write(tables: dict[str, str]) -> None:
    """Put each table between its markers in the document."""
    text = DOCUMENT.read_text()
    for name, content in tables.items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}{content}\n{end}{after}"
    DOCUMENT.write_text(text)


def quieten() -> None:
    logging.disable(logging.WARNING)  # Esper's, of kernels that no optimizer moves
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def main(names: list[str]) -> int:
    quieten()
    modules = [name for name in module_names() if name in names or not names]
    families = [name for name in FAMILIES if name in names or not names]
    # A fork of a process that has used OpenMP hangs.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(mp_context=context, initializer=quieten) as pool:
        tables = {
            "modules": table(["module", "carries seeds"], pool.map(module_row, modules)),
            "families": table(["family", "kind"], pool.map(family_row, families)),
        }
    for content in tables.values():
        print(content, end="\n\n")
    if not names:
        write(tables)
    return int(any(FAILED in content for content in tables.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
