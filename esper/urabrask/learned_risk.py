"""A risk model learned from adaptations that ended, and whether it is better than the rules.

Gradient-boosted trees (XGBoost), whose training and prediction belong to the evaluator's worker
process. A model travels in XGBoost's own JSON.
"""

import math
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from esper.contracts import Contract, RiskComparison, Sha256

if TYPE_CHECKING:
    from xgboost import Booster, DMatrix

ENOUGH_OUTCOMES = 200
NUM_FOLDS = 5
ENOUGH_OF_EACH_KIND = 10  # with fewer failures, or successes, the standard error is too small
NOT_INSTALLED = "xgboost is not installed; `pip install 'esper-torch[risk]'` brings it"

_ROUNDS = 60
_PARAMETERS = {
    "objective": "binary:logistic",
    "max_depth": 3,
    "eta": 0.1,
    "min_child_weight": 3,
    "nthread": 1,
    "seed": 0,
    "verbosity": 0,
}
_DESIGN = "design="  # begins the name of a column that is 1 for kernels of that design
_SMALLEST_PROBABILITY = 1e-3
_RIDGE = 1e-2  # keeps the logistic regression finite where the rules part the outcomes perfectly
_NEWTON_STEPS = 25

Floats = npt.NDArray[np.float64]


class Traits(Contract):
    """What is known of a kernel when its risk is judged."""

    design: str
    numbers: dict[str, float]


class Lesson(Contract):
    """One adaptation that ended: what was known of its kernel before, and what came of it."""

    blueprint_id: Sha256
    traits: Traits
    risk_by_rules: float
    failed: bool


def is_available() -> bool:
    return find_spec("xgboost") is not None


def learn(lessons: Sequence[Lesson]) -> tuple[RiskComparison, bytes]:
    """Return the comparison of a model with the rules, and the model of all lessons as JSON.

    Cross-validated: every outcome is predicted by a model, and by rules, that were fitted to other
    blueprints only. The rules' score is no probability; a logistic regression makes it one, fitted
    to the same lessons as the model. Raises ``ValueError`` with fewer blueprints than
    :data:`NUM_FOLDS`, and with fewer failures or successes than :data:`ENOUGH_OF_EACH_KIND`. The
    same lessons give the same answer.
    """
    folds = np.array(_folds([lesson.blueprint_id for lesson in lessons]))
    _check_kinds(lessons)
    failed = np.array([lesson.failed for lesson in lessons], dtype=np.float64)
    rules = np.array([lesson.risk_by_rules for lesson in lessons], dtype=np.float64)
    by_model, by_rules = np.empty(len(lessons)), np.empty(len(lessons))
    for fold in range(NUM_FOLDS):
        held_out = folds == fold
        known = [lesson for lesson, out in zip(lessons, held_out, strict=True) if not out]
        booster = _fit(known)
        unseen = [lesson.traits for lesson, out in zip(lessons, held_out, strict=True) if out]
        by_model[held_out] = _probabilities(booster, unseen)
        by_rules[held_out] = _calibrated(rules[~held_out], failed[~held_out], rules[held_out])
    groups = [lesson.blueprint_id for lesson in lessons]
    comparison = _compare(groups, _log_loss(by_rules, failed), _log_loss(by_model, failed))
    return comparison, bytes(_fit(lessons).save_raw("json"))


def predict(model: bytes, traits: Traits) -> float:
    """Return the probability that an adaptation with such a kernel fails."""
    from xgboost import Booster

    booster = Booster()
    booster.load_model(bytearray(model))
    return float(_probabilities(booster, [traits])[0])


def _check_kinds(lessons: Sequence[Lesson]) -> None:
    failures = sum(lesson.failed for lesson in lessons)
    if min(failures, len(lessons) - failures) < ENOUGH_OF_EACH_KIND:
        raise ValueError(
            f"{failures} of {len(lessons)} outcomes are failures, a comparison needs "
            f"{ENOUGH_OF_EACH_KIND} failures and {ENOUGH_OF_EACH_KIND} successes"
        )


def _folds(blueprint_ids: Sequence[str]) -> list[int]:
    """Return a fold for each; those of a blueprint stay together, the folds are about equal."""
    counts = Counter(blueprint_ids)
    if len(counts) < NUM_FOLDS:
        raise ValueError(
            f"the outcomes are of {len(counts)} blueprints, a comparison needs {NUM_FOLDS}"
        )
    sizes = [0] * NUM_FOLDS
    folds: dict[str, int] = {}
    for blueprint_id, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        folds[blueprint_id] = sizes.index(min(sizes))
        sizes[folds[blueprint_id]] += count
    return [folds[blueprint_id] for blueprint_id in blueprint_ids]


def _fit(lessons: Sequence[Lesson]) -> "Booster":
    import xgboost

    numbers = sorted({name for lesson in lessons for name in lesson.traits.numbers})
    designs = sorted({_DESIGN + lesson.traits.design for lesson in lessons})
    table = _table([lesson.traits for lesson in lessons], [*numbers, *designs])
    table.set_label(np.array([lesson.failed for lesson in lessons], dtype=np.float64))
    return xgboost.train(_PARAMETERS, table, num_boost_round=_ROUNDS)


def _table(traits: Sequence[Traits], columns: Sequence[str]) -> "DMatrix":
    import xgboost

    rows = [[_cell(trait, column) for column in columns] for trait in traits]
    return xgboost.DMatrix(np.array(rows), feature_names=list(columns), nthread=1)


def _cell(traits: Traits, column: str) -> float:
    if column.startswith(_DESIGN):
        return float(column == _DESIGN + traits.design)
    return traits.numbers.get(column, math.nan)


def _probabilities(booster: "Booster", traits: Sequence[Traits]) -> Floats:
    table = _table(traits, booster.feature_names or [])
    return np.asarray(booster.predict(table), dtype=np.float64)


def _calibrated(known: Floats, failed: Floats, unseen: Floats) -> Floats:
    """Return probabilities of ``unseen`` scores by logistic regression on the known ones."""
    design = np.stack((np.ones_like(known), known), 1)
    weights = np.zeros(2)
    for _ in range(_NEWTON_STEPS):
        p = _sigmoid(design @ weights)
        gradient = design.T @ (p - failed) + _RIDGE * weights
        hessian = (design.T * (p * (1 - p))) @ design + _RIDGE * np.eye(2)
        weights -= np.linalg.solve(hessian, gradient)
    return _sigmoid(weights[0] + weights[1] * unseen)


def _sigmoid(x: Floats) -> Floats:
    probabilities: Floats = 0.5 * (1.0 + np.tanh(0.5 * x))
    return probabilities


def _log_loss(probabilities: Floats, failed: Floats) -> Floats:
    p = probabilities.clip(_SMALLEST_PROBABILITY, 1 - _SMALLEST_PROBABILITY)
    loss: Floats = -(failed * np.log(p) + (1 - failed) * np.log(1 - p))
    return loss


def _compare(blueprint_ids: Sequence[str], rules: Floats, model: Floats) -> RiskComparison:
    """Compare in pairs; outcomes of one blueprint are no independent evidence of each other."""
    advantage = rules - model
    excess: Counter[str] = Counter()
    for blueprint_id, difference in zip(blueprint_ids, advantage - advantage.mean(), strict=True):
        excess[blueprint_id] += difference
    clusters = len(excess)
    variance = sum(e**2 for e in excess.values()) * clusters / (clusters - 1) / len(rules) ** 2
    return RiskComparison(
        num_outcomes=len(rules),
        num_blueprints=clusters,
        rules_log_loss=float(rules.mean()),
        model_log_loss=float(model.mean()),
        standard_error=math.sqrt(variance),
    )
