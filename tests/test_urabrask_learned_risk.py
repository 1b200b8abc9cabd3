"""A model judges the risk where it is proven better than the rules, and nowhere else."""

import json
import random
from collections.abc import Mapping

import pytest
from test_urabrask_risk import MANIFEST, report
from urabrask_lessons import (
    KNOWN_TO_THE_RULES,
    LEARNABLE,
    NOISE,
    PER_BLUEPRINT,
    lessons,
    needs_xgboost,
)

from esper.contracts import Confidence, RiskSource
from esper.errors import WorkerError
from esper.urabrask import child, learned_risk
from esper.urabrask.assessor import Assessor
from esper.urabrask.chronicle import traits
from esper.urabrask.learned_risk import Traits, learn, predict
from esper.urabrask.risk import Experience, assessed
from esper.worker import Blobs, Header

JUDGED = assessed(report(1e-7), MANIFEST, Experience())
TRAITS = traits(MANIFEST, JUDGED)
REACH = Confidence.HIGH


@needs_xgboost
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("pattern", "wins"), [(LEARNABLE, True), (NOISE, False), (KNOWN_TO_THE_RULES, False)]
)
def test_the_model_wins_where_there_is_something_to_learn(
    pattern: str, wins: bool, seed: int
) -> None:
    comparison, _ = learn(lessons(pattern, seed=seed))
    assert comparison.model_wins is wins, comparison
    assert (comparison.num_outcomes, comparison.num_blueprints) == (300, 60)


@needs_xgboost
def test_designs_that_fail_are_learned_of_other_blueprints() -> None:
    taught = [
        one.model_copy(update={"failed": one.traits.design == "gated"}) for one in lessons(NOISE)
    ]
    comparison, model = learn(taught)
    assert comparison.model_wins
    gated, low_rank, unheard_of = (
        predict(model, Traits(design=design, numbers={})) for design in ("gated", "low_rank", "new")
    )
    assert gated > 0.9
    assert low_rank < 0.1
    assert 0 <= unheard_of <= 1


@needs_xgboost
def test_what_is_known_by_heart_of_a_blueprint_is_no_advantage() -> None:
    """Each blueprint has a fate of its own, and numbers that give it away to who has seen it."""
    chance = random.Random(0)
    fates = [(chance.random(), chance.random() < 0.5) for _ in range(60)]
    told = []
    for number, one in enumerate(lessons(NOISE)):
        mark, failed = fates[number // PER_BLUEPRINT]
        marked = Traits(design="gated", numbers={"mark": mark})
        told.append(one.model_copy(update={"traits": marked, "failed": failed}))
    assert not learn(told)[0].model_wins


@needs_xgboost
def test_a_model_is_xgboosts_own_json_and_the_same_each_time() -> None:
    _, model = learn(lessons(LEARNABLE))
    assert json.loads(model)["learner"]["objective"]["name"] == "binary:logistic"
    assert learn(lessons(LEARNABLE))[1] == model


def test_few_blueprints_cannot_be_held_out() -> None:
    few = lessons(LEARNABLE, count=4 * PER_BLUEPRINT)
    with pytest.raises(ValueError, match="the outcomes are of 4 blueprints, a comparison needs 5"):
        learn(few)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("rare", [0, 1, 9])
def test_few_failures_or_successes_prove_nothing(rare: int, turned: bool) -> None:
    """With 1 failure in 200 outcomes that are noise, the model used to win every fourth time."""
    told = [
        one.model_copy(update={"failed": (number < rare) is not turned})
        for number, one in enumerate(lessons(NOISE, count=200))
    ]
    failures = 200 - rare if turned else rare
    because = f"{failures} of 200 outcomes are failures, a comparison needs 10 failures and 10 succ"
    with pytest.raises(ValueError, match=because):
        learn(told)


class Worker:
    """Calls the handlers of the worker process in this one, and counts."""

    def __init__(self) -> None:
        self.called: list[str] = []

    async def __call__(
        self, method: str, header: Header, blobs: Mapping[str, bytes]
    ) -> tuple[Header, Blobs]:
        self.called.append(method)
        handler = {"learn_risk": child.learn_risk, "predict_risk": child.predict_risk}[method]
        answer, answered = handler(json.loads(json.dumps(header)), dict(blobs))
        return json.loads(json.dumps(answer)), answered


@needs_xgboost
async def test_the_model_judges_once_it_is_proven() -> None:
    worker = Worker()
    assessor = Assessor(worker)
    taught = lessons(LEARNABLE, count=320)

    few = await assessor.assessed(JUDGED, TRAITS, taught[:199], REACH)
    assert (few.risk_by, few.risk_comparison) == (RiskSource.RULES, None)
    assert few.risk_reason == "199 of the 200 outcomes that a model needs are known"
    assert few.risk_score == JUDGED.risk_score
    assert worker.called == []

    risky = Traits(design="gated", numbers={"novelty": 0.9, "size": 0.9, "rules": 0.5})
    proven = await assessor.assessed(JUDGED, risky, taught[:300], REACH)
    assert proven.risk_by is RiskSource.MODEL
    assert proven.risk_reason.startswith("the model predicts held-out outcomes better")
    assert proven.risk_comparison is not None
    assert proven.risk_comparison.model_wins
    assert proven.risk_score > 0.6
    assert proven.conf_level is Confidence.MODERATE
    assert proven.risk_components == JUDGED.risk_components

    await assessor.assessed(JUDGED, risky, taught[:310], REACH)
    assert worker.called == ["learn_risk", "predict_risk", "predict_risk"]
    await assessor.assessed(JUDGED, risky, taught, REACH)
    assert worker.called[3:] == ["learn_risk", "predict_risk"]


@needs_xgboost
async def test_the_rules_judge_where_outcomes_are_noise() -> None:
    found = await Assessor(Worker()).assessed(JUDGED, TRAITS, lessons(NOISE), REACH)
    assert found.risk_by is RiskSource.RULES
    assert found.risk_reason.startswith("the model does not predict held-out outcomes better")
    assert found.risk_comparison is not None
    assert found.risk_score == JUDGED.risk_score


async def test_the_rules_judge_without_xgboost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned_risk, "find_spec", lambda name: None)
    found = await Assessor(Worker()).assessed(JUDGED, TRAITS, lessons(LEARNABLE), REACH)
    assert found.risk_by is RiskSource.RULES
    assert found.risk_reason.startswith("xgboost is not installed")


async def test_the_rules_judge_where_learning_fails(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(*args: object) -> tuple[Header, Blobs]:
        raise WorkerError("no answer within 60 s")

    found = await Assessor(fail).assessed(JUDGED, TRAITS, lessons(LEARNABLE), REACH)
    assert found.risk_by is RiskSource.RULES
    assert found.risk_reason == "learning a model failed"
    assert "no answer within 60 s" in caplog.text


@needs_xgboost
@pytest.mark.parametrize("reach", [Confidence.HIGH, Confidence.MODERATE])
async def test_the_confidence_follows_from_the_risk_of_the_model_not_of_the_rules(
    reach: Confidence,
) -> None:
    doubted = JUDGED.model_copy(update={"risk_score": 0.8, "confidence": Confidence.SPECULATIVE})
    harmless = Traits(design="gated", numbers={"novelty": 0.1, "size": 0.9, "rules": 0.5})
    found = await Assessor(Worker()).assessed(doubted, harmless, lessons(LEARNABLE), reach)
    assert found.risk_by is RiskSource.MODEL
    assert found.risk_score < 0.4
    assert found.confidence is reach


@needs_xgboost
async def test_the_rules_judge_where_the_model_does_not_answer() -> None:
    async def learn_only(
        method: str, header: Header, blobs: Mapping[str, bytes]
    ) -> tuple[Header, Blobs]:
        if method == "predict_risk":
            raise WorkerError("the process ended")
        return await Worker()(method, header, blobs)

    found = await Assessor(learn_only).assessed(JUDGED, TRAITS, lessons(LEARNABLE), REACH)
    assert (found.risk_by, found.risk_score) == (RiskSource.RULES, JUDGED.risk_score)
    assert found.risk_reason == "asking the model failed"
