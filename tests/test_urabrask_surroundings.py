"""What a kernel may leave otherwise than it was is noticed, and reading it changes nothing."""

import json
import types

import pytest
import torch

from esper.urabrask.surroundings import TORCH_RANDOM, Surroundings


def test_reading_changes_nothing() -> None:
    before = Surroundings(())
    Surroundings(())
    assert before.changed() == ()


def test_random_numbers_that_were_drawn_are_noticed() -> None:
    before = Surroundings(())
    torch.rand(1)
    assert before.changed() == (TORCH_RANDOM,)


def test_replaced_functions_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = types.ModuleType("harness")
    harness.judge = lambda: False  # type: ignore[attr-defined]
    before = Surroundings((harness,))
    monkeypatch.setattr(json, "dumps", str)
    harness.judge = lambda: True  # type: ignore[attr-defined]
    harness.new = lambda: True  # type: ignore[attr-defined]
    assert before.changed() == ("json.dumps", "harness.judge")
