"""Blueprints are shared out among forges: the most wanted first, each to one, none for ever."""

import math
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
from urza_backends import LOCAL, Place
from urza_samples import UNKNOWN, audited, blueprint, judge, publish, submit

from esper.contracts import BlueprintRecord, BlueprintStatus, KernelStatus, Lease
from esper.errors import ArtifactNotFoundError, LeaseError, LibraryError
from esper.urza import Urza

UNVALIDATED, COMPILING, COMPILED, INVALID = BlueprintStatus
LONG_S = 3600.0


def expire(place: Place) -> None:
    """Let the time of every lease run out."""
    place.execute("UPDATE blueprints SET lease_expires_at = 1 WHERE lease_expires_at IS NOT NULL")


def last_details(urza: Urza) -> dict[str, Any]:
    return urza.audit.entries()[-1].details


def test_nothing_waits_in_an_empty_library(urza: Urza) -> None:
    assert urza.claim_blueprint("forge", LONG_S) is None
    assert audited(urza) == []


@LOCAL
def test_a_claim_leases_the_blueprint(urza: Urza) -> None:
    blueprint_id = submit(urza)
    with urza._database.read() as connection:
        now_s = urza._database.now_s(connection)
    assert urza.claim_blueprint("forge 1", LONG_S) == blueprint_id
    record = urza.blueprint_record(blueprint_id)
    assert record == BlueprintRecord(
        blueprint_id=blueprint_id,
        blueprint=blueprint(),
        status=COMPILING,
        lease_owner="forge 1",
        lease_expires_at=record.lease_expires_at,
    )
    assert record.lease_expires_at is not None
    assert 0 <= record.lease_expires_at - now_s - LONG_S < 60
    assert last_details(urza) == {
        "source": "UNVALIDATED",
        "target": "COMPILING",
        "log": "",
        "owner": "forge 1",
    }
    assert urza.claim_blueprint("forge 2", LONG_S) is None
    urza.verify()


def test_the_most_interesting_comes_first_and_then_the_oldest(urza: Urza) -> None:
    dull, old, both, young = (submit(urza, name) for name in ("dull", "old", "both", "young"))
    urza.set_interest(old, "tamiyo", 0.5)
    urza.set_interest(young, "urabrask", 0.5)
    urza.set_interest(both, "tamiyo", 0.25)
    urza.set_interest(both, "urabrask", 0.375)
    claimed = [urza.claim_blueprint("forge", LONG_S) for _ in range(5)]
    assert claimed == [both, old, young, dull, None]


def test_interest_is_kept_and_audited_when_it_changes(urza: Urza) -> None:
    blueprint_id = submit(urza)
    urza.set_interest(blueprint_id, "tamiyo", 2.5)
    urza.set_interest(blueprint_id, "urabrask", 1)
    urza.set_interest(blueprint_id, "tamiyo", 2.5)
    (record,) = urza.blueprint_records(UNVALIDATED)
    assert (record.tamiyo_interest, record.urabrask_interest) == (2.5, 1.0)
    assert urza.blueprint_records(COMPILED) == []
    entries = urza.audit.entries()[1:]
    assert [(entry.actor, entry.event, entry.subject, entry.details) for entry in entries] == [
        ("tamiyo", "blueprint.interest", blueprint_id, {"tamiyo_interest": 2.5}),
        ("urabrask", "blueprint.interest", blueprint_id, {"urabrask_interest": 1}),
    ]
    urza.verify()


@pytest.mark.parametrize("score", [-0.1, math.nan, math.inf])
def test_an_interest_that_is_no_score_is_refused(urza: Urza, score: float) -> None:
    blueprint_id = submit(urza)
    with pytest.raises(
        ValueError, match=f"^an interest must be finite and not negative, got {score}"
    ):
        urza.set_interest(blueprint_id, "tamiyo", score)
    assert audited(urza) == ["blueprint.submitted"]


def test_the_holder_alone_takes_a_leased_blueprint_further(urza: Urza) -> None:
    blueprint_id = submit(urza)
    urza.claim_blueprint("forge 1", LONG_S)
    head = urza.audit.head()
    for owner in (None, "forge 2"):
        with pytest.raises(
            LeaseError,
            match=f"^blueprint {blueprint_id} is leased to forge 1, not to {owner or 'nobody'}$",
        ):
            urza.set_blueprint_status(blueprint_id, COMPILED, owner=owner)
    assert urza.audit.head() == head
    urza.set_blueprint_status(blueprint_id, COMPILED, "fine", owner="forge 1")
    record = urza.blueprint_record(blueprint_id)
    assert (record.status, record.log) == (COMPILED, "fine")
    assert (record.lease_owner, record.lease_expires_at) == (None, None)
    urza.verify()


def test_a_lease_that_ran_out_is_taken_over(urza: Urza, place: Place) -> None:
    blueprint_id = submit(urza)
    urza.claim_blueprint("lost", LONG_S)
    expire(place)
    assert urza.claim_blueprint("heir", LONG_S) == blueprint_id
    assert last_details(urza)["source"] == "COMPILING"
    for act in (
        lambda: urza.set_blueprint_status(blueprint_id, COMPILED, owner="lost"),
        lambda: urza.renew_lease(blueprint_id, "lost", LONG_S),
        lambda: urza.release_blueprint(blueprint_id, "lost"),
    ):
        with pytest.raises(LeaseError, match=r"is leased to heir, not to lost$"):
            act()
    urza.set_blueprint_status(blueprint_id, INVALID, "crashed", owner="heir")
    assert urza.blueprint_status(blueprint_id) == (INVALID, "crashed")
    urza.verify()


def test_what_waits_and_what_was_left_behind_compete_by_interest(urza: Urza, place: Place) -> None:
    waiting, left_behind = submit(urza, "a"), submit(urza, "b")
    urza.claim_blueprint("lost", LONG_S, blueprint_id=left_behind)
    expire(place)
    urza.set_interest(left_behind, "tamiyo", 1.0)
    assert urza.claim_blueprint("forge", LONG_S) == left_behind
    assert urza.claim_blueprint("forge", LONG_S) == waiting


def test_a_renewed_lease_is_not_taken_over(urza: Urza, place: Place) -> None:
    blueprint_id = submit(urza)
    urza.claim_blueprint("slow", LONG_S)
    expire(place)
    head = urza.audit.head()
    urza.renew_lease(blueprint_id, "slow", LONG_S)  # late, but nobody was there
    assert urza.audit.head() == head
    assert urza.claim_blueprint("heir", LONG_S) is None
    urza.set_blueprint_status(blueprint_id, COMPILED, owner="slow")


def test_after_a_lease_ran_out_its_owner_or_anyone_may_end_it(urza: Urza, place: Place) -> None:
    first, second = submit(urza, "a"), submit(urza, "b")
    for _ in range(2):
        urza.claim_blueprint("forge", LONG_S)
    expire(place)
    urza.set_blueprint_status(first, COMPILED, owner="forge")
    urza.set_blueprint_status(second, UNVALIDATED, "its forge was lost")
    assert urza.claim_blueprint("heir", LONG_S) == second


def test_compiling_without_a_lease_does_not_last_for_ever(urza: Urza) -> None:
    blueprint_id = submit(urza)
    urza.set_blueprint_status(blueprint_id, COMPILING)
    assert urza.claim_blueprint("heir", LONG_S) == blueprint_id
    urza.release_blueprint(blueprint_id, "heir")
    assert urza.blueprint_status(blueprint_id) == (UNVALIDATED, "")


@pytest.mark.parametrize("source", [UNVALIDATED, COMPILED])
def test_what_is_released_is_as_before(urza: Urza, place: Place, source: BlueprintStatus) -> None:
    blueprint_id = submit(urza)
    if source is COMPILED:
        urza.set_blueprint_status(blueprint_id, COMPILING)
        urza.set_blueprint_status(blueprint_id, COMPILED)
    assert urza.claim_blueprint("lost", LONG_S, blueprint_id=blueprint_id) == blueprint_id
    expire(place)
    assert urza.claim_blueprint("heir", LONG_S) == blueprint_id
    urza.release_blueprint(blueprint_id, "heir", "cancelled")
    assert urza.blueprint_status(blueprint_id) == (source, "cancelled")
    with pytest.raises(LeaseError, match=r"is leased to nobody, not to heir$"):
        urza.release_blueprint(blueprint_id, "heir")
    urza.verify()


def test_what_is_compiled_or_invalid_does_not_wait(urza: Urza) -> None:
    compiled, invalid = submit(urza, "a"), submit(urza, "b")
    for blueprint_id, status in ((compiled, COMPILED), (invalid, INVALID)):
        urza.claim_blueprint("forge", LONG_S, blueprint_id=blueprint_id)
        urza.set_blueprint_status(blueprint_id, status, owner="forge")
    assert urza.claim_blueprint("forge", LONG_S) is None
    assert urza.claim_blueprint("forge", LONG_S, blueprint_id=invalid) is None
    assert urza.claim_blueprint("forge", LONG_S, blueprint_id=compiled) == compiled
    assert urza.claim_blueprint("other", LONG_S, blueprint_id=compiled) is None


def test_an_illegal_edge_is_refused_to_the_holder_too(urza: Urza) -> None:
    blueprint_id = submit(urza)
    urza.claim_blueprint("forge", LONG_S)
    with pytest.raises(LibraryError, match=r"is COMPILING; it cannot become COMPILING$"):
        urza.set_blueprint_status(blueprint_id, COMPILING, owner="forge")


@pytest.mark.parametrize("lease_s", [0, -1, math.inf, math.nan])
def test_bad_terms_are_refused(urza: Urza, lease_s: float) -> None:
    blueprint_id = submit(urza)
    with pytest.raises(
        ValueError, match=r"^a lease must last a finite, positive number of seconds"
    ):
        urza.claim_blueprint("forge", lease_s)
    with pytest.raises(ValueError, match=r"^a lease needs the name of its owner, got ''$"):
        urza.claim_blueprint("", LONG_S)
    urza.claim_blueprint("forge", LONG_S)
    with pytest.raises(
        ValueError, match=r"^a lease must last a finite, positive number of seconds"
    ):
        urza.renew_lease(blueprint_id, "forge", lease_s)


def test_bad_ids_are_refused(urza: Urza) -> None:
    for act in (
        lambda key: urza.claim_blueprint("forge", LONG_S, blueprint_id=key),
        lambda key: urza.renew_lease(key, "forge", LONG_S),
        lambda key: urza.release_blueprint(key, "forge"),
        lambda key: urza.set_interest(key, "tamiyo", 1.0),
        urza.blueprint_record,
    ):
        with pytest.raises(ArtifactNotFoundError, match=f"holds no blueprint {UNKNOWN}$"):
            act(UNKNOWN)
        with pytest.raises(ValueError, match=r"^an id is 64 lowercase hexadecimal digits, got "):
            act("../../etc/passwd")


def test_a_log_of_any_bytes_is_kept(urza: Urza) -> None:
    blueprint_id = submit(urza)
    urza.claim_blueprint("forge", LONG_S)
    urza.set_blueprint_status(blueprint_id, INVALID, "g++: \0 \udcff ünï\n", owner="forge")
    assert urza.blueprint_status(blueprint_id) == (INVALID, "g++: \ufffd ? ünï\n")
    urza.verify()


def test_many_forges_share_the_work(urza: Urza) -> None:
    submitted = {submit(urza, f"design{n}") for n in range(24)}
    barrier = Barrier(8)

    def work(forge: int) -> list[str]:
        barrier.wait()
        claimed = []
        while blueprint_id := urza.claim_blueprint(f"forge {forge}", LONG_S):
            urza.set_blueprint_status(blueprint_id, COMPILED, owner=f"forge {forge}")
            claimed.append(blueprint_id)
        return claimed

    with ThreadPoolExecutor(8) as pool:
        claimed = [blueprint_id for share in pool.map(work, range(8)) for blueprint_id in share]
    assert len(claimed) == len(submitted), "nothing is compiled twice"
    assert set(claimed) == submitted == set(urza.blueprints(COMPILED))
    urza.verify()


def test_the_status_counts_what_there_is_and_names_who_compiles(urza: Urza) -> None:
    empty = urza.forge_status()
    assert (empty.blueprints, empty.kernels, empty.leases) == ({}, {}, ())
    submit(urza, "waiting")
    publish(urza, "compiling")
    judge(urza, publish(urza, "compiled"))
    compiling = blueprint("compiling").blueprint_id
    urza.claim_blueprint("forge 1", LONG_S, blueprint_id=compiling)
    expires_at = urza.blueprint_record(compiling).lease_expires_at
    assert expires_at is not None
    status = urza.forge_status()
    assert status.blueprints == {UNVALIDATED: 2, COMPILING: 1}
    assert status.kernels == {KernelStatus.PENDING_BENCHMARKING: 1, KernelStatus.VALIDATED: 1}
    assert status.leases == (Lease(blueprint_id=compiling, owner="forge 1", expires_at=expires_at),)
