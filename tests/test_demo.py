"""The main job from its command line, shortened: what it leaves behind, and that it repeats."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import refusal

from esper import cli
from esper.contracts import KernelStatus, SeedState
from esper.demo import load_digits
from esper.nissa.journal import JOURNAL, JournalReader
from esper.nissa.record import RunRecord
from esper.tolaria import Tolaria
from esper.urza import Urza

EPOCHS = 40


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of the same command; the second finds the first one's folder and keeps off it."""
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-m", "esper", "demo", "--seed", "3", "--with-bad-blueprint"]
    command += ["--epochs", str(EPOCHS), "--runs", str(folder)]
    for _ in range(2):
        subprocess.run(command, check=True, capture_output=True, timeout=280)
    return [folder / "demo", folder / "demo-2"]


@pytest.fixture(scope="module")
def record(runs: list[Path]) -> RunRecord:
    return RunRecord.from_json((runs[0] / "run.json").read_text())


@pytest.mark.timeout(300)
def test_two_runs_give_the_same_numbers(runs: list[Path]) -> None:
    first, second = (RunRecord.from_json((run / "run.json").read_text()) for run in runs)
    assert first.step_losses == second.step_losses
    assert first.epochs == second.epochs
    assert first.lifecycle == second.lifecycle
    assert first.alphas == second.alphas
    assert first.results == second.results


def test_a_seed_grew_and_was_judged(record: RunRecord) -> None:
    reached = {event.target for event in record.lifecycle}
    assert {SeedState.TRAINING, SeedState.GRAFTING, SeedState.EVALUATING} <= reached
    assert reached & {SeedState.FINE_TUNING, SeedState.CULLED}
    alphas = [alpha for series in record.alphas for _, alpha in series.points]
    assert min(alphas) == 0.0
    assert max(alphas) == 1.0
    assert any(0 < alpha < 1 for alpha in alphas)
    evaluated = [e for event in record.epochs for e in event.evaluations]
    assert evaluated
    assert all(e.num_samples == 359 for e in evaluated)


def test_the_bad_blueprint_was_rejected_and_never_loaded(record: RunRecord) -> None:
    status = {}
    for entry in record.kernels:
        status.setdefault(entry.kernel.manifest.design.name, set()).add(entry.kernel.status)
    assert status.pop("exploding") == {KernelStatus.REJECTED}
    assert set.union(*status.values()) == {KernelStatus.VALIDATED}
    rejected = {
        entry.kernel.artifact_id
        for entry in record.kernels
        if entry.kernel.status is KernelStatus.REJECTED
    }
    assert not rejected & {event.artifact_id for event in record.lifecycle}


def test_the_table_compares_three_networks(record: RunRecord) -> None:
    narrow, grown, static = record.results
    assert narrow.parameters == 330
    kept = [report for report in record.field_reports if report.outcome == "FOSSILIZED"]
    in_place = sum(seed.parameters for layer in record.after for seed in layer.seeds)
    assert grown.parameters == 330 + in_place
    assert sum(report.num_parameters for report in kept) <= in_place
    assert static.parameters >= grown.parameters
    assert grown.training_flops > narrow.training_flops
    # Guessing is right once in ten times.
    assert all(row.test_accuracy > 0.5 for row in record.results)


def test_the_report_is_one_readable_page(runs: list[Path], record: RunRecord) -> None:
    page = (runs[0] / "report.html").read_text()
    assert "src=" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    for row in record.results:
        assert row.label in page
        assert f"{row.test_accuracy:.2%}".replace("%", "").strip() in page


def test_the_journal_holds_what_the_record_does(
    runs: list[Path], record: RunRecord, tmp_path: Path
) -> None:
    shutil.copy(runs[0] / JOURNAL, tmp_path)
    live = JournalReader(tmp_path).record()
    assert live is not None
    assert live.step_losses == record.step_losses
    assert live.epochs == record.epochs
    assert live.lifecycle == record.lifecycle
    assert live.alphas == record.alphas
    assert live.kernels == record.kernels
    assert live.field_reports == record.field_reports
    assert not live.finished


def test_library_lineage_and_audit_agree(runs: list[Path], record: RunRecord) -> None:
    lineage = json.loads((runs[0] / "lineage.json").read_text())
    kernels = {node["id"] for node in lineage["nodes"] if node["kind"] == "kernel"}
    assert {entry.kernel.artifact_id for entry in record.kernels} == kernels
    lines = [json.loads(line) for line in (runs[0] / "audit.jsonl").read_text().splitlines()]
    moves = [line for line in lines if line["event"] == "seed.lifecycle"]
    assert len(moves) == len(record.lifecycle)
    assert lines[-1]["hash"] == record.audit_head
    with Urza(runs[0] / "urza") as urza:
        urza.verify()


def test_the_evolved_model_is_an_exported_program(runs: list[Path], record: RunRecord) -> None:
    images, labels = load_digits().test
    program = torch.export.load(runs[0] / "evolved.pt2").module()
    accuracy = float((program(images).argmax(1) == labels).double().mean())
    assert accuracy == pytest.approx(record.results[1].test_accuracy)


def test_ctrl_c_leaves_a_record_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = Tolaria.fit

    def fit_two_epochs(tolaria: Tolaria, epochs: int) -> None:
        fit(tolaria, 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(Tolaria, "fit", fit_two_epochs)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--runs", str(tmp_path), "--free-running"])
    assert stop.value.code == 130
    assert capsys.readouterr().out.splitlines()[-1].startswith("Interrupted; what there was is in")
    record = RunRecord.from_json((tmp_path / "demo" / "run.json").read_text())
    assert (len(record.epochs), record.finished, record.interrupted) == (2, False, True)
    assert "--epochs 600" in record.command
    assert "This run was interrupted." in (tmp_path / "demo" / "report.html").read_text()


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--lr", "-1", "must be a number above 0, got '-1'"),
        ("--lr", "nan", "must be a number above 0, got 'nan'"),
        ("--epochs", "0", "must be a whole number of at least 1, got '0'"),
        ("--epochs", "-1", "must be a whole number of at least 1, got '-1'"),
        ("--name", "../x", "must be the name of one folder, got '../x'"),
        ("--name", "a/b", "must be the name of one folder, got 'a/b'"),
        ("--name", "..", "must be the name of one folder, got '..'"),
    ],
)
def test_impossible_options_are_refused(
    option: str, value: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", f"{option}={value}"])
    assert stop.value.code == 2
    assert f"argument {option}: {complaint}" in capsys.readouterr().err


def test_a_missing_extra_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    said = refusal(["demo", "--runs", str(tmp_path)], capsys)
    assert "pip install 'esper-torch[demo]'" in said
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert refusal(["demo", "--runs", str(tmp_path / "file")], capsys).startswith("esper demo: ")


def test_the_split_is_fixed_and_disjoint() -> None:
    digits, again = load_digits(), load_digits()
    assert [len(part[1]) for part in (digits.train, digits.validation, digits.test)] == [
        1078,
        359,
        360,
    ]
    assert torch.equal(digits.train[0], again.train[0])
    everything = torch.cat([digits.train[0], digits.validation[0], digits.test[0]])
    assert len(everything) == 1797
