"""What the library keeps for forges and evaluators: leases of kernels, and an account of attempts."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from urza_backends import Place
from urza_samples import UNKNOWN, blueprint, judge, manifest, publish, submit

from esper.contracts import BlueprintStatus, Compilation, KernelStatus, Pipeline
from esper.errors import ArtifactNotFoundError, LeaseError
from esper.urza import Urza

UNVALIDATED, COMPILING, COMPILED, INVALID = BlueprintStatus
FAST, STANDARD, AGGRESSIVE = Pipeline
LONG_S = 3600.0
HERE = {"device": "cpu", "torch_version": "2.13"}


def expire(place: Place) -> None:
    place.execute("UPDATE kernel_leases SET expires_at = 1")


def compilation(name: str = "low_rank", *, failed: bool = False, **changes: object) -> Compilation:
    fields = {
        "blueprint_id": blueprint(name).blueprint_id,
        "pipeline": FAST,
        "owner": "forge",
        "artifact_id": None if failed else manifest(name).artifact_id,
        "wall_s": 2.0,
        "cpu_s": 1.5,
    }
    return Compilation.model_validate(fields | HERE | changes)


def compile_with(urza: Urza, name: str = "low_rank", **changes: object) -> None:
    publish(urza, name)
    attempt = compilation(name, **changes)
    assert urza.claim_blueprint("forge", LONG_S, blueprint_id=attempt.blueprint_id)
    urza.finish_compilation(attempt)


def test_a_kernel_is_leased_to_one_evaluator(urza: Urza) -> None:
    first, second = publish(urza, "a"), publish(urza, "b")
    head = urza.audit.head()
    claimed = [urza.claim_kernel(f"evaluator {n}", LONG_S, **HERE) for n in range(3)]
    assert claimed == [first, second, None]
    urza.renew_kernel_lease(first, "evaluator 0", LONG_S)
    for act in (
        lambda: urza.renew_kernel_lease(first, "evaluator 1", LONG_S),
        lambda: urza.release_kernel(first, "evaluator 1"),
    ):
        with pytest.raises(
            LeaseError,
            match=f"^kernel {first} is leased to evaluator 0, not to evaluator 1$",
        ):
            act()
    urza.release_kernel(first, "evaluator 0")
    with pytest.raises(LeaseError, match=r"is leased to nobody, not to evaluator 0$"):
        urza.renew_kernel_lease(first, "evaluator 0", LONG_S)
    assert urza.claim_kernel("evaluator 3", LONG_S, **HERE) == first
    assert urza.audit.head() == head
    urza.verify()


def test_a_lease_of_a_kernel_that_ran_out_is_taken_over(urza: Urza, place: Place) -> None:
    kernel = publish(urza)
    urza.claim_kernel("lost", LONG_S, **HERE)
    expire(place)
    urza.renew_kernel_lease(kernel, "lost", LONG_S)  # late, but nobody was there
    assert urza.claim_kernel("heir", LONG_S, **HERE) is None
    expire(place)
    assert urza.claim_kernel("heir", LONG_S, **HERE) == kernel
    with pytest.raises(LeaseError, match=r"is leased to heir, not to lost$"):
        urza.renew_kernel_lease(kernel, "lost", LONG_S)


def test_kernels_that_cannot_be_judged_here_are_left_to_others(urza: Urza) -> None:
    publish(urza, "a", device="cuda")
    publish(urza, "b", torch_version="2.14")
    judge(urza, publish(urza, "c"))
    assert urza.claim_kernel("evaluator", LONG_S, **HERE) is None
    wanted = publish(urza, "d")
    other = publish(urza, "e")
    assert urza.claim_kernel("evaluator", LONG_S, **HERE, artifact_id=other) == other
    assert urza.claim_kernel("evaluator", LONG_S, **HERE, artifact_id=other) is None
    assert urza.claim_kernel("evaluator", LONG_S, **HERE) == wanted


@pytest.mark.parametrize(
    "act",
    [
        lambda urza: urza.claim_kernel("e", LONG_S, **HERE, artifact_id=UNKNOWN),
        lambda urza: urza.renew_kernel_lease(UNKNOWN, "e", LONG_S),
        lambda urza: urza.release_kernel(UNKNOWN, "e"),
    ],
)
def test_unknown_kernels_are_refused(urza: Urza, act: Callable[[Urza], object]) -> None:
    with pytest.raises(ArtifactNotFoundError, match=f"holds no kernel {UNKNOWN}$"):
        act(urza)


def test_bad_terms_are_refused(urza: Urza) -> None:
    with pytest.raises(ValueError, match=r"^a lease must last a finite, positive number"):
        urza.claim_kernel("evaluator", 0.0, **HERE)
    with pytest.raises(ValueError, match=r"^a lease needs the name of its owner, got ''$"):
        urza.claim_kernel("", LONG_S, **HERE)


def test_many_evaluators_share_the_work(urza: Urza) -> None:
    published = {publish(urza, f"design{n}") for n in range(12)}
    barrier = Barrier(6)

    def work(evaluator: int) -> list[str]:
        barrier.wait()
        claimed = []
        while kernel := urza.claim_kernel(f"evaluator {evaluator}", LONG_S, **HERE):
            claimed.append(kernel)
        return claimed

    with ThreadPoolExecutor(6) as pool:
        claimed = [kernel for share in pool.map(work, range(6)) for kernel in share]
    assert sorted(claimed) == sorted(published)


def test_success_is_compiled_and_failure_invalid(urza: Urza) -> None:
    compile_with(urza, "good")
    submit(urza, "bad")
    urza.claim_blueprint("forge", LONG_S)
    urza.finish_compilation(compilation("bad", failed=True, log="g++ fell over"))
    assert urza.blueprint_status(blueprint("good").blueprint_id) == (COMPILED, "")
    assert urza.blueprint_status(blueprint("bad").blueprint_id) == (INVALID, "g++ fell over")
    for name in ("good", "bad"):
        assert urza.was_tried(blueprint(name).blueprint_id, FAST, "cpu", "2.13")
    for other in ((STANDARD, "cpu", "2.13"), (FAST, "cuda", "2.13"), (FAST, "cpu", "2.14")):
        assert not urza.was_tried(blueprint("good").blueprint_id, *other)
    urza.verify()


def test_a_recompilation_that_fails_leaves_the_blueprint_compiled(urza: Urza) -> None:
    compile_with(urza)
    compile_with(urza, pipeline=STANDARD, failed=True, log="slower")
    assert urza.blueprint_status(blueprint().blueprint_id) == (COMPILED, "slower")
    status = urza.forge_status()
    assert (status.recompilations_today, status.recompilation_cpu_s_today) == (1, 1.5)


def test_only_the_holder_settles_a_compilation(urza: Urza) -> None:
    publish(urza)
    with pytest.raises(LeaseError, match=r"is leased to nobody, not to forge$"):
        urza.finish_compilation(compilation())
    urza.claim_blueprint("other", LONG_S)
    with pytest.raises(LeaseError, match=r"is leased to other, not to forge$"):
        urza.finish_compilation(compilation())
    assert not urza.was_tried(blueprint().blueprint_id, FAST, "cpu", "2.13")


def test_a_compilation_names_a_kernel_that_is_there(urza: Urza) -> None:
    submit(urza)
    urza.claim_blueprint("forge", LONG_S)
    with pytest.raises(ArtifactNotFoundError, match=f"holds no kernel {UNKNOWN}$"):
        urza.finish_compilation(compilation(artifact_id=UNKNOWN))
    assert urza.blueprint_status(blueprint().blueprint_id)[0] is COMPILING


def test_whatever_a_compiler_prints_is_kept_as_far_as_it_can_be(urza: Urza) -> None:
    compile_with(urza, failed=True, log="nul \0 and half a pair \ud800")
    log = urza.blueprint_status(blueprint().blueprint_id)[1]
    assert log == "nul \N{REPLACEMENT CHARACTER} and half a pair ?"


def test_prospects_are_what_somebody_wants_and_nobody_has_tried(urza: Urza) -> None:
    names = ("dull", "wanted", "failed", "old", "mixed", "unsteady")
    for name in names:
        compile_with(urza, name, torch_version="2.12" if name == "old" else "2.13")
    for name in ("failed", "mixed", "unsteady"):
        judge(urza, manifest(name).artifact_id, status=KernelStatus.REJECTED)
    judge(urza, publish(urza, "mixed", pipeline=STANDARD))
    unsteady = publish(urza, "unsteady", pipeline=STANDARD)
    judge(urza, unsteady, status=KernelStatus.UNDECIDED)
    urza.set_interest(blueprint("wanted").blueprint_id, "tamiyo", 3.0)
    submit(urza, "waiting")

    def prospects(*pipelines: Pipeline) -> dict[str, tuple[bool, frozenset[Pipeline]]]:
        ids = {blueprint(name).blueprint_id: name for name in names}
        found = urza.recompilation_prospects("cpu", "2.13", pipelines)
        return {ids[p.blueprint_id]: (p.rejected, p.tried) for p in found}

    fast = frozenset({FAST})
    assert list(prospects(*Pipeline).items()) == [
        ("wanted", (False, fast)),
        ("failed", (True, fast)),
        ("old", (False, frozenset())),
    ]
    assert list(prospects(FAST)) == ["old"]
    compile_with(urza, "failed", pipeline=AGGRESSIVE, failed=True)
    assert prospects(STANDARD, AGGRESSIVE)["failed"] == (True, fast | {AGGRESSIVE})
    assert "failed" not in prospects(FAST, AGGRESSIVE)
    assert prospects() == {}


def test_status_counts_what_waits_and_what_was_done(urza: Urza, place: Place) -> None:
    assert urza.forge_status(window_s=60.0).model_dump() == {
        "blueprints": {},
        "kernels": {},
        "leases": (),
        "waiting_blueprints": 0,
        "compiling_blueprints": 0,
        "waiting_kernels": 0,
        "evaluating_kernels": 0,
        "window_s": 60.0,
        "compiled": {},
        "failed": 0,
        "throughput_per_hour": 0.0,
        "utilisation": 0.0,
        "recompilations_today": 0,
        "recompilation_cpu_s_today": 0.0,
    }
    for name in ("a", "b"):
        compile_with(urza, name)
    compile_with(urza, "c", failed=True)
    compile_with(urza, "a", pipeline=STANDARD)
    for name in ("d", "e", "f"):
        submit(urza, name)
    urza.claim_blueprint("lost", LONG_S)
    place.execute("UPDATE blueprints SET lease_expires_at = 1 WHERE lease_owner = 'lost'")
    urza.claim_blueprint("other", LONG_S, blueprint_id=blueprint("e").blueprint_id)
    urza.claim_kernel("evaluator", LONG_S, **HERE)
    status = urza.forge_status(window_s=60.0)
    assert (status.waiting_blueprints, status.compiling_blueprints) == (2, 1)
    assert (status.waiting_kernels, status.evaluating_kernels) == (2, 1)
    assert (status.compiled, status.failed) == ({FAST: 2, STANDARD: 1}, 1)
    assert status.throughput_per_hour == 4 * 60
    assert status.utilisation == pytest.approx(4 * 2.0 / 60.0)
    assert (status.blueprints[COMPILING], status.blueprints[UNVALIDATED]) == (2, 1)
    assert [lease.owner for lease in status.leases] == ["lost", "other"]
    assert urza.forge_status("nobody").compiled == {}
    assert urza.forge_status("forge").compiled == {FAST: 2, STANDARD: 1}
    place.execute("UPDATE compilations SET finished_at = finished_at - 3700")
    later = urza.forge_status()
    assert (later.compiled, later.recompilations_today) == ({}, 1)


def test_an_undecided_kernel_waits_until_its_lease_has_run_out(urza: Urza, place: Place) -> None:
    kernel = publish(urza)
    urza.claim_kernel("evaluator", LONG_S, **HERE)
    judge(urza, kernel, status=KernelStatus.UNDECIDED)
    status = urza.forge_status()
    assert (status.waiting_kernels, status.evaluating_kernels) == (0, 1)
    assert urza.claim_kernel("other", LONG_S, **HERE) is None
    expire(place)
    status = urza.forge_status()
    assert (status.waiting_kernels, status.evaluating_kernels) == (1, 0)
    assert urza.claim_kernel("other", LONG_S, **HERE) == kernel


@pytest.mark.parametrize("window_s", [0.0, -1.0, math.inf, math.nan])
def test_a_window_is_a_time(urza: Urza, window_s: float) -> None:
    with pytest.raises(
        ValueError, match=rf"^a window must last a finite, positive number of .*, got {window_s}$"
    ):
        urza.forge_status(window_s=window_s)
