"""The record of an examination: one entry for each check, however many cases it was made on."""

from typing import NoReturn

from esper.contracts import Check

_REASON_LIMIT_CHARS = 1000  # a candidate has a say in some of them


class RejectedError(Exception):
    """A check failed, and the ledger has it; there is nothing more to ask."""


class Ledger:
    def __init__(self) -> None:
        self._checks: dict[str, Check] = {}

    @property
    def checks(self) -> tuple[Check, ...]:
        """All checks in the order in which they were first made; one that failed is the last."""
        return tuple(self._checks.values())

    def enter(self, check: Check) -> None:
        """Record a check, with the largest numbers of all cases; raise if it failed."""
        earlier = self._checks.get(check.name)
        numbers = dict(earlier.numbers) if earlier else {}
        for name, number in check.numbers.items():
            numbers[name] = max(number, numbers.get(name, number))
        if not check.passed:
            self._checks.pop(check.name, None)
        self._checks[check.name] = check.model_copy(update={"numbers": numbers})
        if not check.passed:
            raise RejectedError

    def reject(self, name: str, reason: str) -> NoReturn:
        self.enter(failed(name, reason))
        raise AssertionError("a failed check ends the examination")

    def largest(self, number: str) -> float:
        return max((check.numbers.get(number, 0.0) for check in self.checks), default=0.0)


def passed(name: str, reason: str, **numbers: float) -> Check:
    return Check(name=name, passed=True, reason=reason, numbers=numbers)


def failed(name: str, reason: str, **numbers: float) -> Check:
    return Check(name=name, passed=False, reason=reason[:_REASON_LIMIT_CHARS], numbers=numbers)
