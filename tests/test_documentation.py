"""The README's example and the quickstart run as they are written."""

import functools
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).parents[1]


def test_the_readmes_example_runs(tmp_path: Path) -> None:
    [source] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    batches = [(torch.rand(32, 64), torch.randint(10, (32,)))] * 3
    loss_fn = functools.partial(cross_entropy, reduction="none")
    scope = {"folder": tmp_path, "train": batches, "held_out": batches, "per_sample_loss": loss_fn}
    exec(compile(source, "README.md", "exec"), scope)
    assert scope["model"].kasmina.step_count == 9
    assert scope["model"].kasmina.epoch == 3
    assert (tmp_path / "library.sqlite").exists()


def test_the_quickstart_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "2"])
    runpy.run_path(str(ROOT / "examples" / "quickstart.py"), run_name="__main__")
    assert "held-out accuracy" in capsys.readouterr().out
