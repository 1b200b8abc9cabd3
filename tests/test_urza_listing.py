"""``esper urza list`` shows what a library holds, wherever it lies, and makes none by looking."""

import io
import json
from pathlib import Path

import pytest
from command_line import refusal
from rich.console import Console
from urza_samples import judge, measurement, publish, submit
from urza_servers import served

from esper.cli import main
from esper.contracts import BlueprintRecord, KernelRecord, KernelStatus
from esper.urza import Urza, listing
from esper.urza.access import Tokens
from esper.urza.server import create_app


@pytest.fixture
def library(tmp_path: Path) -> Urza:
    """A kernel that was judged, one that waits, and a blueprint without any."""
    urza = Urza(tmp_path / "library")
    judged = publish(urza, "gated")
    judge(urza, judged, measurement=measurement(12.34, 4096), tags=("small", "fast"))
    publish(urza, "low_rank")
    submit(urza, "norm")
    return urza


def test_tables_for_people(library: Urza) -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    listing.show(library, console)
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    judged, waiting = (record.artifact_id[:12] for record in library.kernels())
    [row] = [line for line in lines if judged in line]
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[1:5] == ["gated", "Linear ?x8 > ?x4 float32", "FAST", "VALIDATED"]
    assert sorted(cells[5].split(", ")) == ["fast", "small"]
    assert cells[6:] == ["12.3 us", f"{library.kernels()[0].risk_score:.2f}"]
    [row] = [line for line in lines if waiting in line]
    assert "PENDING_BENCHMARKING" in row
    assert "3 blueprints" in lines
    assert "2 kernels" in lines
    assert any("norm" in line and "UNVALIDATED" in line for line in lines)


def test_the_same_as_json_from_a_folder_and_from_a_server(
    library: Urza, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(create_app(library, Tokens([]))) as url:
        main(["urza", "list", "--json", "--library", url])
    far = capsys.readouterr().out
    main(["urza", "list", "--json", "--library", str(tmp_path / "library")])
    near = capsys.readouterr().out
    assert near == far
    held = json.loads(near)
    assert [KernelRecord.model_validate(each) for each in held["kernels"]] == library.kernels()
    blueprints = [BlueprintRecord.model_validate(each) for each in held["blueprints"]]
    assert blueprints == library.blueprint_records()
    assert held["kernels"][0]["status"] == KernelStatus.VALIDATED


def test_a_library_that_is_not_there_is_not_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(["urza", "list", "--library", str(tmp_path / "none")], capsys)
    assert said.startswith(f"esper urza: no library at {tmp_path / 'none'}")
    assert list(tmp_path.iterdir()) == []
