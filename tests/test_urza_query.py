"""Queries: what fits is found, what does not is not, and the order never depends on luck."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from urza_backends import Place
from urza_samples import SITE, audited, judge, kernel_files, measurement, publish
from urza_shelf import Shelved, best, shelve, site

from esper.contracts import KernelQuery, KernelRecord, KernelStatus, Pipeline
from esper.errors import ArtifactIntegrityError
from esper.urza import Urza
from esper.urza.query import parameters, ranked


def validated(urza: Urza, name: str = "low_rank", **changes: Any) -> str:
    """Publish and validate a kernel; ``changes`` are to its manifest or to its report."""
    of_manifest = {"num_parameters", "site", "dtype", "device", "torch_version", "pipeline"}
    artifact_id = publish(urza, name, **{k: v for k, v in changes.items() if k in of_manifest})
    judge(urza, artifact_id, **{k: v for k, v in changes.items() if k not in of_manifest})
    return artifact_id


def found(urza: Urza, **changes: Any) -> list[str]:
    fields: dict[str, Any] = {"site": SITE, "dtype": "float32", "device": "cpu"}
    return [record.artifact_id for record in urza.query(KernelQuery(**fields | changes))]


def test_only_what_fits_exactly_is_found(urza: Urza) -> None:
    fits = validated(urza)
    wider = SITE.model_copy(update={"inp_shape": (None, 16)})
    elsewhere: dict[str, dict[str, Any]] = {
        validated(urza, site=wider): {"site": wider},
        validated(urza, dtype="float16"): {"dtype": "float16"},
        validated(urza, device="cuda"): {"device": "cuda"},
    }
    assert found(urza) == [fits]
    for artifact_id, asked in elsewhere.items():
        assert found(urza, **asked) == [artifact_id]
    assert found(urza, dtype="float64") == []


def test_only_validated_kernels_are_found(urza: Urza) -> None:
    publish(urza, "pending")
    rejected = publish(urza, "rejected")
    judge(urza, rejected, status=KernelStatus.REJECTED)
    assert found(urza) == []
    good = validated(urza)
    assert found(urza) == [good]
    judge(urza, good, status=KernelStatus.REJECTED)
    assert found(urza) == []


def test_required_and_excluded_tags(urza: Urza) -> None:
    small = validated(urza, "a", tags=("small",))
    both = validated(urza, "b", tags=("small", "fast"))
    assert sorted(found(urza, required_tags={"small"})) == sorted([small, both])
    assert found(urza, required_tags={"small", "fast"}) == [both]
    assert found(urza, excluded_tags={"fast"}) == [small]
    assert found(urza, required_tags={"fast"}, excluded_tags={"small"}) == []
    assert found(urza, required_tags={"smal"}) == []


def test_budgets_are_inclusive(urza: Urza) -> None:
    artifact_id = validated(urza, num_parameters=48, measurement=measurement(12.5, 4096))
    for bound, value in (
        ("max_latency_us", 12.5),
        ("max_memory_bytes", 4096),
        ("max_parameters", 48),
    ):
        assert found(urza, **{bound: value}) == [artifact_id]
        assert found(urza, **{bound: value - 1}) == []


def test_unknown_costs_meet_no_budget(urza: Urza) -> None:
    artifact_id = validated(urza, measurement=None)
    assert found(urza) == [artifact_id]
    assert found(urza, max_latency_us=1e9) == []
    assert found(urza, max_memory_bytes=2**40) == []


def test_ranking_by_preferred_tags_then_risk_then_size_then_id(urza: Urza) -> None:
    preferred = validated(urza, "a", tags=("small", "fast"), risk_score=0.9)
    safe = validated(urza, "b", tags=("small",), risk_score=0.1, num_parameters=500)
    lean = validated(urza, "c", tags=("small",), risk_score=0.2, num_parameters=10)
    twins = sorted(
        validated(urza, name, tags=("small",), risk_score=0.2, num_parameters=20)
        for name in ("d", "e", "f")
    )
    assert found(urza, preferred_tags={"small", "fast", "unheard-of"}) == [
        preferred,
        safe,
        lean,
        *twins,
    ]
    assert found(urza) == [safe, lean, *twins, preferred]
    assert found(urza, limit=2) == [safe, lean]


def test_latency_does_not_rank(urza: Urza) -> None:
    slow, quick = sorted(validated(urza, name) for name in ("a", "b"))
    judge(urza, slow, measurement=measurement(900.0, 4096))
    judge(urza, quick, measurement=measurement(1.0, 4096))
    assert found(urza) == [slow, quick]


def test_of_one_blueprint_the_fastest_pipeline_comes_first(urza: Urza) -> None:
    fast = validated(urza, "a", risk_score=0.1)
    other = validated(urza, "b", risk_score=0.2)
    standard = validated(urza, "a", risk_score=0.3, pipeline=Pipeline.STANDARD)
    aggressive = validated(urza, "a", risk_score=0.4, pipeline=Pipeline.AGGRESSIVE)
    assert found(urza) == [aggressive, other, standard, fast]


def test_a_faster_pipeline_passes_no_kernel_with_more_preferred_tags(urza: Urza) -> None:
    fast = validated(urza, "a", tags=("small",))
    standard = validated(urza, "a", tags=(), pipeline=Pipeline.STANDARD)
    assert found(urza, preferred_tags={"small"}) == [fast, standard]
    assert found(urza) == [standard, fast]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Urza, list[KernelRecord]]]:
    with Urza(tmp_path_factory.mktemp("library")) as urza:
        for index in range(30):
            artifact_id = validated(
                urza,
                f"design{index}",
                tags=tuple(tag for bit, tag in enumerate("abc") if index >> bit & 1),
                risk_score=index % 5 / 5,
                num_parameters=index % 7,
                measurement=measurement(1.0 + index % 3, 1 + index % 4) if index % 6 else None,
            )
            if index % 8 == 7:
                urza.archive(artifact_id)
        yield urza, urza.kernels()


tags = st.frozensets(st.sampled_from("abcd"))
queries = st.builds(
    KernelQuery,
    site=st.just(SITE),
    dtype=st.just("float32"),
    device=st.just("cpu"),
    required_tags=tags,
    preferred_tags=tags,
    excluded_tags=tags,
    max_latency_us=st.none() | st.sampled_from([0.5, 1.0, 2.5]),
    max_memory_bytes=st.none() | st.integers(1, 5),
    max_parameters=st.none() | st.integers(0, 7),
    limit=st.integers(1, 30),
)


@given(query=queries)
def test_any_query_agrees_with_the_plainest_answer(
    shelf: tuple[Urza, list[KernelRecord]], query: KernelQuery
) -> None:
    urza, records = shelf
    left = []
    for record in records:
        if record.archived:
            continue
        if any(tag not in record.tags for tag in query.required_tags):
            continue
        if any(tag in record.tags for tag in query.excluded_tags):
            continue
        if exceeds(record.latency_us, query.max_latency_us):
            continue
        if exceeds(record.memory_bytes, query.max_memory_bytes):
            continue
        if exceeds(record.manifest.num_parameters, query.max_parameters):
            continue
        left.append(record)
    left.sort(key=lambda record: record.artifact_id)
    left.sort(key=lambda record: record.manifest.num_parameters)
    left.sort(key=lambda record: record.risk_score or 0.0)
    left.sort(key=lambda record: -sum(tag in record.tags for tag in query.preferred_tags))
    assert urza.query(query) == left[: query.limit]


def exceeds(value: float | None, bound: float | None) -> bool:
    return bound is not None and (value is None or value > bound)


def test_an_archived_kernel_is_not_found_but_kept(urza: Urza) -> None:
    archived, other = validated(urza, "a"), validated(urza, "b")
    urza.archive(archived)
    assert found(urza) == [other]
    assert urza.kernel(archived).archived
    assert urza.fetch_kernel(archived).files == kernel_files("a")
    assert {record.artifact_id for record in urza.kernels()} == {archived, other}
    head = urza.audit.head()
    urza.archive(archived)
    assert urza.audit.head() == head
    assert audited(urza)[-1] == "kernel.archived"
    urza.verify()


def test_a_verdict_s_tags_replace_those_of_the_last(urza: Urza) -> None:
    artifact_id = validated(urza, tags=("small", "fast", "fast"))
    assert found(urza, required_tags={"fast"}) == [artifact_id]
    judge(urza, artifact_id, tags=("small",))
    assert found(urza, required_tags={"fast"}) == []
    judge(urza, artifact_id, tags=(), machine="another")
    assert found(urza, required_tags={"small"}) == []
    urza.verify()


@pytest.fixture(scope="module")
def large(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Urza, list[Shelved]]]:
    with Urza(tmp_path_factory.mktemp("library")) as urza:
        yield urza, shelve(urza, 100_000, sites=100)


LARGE_QUERIES = [
    KernelQuery(site=site(7), dtype="float32", device="cpu"),
    KernelQuery(
        site=site(42),
        dtype="float32",
        device="cpu",
        required_tags=frozenset({"numerically_stable", "low_memory"}),
        preferred_tags=frozenset({"gated", "residual_mlp", "high_speed"}),
        excluded_tags=frozenset({"low_speed", "unheard-of"}),
        max_latency_us=900.0,
        max_memory_bytes=2**19,
        max_parameters=80_000,
        limit=100,
    ),
]


@pytest.mark.parametrize("query", LARGE_QUERIES)
def test_a_hundred_thousand_kernels_are_ranked_rightly(
    large: tuple[Urza, list[Shelved]], query: KernelQuery
) -> None:
    urza, shelved = large
    expected = best(shelved, query)
    assert [record.artifact_id for record in urza.query(query)] == expected
    assert len(expected) >= 16, "too few to tell one order from another"


@pytest.mark.parametrize("query", LARGE_QUERIES)
def test_the_index_answers_a_query(large: tuple[Urza, list[Shelved]], query: KernelQuery) -> None:
    """It is covering, so no row is read, and in order, so nothing is sorted."""
    urza, _ = large
    with urza._database.read() as connection:
        values = parameters(query) | {"limit": query.limit}
        statement = ranked(frozenset(values)).params(values)
        text = statement.compile(connection, compile_kwargs={"literal_binds": True})
        steps = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}").all()
    assert [step.detail for step in steps if "kernels" in step.detail] == [
        "SEARCH kernels USING COVERING INDEX kernels_by_rank "
        "(status=? AND archived=? AND site_digest=? AND dtype=? AND device=?)"
    ]
    assert not any("ORDER BY" in step.detail for step in steps)


def test_a_row_that_the_index_shows_for_the_wrong_site_is_noticed(urza: Urza, place: Place) -> None:
    wider = SITE.model_copy(update={"inp_shape": (None, 16)})
    validated(urza, site=wider)
    with place.tampering() as connection:
        connection.exec_driver_sql(f"UPDATE kernels SET site_digest = '{SITE.digest()}'")
    with pytest.raises(ArtifactIntegrityError, match=r"its row was altered, it was found for"):
        found(urza)
