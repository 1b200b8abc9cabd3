"""Outcomes of adaptations, with a pattern or without, for the tests of the learned risk model."""

import hashlib
import random
from importlib.util import find_spec

import pytest

from esper.urabrask.learned_risk import Lesson, Traits

needs_xgboost = pytest.mark.skipif(find_spec("xgboost") is None, reason="xgboost is not installed")

PER_BLUEPRINT = 5
LEARNABLE, NOISE, KNOWN_TO_THE_RULES = "learnable", "noise", "known to the rules"


def lesson(number: int, chance: random.Random, pattern: str) -> Lesson:
    """Kernels that are both new and large fail, or those that the rules say, or any."""
    risk_by_rules, novelty, size = chance.random(), chance.random(), chance.random()
    likely = {
        LEARNABLE: 0.9 if (novelty > 0.5) == (size > 0.5) else 0.1,
        NOISE: 0.7,
        KNOWN_TO_THE_RULES: risk_by_rules,
    }[pattern]
    return Lesson(
        blueprint_id=hashlib.sha256(b"%d" % (number // PER_BLUEPRINT)).hexdigest(),
        traits=Traits(
            design=chance.choice(("low_rank", "gated")),
            numbers={"novelty": novelty, "size": size, "rules": risk_by_rules},
        ),
        risk_by_rules=risk_by_rules,
        failed=chance.random() < likely,
    )


def lessons(pattern: str, count: int = 300, seed: int = 0) -> list[Lesson]:
    chance = random.Random(seed)
    return [lesson(number, chance, pattern) for number in range(count)]
