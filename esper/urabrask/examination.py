"""One candidate on the bench: it is asked, case by case, and its answers are checked."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from esper.config import EvaluatorSettings
from esper.contracts import Check, Contract, Measurement
from esper.urabrask import checks, power, wire
from esper.urabrask.checks import Trial
from esper.urabrask.inputs import (
    Case,
    Draw,
    cases,
    draw,
    generator,
    hidden_cases,
    perturbed,
)
from esper.urabrask.judge import first_difference
from esper.urabrask.ledger import Ledger, passed
from esper.urabrask.measurement import Benchmark, ImplausibleError
from esper.urabrask.oracle import Oracle, Results
from esper.urabrask.questions import (
    Held,
    HoldQuestion,
    Loaded,
    LoadQuestion,
    Prepared,
    PrepareQuestion,
    Ran,
    RunQuestion,
    Timed,
    TimeQuestion,
    freshened,
)
from esper.urabrask.roofline import floor_us
from esper.urabrask.sandbox import AnswerT, BreakoutError, Candidate, CandidateError

_POWER_S = 2.0  # that a kernel runs while its power is measured
_MOST_POWER_ROUNDS = 20_000
_HELD_BATCH = 2
_HOLD_PAIRS = 3
_FEW_CALLS = 4
_MANY_CALLS = (68, 260, 1028)  # further on only if it seems to grow: threads come and go in KiB


@dataclass(frozen=True)
class Findings:
    """What is known of a kernel that passed every check."""

    measurement: Measurement
    decided: bool  # whether the measurement is worth deciding by
    random_training: bool
    given_bytes: int  # of inputs and parameters, at the measured batch size
    device_name: str


class Examination:
    """Every method may raise ``RejectedError``; the ledger then says why."""

    def __init__(
        self,
        settings: EvaluatorSettings,
        oracle: Oracle,
        candidate: Candidate,
        ledger: Ledger,
        hidden_seed: int,
    ) -> None:
        self._settings = settings
        self._manifest = oracle.manifest
        self._oracle = oracle
        self._candidate = candidate
        self._ledger = ledger
        self._hidden_seed = hidden_seed
        self._perturbed = perturbed(oracle.state, oracle.parameters, self._random("parameters"))
        self._random_training = self._trains_at_random()
        self._threads = 0
        self._device = Prepared(device_name="")

    def conduct(self, files: Mapping[str, bytes], loader: str) -> Findings:
        self._load(files, loader)
        tried = self._try_all(cases(self._settings.batch_sizes, self._oracle.trains_differently))
        # What differs in training is tried there, unless it is random.
        training = self._oracle.trains_differently and not self._random_training
        last = next(trial for trial in reversed(tried) if trial.case.training is training)
        self._check_reference(next(trial for trial in tried if trial.case.perturbed))
        self._repeat(tried, last)
        random = self._random("hidden cases", hidden=True)
        flops = self._manifest.flops_per_sample
        self._try_all(hidden_cases(random, flops, training=training))
        self._try_in_other_ways(last)
        self._watch_memory()
        benchmark, given = self._measure()
        taken = self._measure_power(benchmark.measurement(), given)
        self._ask_once_more(last, "after it was timed")
        return Findings(
            measurement=benchmark.measurement().model_copy(update=taken),
            decided=benchmark.decided,
            random_training=self._random_training,
            given_bytes=self._given_bytes(given),
            device_name=self._device.device_name,
        )

    def _load(self, files: Mapping[str, bytes], loader: str) -> None:
        question = PrepareQuestion(device=self._manifest.device)
        self._device, _ = self._ask("loads", question, {}, Prepared)
        self._threads = self._candidate.threads()
        question_ = LoadQuestion(loader=loader, manifest=self._manifest)
        contents = {f"file.{name}": wire.as_tensor(data) for name, data in files.items()}
        loaded, state = self._ask("loads", question_, contents, Loaded)
        if name := first_difference(state, _state_tensors(self._oracle.state)):
            self._ledger.reject("loads", f"{name} is not what the artifact's file holds")
        self._ledger.enter(passed("loads", "with the weights that the artifact holds"))
        self._check_process(loaded.changed, may_draw=False, when="while it was loaded")

    def _try_all(self, tried: Iterable[Case]) -> list[Trial]:
        return [self._try(case) for case in tried]

    def _try(self, case: Case) -> Trial:
        given = self._draw(case, chunk=case.perturbed)
        trial = self._run("runs", case, given)
        self._ledger.enter(passed("runs", "forward and backward, without an error"))
        self._enter(checks.check_output(trial, self._manifest), case)
        self._enter(checks.check_unmodified(trial, self._oracle.parameters), case)
        self._enter(checks.check_bounds(trial), case)
        self._enter(checks.check_alias(trial), case)
        self._check_process(trial.ran.changed, may_draw=self._draws(case), when=str(case))
        reference, yardstick = self._compute(trial, torch.float64), self._compute(trial)
        self._enter(checks.check_finite(trial, reference, yardstick), case)
        if not self._draws(case):
            for check in (checks.check_forward, checks.check_gradients):
                self._enter(check(trial, reference, yardstick, self._manifest), case)
        return trial

    def _check_reference(self, trial: Trial) -> None:
        with self._interpreting():
            fault = self._oracle.gradcheck(trial.given, trial.state)
        if fault:
            self._ledger.reject("gradcheck", f"{fault} ({trial.case})")
        self._ledger.enter(passed("gradcheck", "the reference's gradients are its differences"))

    def _repeat(self, tried: list[Trial], last: Trial) -> None:
        """Ask again what was asked before, with other questions in between."""
        self._ask_once_more(last, "when run again")
        if self._random_training:
            trained = next(trial for trial in reversed(tried) if trial.case.training)
            self._ask_once_more(trained, "when run again with the same random numbers")

    def _ask_once_more(self, trial: Trial, what: str) -> None:
        again = self._run("deterministic", trial.case, trial.given)
        names = self._bitwise_names(trial)
        self._ledger.enter(checks.check_same("deterministic", trial, again.results, names, what))

    def _try_in_other_ways(self, trial: Trial) -> None:
        """Fill fresh memory with nonsense, use memory again, go back twice, run under autocast."""
        names = self._bitwise_names(trial)
        poisoned = self._run("poisoned", trial.case, trial.given, poisoned=True)
        self._ledger.enter(
            checks.check_same(
                "poisoned", trial, poisoned.results, names, "when fresh memory holds nonsense"
            )
        )
        self._try_stale_memory(trial)
        twice = self._run("second_backward", trial.case, trial.given, twice=True)
        gradients = [name for name in names if name.startswith("grad.")]
        self._ledger.enter(checks.check_second_backward(twice, gradients))
        if self._manifest.dtype == "float32":
            self._try_autocast(trial)

    def _try_stale_memory(self, trial: Trial) -> None:
        """Give the same memory other numbers, and the same numbers other parameters."""
        other = self._draw(replace(trial.case, hidden=True), chunk=True)
        for given, state, what in (
            (other, self._perturbed, "other numbers in the memory of the last call"),
            (other, self._oracle.state, "other parameters for the same inputs"),
        ):
            stale = self._run("stateless", trial.case, given, state=state, same_memory=True)
            reference, yardstick = self._compute(stale, torch.float64), self._compute(stale)
            for check in (checks.check_forward, checks.check_gradients):
                found = check(stale, reference, yardstick, self._manifest)
                if not found.passed:
                    self._ledger.reject("stateless", f"{what}: {found.reason}")
        self._ledger.enter(passed("stateless", "nothing is remembered from call to call"))

    def _try_autocast(self, trial: Trial) -> None:
        act, wide_act, grad_out = (
            tensor.bfloat16()
            for tensor in (trial.given.act, trial.given.wide_act, trial.given.grad_out)
        )
        given = Draw(trial.given.inp, wide_act, act, grad_out)
        try:
            with torch.autocast(self._manifest.device, torch.bfloat16):
                yardstick = self._oracle.compute(given, self._perturbed, training=False)
        except Exception:  # whatever operators raise: this graph is not for autocast
            return
        ran = self._run("autocast", trial.case, given, autocast=True)
        reference = self._compute(ran, torch.float64)
        self._ledger.enter(checks.check_autocast(ran, reference, yardstick))

    def _watch_memory(self) -> None:
        given = self._draw(replace(self._timed_case, batch_size=_HELD_BATCH), chunk=False)
        for many in _MANY_CALLS:
            rounds = (many, *(_FEW_CALLS, many) * _HOLD_PAIRS)
            held = [
                self._ask("memory", HoldQuestion(rounds=count), given.tensors(), Held)[0]
                for count in rounds
            ]
            found = checks.check_held(held, _FEW_CALLS, many)
            if found.passed:
                break
        self._ledger.enter(found)

    def _measure(self) -> tuple[Benchmark, Draw]:
        given = self._draw(self._timed_case, chunk=False)
        benchmark = Benchmark(self._settings, self._floor_us(given))
        try:
            benchmark.run(lambda question: self._time(question, given))
        except ImplausibleError as error:
            self._ledger.reject("benchmark", str(error))
        self._ledger.enter(benchmark.check())
        return benchmark, given

    def _floor_us(self, given: Draw) -> float:
        if self._manifest.device == "cpu":
            return 0.0  # there the processor time tells, and caches stay warm
        read_bytes, flops = self._oracle.read_bytes(given), self._oracle.flops(given)
        return floor_us(self._device.ceilings, read_bytes, flops)

    def _measure_power(self, measured: Measurement, given: Draw) -> dict[str, float]:
        """Return nothing where there is no GPU, or none whose energy can be counted."""
        meter = power.energy_meter(self._device.device_uuid)
        if meter is None:
            return {}
        rounds = math.ceil(_POWER_S * 1e6 / measured.forward_backward_p50_us)
        question = HoldQuestion(rounds=min(rounds, _MOST_POWER_ROUNDS))

        def run() -> None:
            self._ask("benchmark", question, given.tensors(), Held)

        samples = question.rounds * measured.batch_size
        taken = power.measure(meter, run, samples, time.monotonic)
        return {} if taken is None else taken.model_dump()

    def _time(self, question: TimeQuestion, given: Draw) -> tuple[Timed, float]:
        tensors = given.tensors() | _state_tensors(self._perturbed)
        before_s = self._candidate.cpu_time_s()
        timed, results = self._ask("benchmark", question, tensors, Timed)
        used_s = self._candidate.cpu_time_s() - before_s
        self._check_process(
            timed.changed, may_draw=self._random_training, when="while it was timed"
        )
        if not self._random_training:
            self._check_timed_output(results, question, given)
        return timed, used_s

    def _check_timed_output(self, results: Results, question: TimeQuestion, given: Draw) -> None:
        """Compare what one of the timed rounds gave, on the input that it had."""
        inp = given.inp
        if inp.is_floating_point():
            inp = inp * freshened(question.kept_round)
        case = replace(self._timed_case, hidden=True)
        ran = Ran(out_type="torch.Tensor", out_device=self._manifest.device)
        as_given = replace(given, inp=inp)
        trial = Trial(case, as_given, self._perturbed, ran, results)
        reference, yardstick = (
            {"out": self._compute(trial, dtype)["out"]} for dtype in (torch.float64, None)
        )
        found = checks.check_forward(trial, reference, yardstick, self._manifest)
        if not found.passed:
            self._ledger.reject("benchmark", f"while it was timed {found.reason}")

    @property
    def _timed_case(self) -> Case:
        return Case(self._settings.timed_batch_size, perturbed=True, training=True)

    def _check_process(self, changed: tuple[str, ...], *, may_draw: bool, when: str) -> None:
        self._ledger.enter(checks.check_surroundings(changed, may_draw=may_draw, when=when))
        now = self._candidate.threads(self._threads)
        self._ledger.enter(checks.check_threads(self._threads, now, when))

    def _draws(self, case: Case) -> bool:
        return case.training and self._random_training

    def _bitwise_names(self, trial: Trial) -> list[str]:
        """On CUDA, sums in a gradient may be taken in any order."""
        return ["out"] if self._manifest.device == "cuda" else list(trial.results)

    def _enter(self, check: Check, case: Case) -> None:
        """What is drawn in secret is different each time; no number in a report may be."""
        hidden = case.hidden and check.passed
        self._ledger.enter(check.model_copy(update={"numbers": {}}) if hidden else check)

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

    def _run(
        self,
        check: str,
        case: Case,
        given: Draw,
        *,
        state: Mapping[str, Tensor] | None = None,
        **how: bool,
    ) -> Trial:
        if state is None:
            state = self._perturbed if case.perturbed else self._oracle.state
        tensors = given.tensors() | _state_tensors(state)
        question = RunQuestion(
            training=case.training, random_seed=self._settings.seed, strided=case.strided, **how
        )
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
            return self._candidate.ask(question, tensors, kind)
        except BreakoutError as error:
            self._ledger.reject("confined", f"the kernel {error}{where}")
        except CandidateError as error:
            self._ledger.reject(check, f"the kernel {error}{where}")

    def _draw(self, case: Case, *, chunk: bool) -> Draw:
        random = self._random(str(case), hidden=case.hidden)
        return draw(self._manifest, case.batch_size, random, chunk=chunk, band=case.band)

    def _random(self, purpose: str, *, hidden: bool = False) -> torch.Generator:
        seed = self._hidden_seed if hidden else self._settings.seed
        return generator(seed, self._manifest.artifact_id, purpose)

    def _given_bytes(self, given: Draw) -> int:
        weights = [self._oracle.state[name] for name in self._oracle.parameters]
        return sum(tensor.nbytes for tensor in (given.inp, given.act, *weights))


def _state_tensors(state: Mapping[str, Tensor]) -> Results:
    return {f"state.{name}": tensor for name, tensor in state.items()}
