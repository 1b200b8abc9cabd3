"""What is made anew, and when: pure decisions."""

from typing import Any

import pytest

from esper.config import ForgeSettings
from esper.contracts import ForgeStatus, Pipeline, RecompilationProspect
from esper.tezzeret.priority import has_budget, is_idle, recompilations

FAST, STANDARD, AGGRESSIVE = Pipeline
SETTINGS = ForgeSettings(
    aggressive_interest=2.0,
    max_recompilations_per_day=3,
    max_recompilation_cpu_s_per_day=10.0,
    max_load_per_core=0.5,
)


def prospect(
    name: str,
    *tried: Pipeline,
    tamiyo: float = 0.0,
    urabrask: float = 0.0,
    rejected: bool = False,
) -> RecompilationProspect:
    return RecompilationProspect(
        blueprint_id=name * 64,
        tamiyo_interest=tamiyo,
        urabrask_interest=urabrask,
        rejected=rejected,
        tried=frozenset(tried),
    )


def chosen(*prospects: RecompilationProspect, available: tuple[Pipeline, ...] = tuple(Pipeline)):
    wishes = recompilations(prospects, available, SETTINGS)
    return [(wish.blueprint_id[0], wish.pipeline) for wish in wishes]


def test_interest_comes_before_failures_and_failures_before_old_toolchains() -> None:
    assert chosen(
        prospect("a"),
        prospect("b", FAST, rejected=True),
        prospect("c", FAST, tamiyo=2.0),
        prospect("d", FAST, tamiyo=3.0),
        prospect("e", FAST, urabrask=0.5),
        prospect("f"),
        prospect("0", FAST, tamiyo=1.9),
    ) == [
        ("d", AGGRESSIVE),
        ("c", AGGRESSIVE),
        ("e", STANDARD),
        ("b", STANDARD),
        ("a", FAST),
        ("f", FAST),
    ]


def test_what_was_tried_is_not_tried_again() -> None:
    assert chosen(prospect("a", FAST, AGGRESSIVE, tamiyo=9.0, rejected=True)) == [("a", STANDARD)]
    assert chosen(prospect("a", *Pipeline, tamiyo=9.0, urabrask=1.0, rejected=True)) == []


def test_only_pipelines_that_are_there_are_chosen() -> None:
    wanted = prospect("a", tamiyo=9.0, rejected=True)
    assert chosen(wanted, available=(FAST,)) == [("a", FAST)]
    assert chosen(wanted, available=()) == []


@pytest.mark.parametrize(
    ("why", "reason"),
    [
        ({"tamiyo": 2.5}, "the controller's interest is 2.5"),
        ({"urabrask": 0.5}, "the evaluator's interest is 0.5"),
        ({"urabrask": 0.5, "rejected": True}, "its kernels failed their validation"),
    ],
)
def test_reasons_are_told(why: dict[str, Any], reason: str) -> None:
    [wish] = recompilations([prospect("a", FAST, **why)], Pipeline, SETTINGS)
    assert wish.reason == reason


@pytest.mark.parametrize(
    ("count", "cpu_s", "allowed"), [(2, 9.9, True), (3, 0.0, False), (0, 10.0, False)]
)
def test_the_daily_budget(count: int, cpu_s: float, allowed: bool) -> None:
    status = ForgeStatus(
        blueprints={},
        kernels={},
        leases=(),
        waiting_blueprints=0,
        compiling_blueprints=0,
        waiting_kernels=0,
        evaluating_kernels=0,
        window_s=3600,
        compiled={},
        failed=0,
        throughput_per_hour=0,
        utilisation=0,
        recompilations_today=count,
        recompilation_cpu_s_today=cpu_s,
    )
    assert has_budget(status, SETTINGS) is allowed


def test_a_machine_is_idle_by_its_load_for_each_core() -> None:
    assert is_idle(2.0, 4, SETTINGS)
    assert not is_idle(2.1, 4, SETTINGS)
