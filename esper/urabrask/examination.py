"""One candidate on the bench: it is asked, case by case, and its answers are checked."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from esper.config import EvaluatorSettings
from esper.contracts import Contract, Measurement
from esper.urabrask import checks, wire
from esper.urabrask.candidate import Loaded, LoadQuestion, Ran, RunQuestion, Timed, TimeQuestion
from esper.urabrask.checks import Trial
from esper.urabrask.inputs import Case, Draw, cases, draw, generator, perturbed
from esper.urabrask.judge import first_difference
from esper.urabrask.ledger import Ledger, passed
from esper.urabrask.oracle import Oracle, Results
from esper.urabrask.sandbox import AnswerT, Candidate, CandidateError


@dataclass(frozen=True)
class Findings:
    """What is known of a kernel that passed every check."""

    measurement: Measurement
    random_training: bool
    given_bytes: int  # of inputs and parameters, at the measured batch size
    device_name: str


class Examination:
    """Every method may raise ``RejectedError``; the ledger then says why."""

    def __init__(
        self, settings: EvaluatorSettings, oracle: Oracle, candidate: Candidate, ledger: Ledger
    ) -> None:
        self._settings = settings
        self._manifest = oracle.manifest
        self._oracle = oracle
        self._candidate = candidate
        self._ledger = ledger
        self._perturbed = perturbed(oracle.state, oracle.parameters, self._random("parameters"))

    def conduct(self, files: Mapping[str, bytes], loader: str) -> Findings:
        device_name = self._load(files, loader)
        random_training = self._trains_at_random()
        self._repeat(self._try_all(random_training))
        timed = Case(self._settings.timed_batch_size, perturbed=True, training=True)
        given = self._draw(timed, chunk=False)
        return Findings(
            measurement=self._measure(given),
            random_training=random_training,
            given_bytes=self._given_bytes(given),
            device_name=device_name,
        )

    def _load(self, files: Mapping[str, bytes], loader: str) -> str:
        """Return the name of the device that the candidate runs on."""
        question = LoadQuestion(loader=loader, manifest=self._manifest)
        contents = {f"file.{name}": wire.as_tensor(data) for name, data in files.items()}
        loaded, state = self._ask("loads", question, contents, Loaded)
        if name := first_difference(state, _state_tensors(self._oracle.state)):
            self._ledger.reject("loads", f"{name} is not what the artifact's file holds")
        self._ledger.enter(passed("loads", "with the weights that the artifact holds"))
        return loaded.device_name

    def _try_all(self, random_training: bool) -> Trial:
        """Return a trial for a repetition: in evaluation mode, or of machine code, which trains."""
        for case in cases(self._settings.batch_sizes, self._oracle.trains_differently):
            trial = self._try(case, compared=not (case.training and random_training))
            if not case.training or self._manifest.native is not None:
                last = trial
        return last

    def _try(self, case: Case, *, compared: bool) -> Trial:
        given = self._draw(case, chunk=case.perturbed)
        trial = self._run("runs", case, given)
        self._ledger.enter(passed("runs", "forward and backward, without an error"))
        self._ledger.enter(checks.check_output(trial, self._manifest))
        self._ledger.enter(checks.check_unmodified(trial, self._oracle.parameters))
        self._ledger.enter(checks.check_alias(trial))
        reference = self._compute(trial, torch.float64)
        self._ledger.enter(checks.check_finite(trial, reference))
        if compared:
            yardstick = self._compute(trial)
            for check in (checks.check_forward, checks.check_gradients):
                self._ledger.enter(check(trial, reference, yardstick, self._manifest))
        return trial

    def _repeat(self, trial: Trial) -> None:
        again = self._run("deterministic", trial.case, trial.given)
        # On CUDA, sums in a gradient may be taken in any order.
        names = ["out"] if self._manifest.device == "cuda" else list(trial.results)
        self._ledger.enter(checks.check_repeated(trial, again.results, names))

    def _measure(self, given: Draw) -> Measurement:
        question = TimeQuestion(rounds=self._settings.timed_rounds)
        timed, _ = self._ask("benchmark", question, given.tensors(), Timed)
        series = (timed.forward_us, timed.eager_forward_us, timed.forward_backward_us)
        if {len(samples) for samples in series} != {question.rounds}:
            self._ledger.reject("benchmark", f"expected {question.rounds} samples of each latency")
        self._ledger.enter(passed("benchmark", f"measured in {question.rounds} rounds"))
        return Measurement(
            batch_size=given.act.shape[0],
            forward_p50_us=statistics.median(timed.forward_us),
            forward_p99_us=_percentile(timed.forward_us, 0.99),
            forward_backward_p50_us=statistics.median(timed.forward_backward_us),
            eager_forward_p50_us=statistics.median(timed.eager_forward_us),
            memory_bytes=timed.memory_bytes,
        )

    def _trains_at_random(self) -> bool:
        if not self._oracle.trains_differently:
            return False
        case = Case(max(self._settings.batch_sizes), perturbed=True, training=True)
        with self._interpreting():
            return self._oracle.is_random(self._draw(case, chunk=False), self._perturbed)

    def _compute(self, trial: Trial, dtype: torch.dtype | None = None) -> Results:
        with self._interpreting():
            return self._oracle.compute(
                trial.given, trial.state, training=trial.case.training, dtype=dtype
            )

    @contextmanager
    def _interpreting(self) -> Iterator[None]:
        """Operators raise whatever they raise at a graph whose shapes do not fit together."""
        try:
            yield
        except Exception as error:
            self._ledger.reject("graph", f"cannot be interpreted: {type(error).__name__}: {error}")

    def _run(self, check: str, case: Case, given: Draw) -> Trial:
        state = self._perturbed if case.perturbed else self._oracle.state
        tensors = given.tensors() | _state_tensors(state)
        question = RunQuestion(training=case.training)
        ran, results = self._ask(check, question, tensors, Ran, where=f" ({case})")
        return Trial(case, given, state, ran, results)

    def _ask(
        self,
        check: str,
        question: Contract,
        tensors: Mapping[str, Tensor],
        kind: type[AnswerT],
        where: str = "",
    ) -> tuple[AnswerT, Results]:
        """Return the answer; a candidate that does not give one fails ``check``."""
        try:
            return self._candidate.ask(question.model_dump(mode="json"), tensors, kind)
        except CandidateError as error:
            self._ledger.reject(check, f"the kernel {error}{where}")

    def _draw(self, case: Case, *, chunk: bool) -> Draw:
        return draw(self._manifest, case.batch_size, self._random(str(case)), chunk=chunk)

    def _random(self, purpose: str) -> torch.Generator:
        return generator(self._settings.seed, self._manifest.artifact_id, purpose)

    def _given_bytes(self, given: Draw) -> int:
        weights = [self._oracle.state[name] for name in self._oracle.parameters]
        return sum(tensor.nbytes for tensor in (given.inp, given.act, *weights))


def _state_tensors(state: Mapping[str, Tensor]) -> Results:
    return {f"state.{name}": tensor for name, tensor in state.items()}


def _percentile(samples: Sequence[float], fraction: float) -> float:
    return sorted(samples)[math.ceil(fraction * len(samples)) - 1]
