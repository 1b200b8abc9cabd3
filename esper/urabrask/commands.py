"""``esper evaluate``: judge a kernel, and show the report to people.

By id the kernel comes from a library, and the signed verdict is recorded there, as the pipeline
does. A path names a folder with ``manifest.json`` and the files that it names; that verdict is
shown and kept nowhere.
"""

import argparse
import asyncio
import os
import re
import sys
from contextlib import closing
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console

import esper.command_line as command_line
from esper.config import EvaluatorSettings
from esper.contracts import KernelManifest, KernelStatus, UrabraskValidationReport
from esper.errors import ArtifactError, ArtifactNotFoundError, EsperError
from esper.urabrask import risk
from esper.urabrask.evaluator import Urabrask
from esper.urabrask.gauntlet import Gauntlet
from esper.urabrask.presentation import show
from esper.urabrask.risk import Experience
from esper.urabrask.sandbox import Sandbox
from esper.urabrask.turn import device_to_itself
from esper.urza import connect

_ID = re.compile(r"[0-9a-f]{64}")
_WIDTH_IN_HTML = 140


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kernel", help="id of a kernel in the library, or folder of an artifact")
    parser.add_argument(
        "--library",
        help="folder of the library, or URL of its server, for an id (default: $URZA_API_URL, else "
        "where $URZA_URL and $URZA_BLOBS say)",
    )
    parser.add_argument("--html", type=_page, help="write the report as an HTML page, too")


def main(options: argparse.Namespace) -> None:
    """Print the report. Exit status 0 for VALIDATED, 1 for another verdict, 2 for none."""
    try:
        report = _evaluate(options)
        show(report, Console())
        if options.html is not None:
            _save_html(report, options.html)
    except (EsperError, ValueError, OSError) as error:
        command_line.refuse("evaluate", error)
    if report.status is not KernelStatus.VALIDATED:
        sys.exit(1)


def _save_html(report: UrabraskValidationReport, path: Path) -> None:
    with Path(os.devnull).open("w") as nowhere:
        page = Console(record=True, width=_WIDTH_IN_HTML, file=nowhere, force_terminal=True)
        show(report, page)
        page.save_html(str(path))


def _page(text: str) -> Path:
    if not (path := Path(text)).parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path


def _evaluate(options: argparse.Namespace) -> UrabraskValidationReport:
    if _ID.fullmatch(options.kernel):
        return asyncio.run(_evaluate_in_library(options.kernel, options.library))
    manifest, files = read_artifact(Path(options.kernel))
    return asyncio.run(_evaluate_alone(manifest, files))


async def _evaluate_in_library(artifact_id: str, place: str | None) -> UrabraskValidationReport:
    with closing(connect(place, create=False)) as urza:
        device = urza.kernel(artifact_id).manifest.device
        async with device_to_itself(device), Urabrask(urza, device=device) as urabrask:
            return await urabrask.evaluate(artifact_id)


async def _evaluate_alone(
    manifest: KernelManifest, files: dict[str, bytes]
) -> UrabraskValidationReport:
    settings = EvaluatorSettings()
    async with device_to_itself(manifest.device):
        with Sandbox() as sandbox:
            report = Gauntlet(settings, sandbox).run(manifest, files)
    reason = {"risk_reason": "without a library there is nothing to learn from"}
    return risk.assessed(report, manifest, Experience()).model_copy(update=reason)


def read_artifact(folder: Path) -> tuple[KernelManifest, dict[str, bytes]]:
    """Read ``manifest.json`` and the files that it names."""
    if not folder.is_dir():
        raise ArtifactNotFoundError(
            f"{folder} is neither the id of a kernel, 64 lowercase hexadecimal digits, nor the "
            "folder of an artifact"
        )
    try:
        manifest = KernelManifest.model_validate_json((folder / "manifest.json").read_bytes())
    except ValidationError as error:
        raise ArtifactError(f"{folder / 'manifest.json'}: {error}") from None
    # Only the last part of a name: a manifest does not reach outside of its folder.
    return manifest, {name: (folder / Path(name).name).read_bytes() for name in manifest.files}
