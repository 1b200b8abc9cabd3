"""Who judges the risk: a learned model where it is proven better than the rules, else the rules."""

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from esper.contracts import Confidence, RiskComparison, RiskSource, UrabraskValidationReport
from esper.errors import WorkerError
from esper.urabrask import risk
from esper.urabrask.learned_risk import ENOUGH_OUTCOMES, Lesson, Traits
from esper.worker import Blobs, Header

logger = logging.getLogger(__name__)

Call = Callable[[str, Header, Mapping[str, bytes]], Awaitable[tuple[Header, Blobs]]]

_MODEL = "model.json"
_MOST_LESSONS = 2000  # the latest; to write more of them down would keep the trainer waiting
_NEWS = 1.05  # times as many lessons as a model learned from are worth another


@dataclass(frozen=True)
class _Learned:
    num_lessons: int
    reason: str
    comparison: RiskComparison | None = None
    model: bytes | None = None  # None: the rules are to be used


class Assessor:
    """Keeps the model between two kernels. ``call`` asks the evaluator's worker process."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._learned = _Learned(0, "")

    async def assessed(
        self,
        report: UrabraskValidationReport,
        traits: Traits,
        lessons: Sequence[Lesson],
        reach: Confidence,
    ) -> UrabraskValidationReport:
        """Return the report, whose risk is by the rules, with that of the model if it is better.

        ``reach`` limits the confidence, whoever judges.
        """
        learned = await self._up_to_date(lessons)
        source, reason = RiskSource.RULES, learned.reason
        if learned.model is not None:
            asked = {"traits": traits.model_dump(mode="json")}
            try:
                answer, _ = await self._call("predict_risk", asked, {_MODEL: learned.model})
            except WorkerError as error:
                logger.warning("the risk model does not answer: %s", error)
                reason = "asking the model failed"
            else:
                report, source = risk.scored(report, answer["risk"], reach), RiskSource.MODEL
        return report.model_copy(
            update={
                "risk_by": source,
                "risk_reason": reason,
                "risk_comparison": learned.comparison,
            }
        )

    async def _up_to_date(self, lessons: Sequence[Lesson]) -> _Learned:
        if len(lessons) < ENOUGH_OUTCOMES:
            reason = (
                f"{len(lessons)} of the {ENOUGH_OUTCOMES} outcomes that a model needs are known"
            )
            return _Learned(len(lessons), reason)
        if not self._learned.num_lessons <= len(lessons) < _NEWS * self._learned.num_lessons:
            self._learned = await self._learn(lessons)
        return self._learned

    async def _learn(self, lessons: Sequence[Lesson]) -> _Learned:
        latest = [lesson.model_dump(mode="json") for lesson in lessons[-_MOST_LESSONS:]]
        try:
            answer, blobs = await self._call("learn_risk", {"lessons": latest}, {})
        except WorkerError as error:
            logger.warning("no risk model was learned: %s", error)
            return _Learned(len(lessons), "learning a model failed")
        if reason := answer["refusal"]:
            return _Learned(len(lessons), reason)
        comparison = RiskComparison.model_validate(answer["comparison"])
        model = blobs[_MODEL] if comparison.model_wins else None
        return _Learned(len(lessons), _reason(comparison), comparison, model)


def _reason(comparison: RiskComparison) -> str:
    verdict = "predicts" if comparison.model_wins else "does not predict"
    return (
        f"the model {verdict} held-out outcomes better than the rules: "
        f"log loss {comparison.model_log_loss:.3f} against {comparison.rules_log_loss:.3f}, "
        f"standard error of the difference {comparison.standard_error:.3f}, "
        f"{comparison.num_outcomes} outcomes of {comparison.num_blueprints} blueprints"
    )
