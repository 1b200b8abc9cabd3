"""``esper evaluate`` shows the verdict on a folder, and records the one on a kernel by id."""

from pathlib import Path

import pytest
from command_line import refusal
from test_urabrask_evaluator import publish
from urabrask_artifacts import ACT, Artifact, artifact, graph, residual_mlp
from urza_samples import UNKNOWN
from urza_servers import served

from esper.cli import main
from esper.contracts import KernelStatus
from esper.urza import Urza
from esper.urza.access import Tokens
from esper.urza.server import create_app


def written(specimen: Artifact, folder: Path) -> Path:
    manifest, files = specimen
    folder.mkdir()
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_a_folder_is_judged_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, page = written(residual_mlp(), tmp_path / "kernel"), tmp_path / "page.html"
    main(["evaluate", str(folder), "--html", str(page)])
    shown = capsys.readouterr().out
    assert f"kernel {residual_mlp()[0].artifact_id}: VALIDATED" in shown.replace("\n", "")
    assert "second_backward" in shown
    assert "samples/s" in shown
    assert "why by them: without a library there is nothing to learn from" in shown
    html = page.read_text()
    assert html.startswith("<!DOCTYPE html>")
    assert "second_backward" in html


def test_a_kernel_by_id_is_judged_and_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logarithm = graph(("aten.log.default", (ACT,)))
    with Urza(tmp_path) as urza:
        artifact_id = publish(urza, artifact(logarithm, logarithm))
        with pytest.raises(SystemExit) as ended:
            main(["evaluate", artifact_id, "--library", str(tmp_path)])
        assert ended.value.code == 1
        assert urza.kernel(artifact_id).status is KernelStatus.REJECTED
    assert "is not finite in float64" in capsys.readouterr().out


def test_the_library_may_be_behind_a_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("URZA_KEY", str(tmp_path / "library/keys/evaluator.pem"))
    with Urza(tmp_path / "library") as urza, served(create_app(urza, Tokens([]))) as url:
        artifact_id = publish(urza, residual_mlp())
        main(["evaluate", artifact_id, "--library", url])
        assert urza.kernel(artifact_id).status is KernelStatus.VALIDATED
    assert "VALIDATED" in capsys.readouterr().out


@pytest.mark.parametrize(("manifest", "said"), [(None, "No such file"), ("{}", "manifest.json: ")])
def test_what_is_no_artifact_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], manifest: str | None, said: str
) -> None:
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    error = refusal(["evaluate", str(tmp_path)], capsys)
    assert error.startswith("esper evaluate: ")
    assert said in error


def test_a_word_that_names_no_kernel_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = refusal(["evaluate", "zzz"], capsys)
    assert said.startswith("esper evaluate: zzz is neither the id of a kernel")


def test_a_page_that_cannot_be_written_is_said_before_the_work(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", UNKNOWN, "--html", "none/page.html"])
    assert ended.value.code == 2
    assert "argument --html: there is no folder none" in capsys.readouterr().err


def test_a_library_that_is_not_there_is_not_made_by_looking(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (tmp_path / "none", tmp_path):
        said = refusal(["evaluate", UNKNOWN, "--library", str(folder)], capsys)
        assert said == f"esper evaluate: no library at {folder}: it has no library.sqlite"
    assert list(tmp_path.iterdir()) == []
