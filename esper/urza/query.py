"""Which kernels answer a query, and in which order: worked out by the database, from its indexes.

The index ``kernels_by_rank`` holds all that a query asks of a kernel, in the order of the ranking
but for preferred tags. So what matches most of those is looked for first, then what matches fewer:
each search walks the index and stops as soon as it has found enough. Only what is returned is read
from the table.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Integer,
    Row,
    Select,
    String,
    bindparam,
    false,
    func,
    select,
)

from esper.contracts import KernelManifest, KernelQuery, KernelRecord, KernelStatus, Pipeline
from esper.errors import ArtifactIntegrityError
from esper.urza.schema import kernels, tag_set_members

Parameters = dict[str, Any]


def find(connection: Connection, query: KernelQuery) -> list[Row[Any]]:
    """Return the rows of the kernels that fit, best first."""
    asked = parameters(query)
    best: list[int] = []
    for preferred in _preferences(connection, query.preferred_tags):
        values = asked | preferred | {"limit": query.limit - len(best)}
        best.extend(connection.execute(ranked(frozenset(values)), values).scalars())
        if len(best) == query.limit:
            break
    rows = connection.execute(_FETCH, {"positions": best})
    by_position = {row.position: row for row in rows}
    return [by_position[position] for position in best]


def parameters(query: KernelQuery) -> Parameters:
    """Return what the query asks for, by the names of :func:`ranked`."""
    asked = {
        "site_digest": query.site.digest(),
        "dtype": query.dtype,
        "device": query.device,
        "max_latency_us": query.max_latency_us,
        "max_memory_bytes": query.max_memory_bytes,
        "max_parameters": query.max_parameters,
        "required_tags": sorted(query.required_tags) or None,
        "required_count": len(query.required_tags) or None,
        "excluded_tags": sorted(query.excluded_tags) or None,
    }
    return {name: value for name, value in asked.items() if value is not None}


@cache  # SQLAlchemy takes longer to build a statement than SQLite to answer it
def ranked(names: frozenset[str]) -> Select[int]:
    """Select the positions of validated kernels, best first, with a condition for each name."""
    return (
        select(kernels.c.position)
        .where(
            kernels.c.status == KernelStatus.VALIDATED,
            kernels.c.archived == false(),
            *(condition for name, condition in _CONDITIONS.items() if name in names),
        )
        .order_by(kernels.c.risk_score, kernels.c.num_parameters, kernels.c.artifact_id)
        .limit(bindparam("limit", type_=Integer))
    )


def check_fit(record: KernelRecord, query: KernelQuery) -> None:
    """Raise ArtifactIntegrityError if the index, which is a copy, promised what is not so."""
    found, asked = _fit(record.manifest), _fit(query)
    if found != asked:
        raise ArtifactIntegrityError(
            f"kernel {record.artifact_id}: its row was altered, it was found for {asked}, "
            f"its manifest says {found}"
        )


def fastest_first(
    records: Sequence[KernelRecord], preferred_tags: frozenset[str]
) -> list[KernelRecord]:
    """Let what one blueprint was compiled to take its places in the ranking by pipeline.

    A pipeline delivers only what it measured to be faster than what a simpler one delivers. Kernels
    that match more of the preferred tags stay in front of those that match fewer.
    """
    ranks = list(Pipeline)
    places: dict[tuple[str, int], list[int]] = defaultdict(list)
    for place, record in enumerate(records):
        matched = len(preferred_tags.intersection(record.tags))
        places[record.manifest.blueprint_id, matched].append(place)
    ordered = [*records]
    for twins in places.values():
        by_pipeline = sorted(
            twins, key=lambda place: -ranks.index(records[place].manifest.pipeline)
        )
        for place, twin in zip(twins, by_pipeline, strict=True):
            ordered[place] = records[twin]
    return ordered


def _fit(subject: KernelManifest | KernelQuery) -> tuple[object, ...]:
    return subject.site, subject.dtype, subject.device


def _preferences(connection: Connection, tags: Collection[str]) -> Iterator[Parameters]:
    """Yield what parts all kernels by how many of ``tags`` they have, most first."""
    if not tags:
        yield {}
        return
    preferred_tags = sorted(tags)
    for count in connection.execute(_COUNTS, {"preferred_tags": preferred_tags}).scalars():
        yield {"preferred_tags": preferred_tags, "preferred_count": count}
    yield {"avoided_tags": preferred_tags}


def _is_one_of(name: str) -> ColumnElement[bool]:
    return tag_set_members.c.tag.in_(bindparam(name, expanding=True, type_=String))


def _sets_with_some(name: str) -> Select[int]:
    return select(tag_set_members.c.tag_set).where(_is_one_of(name))


def _sets_with(name: str, count: str) -> Select[int]:
    """Sets with exactly so many of the tags."""
    some = _sets_with_some(name).group_by(tag_set_members.c.tag_set)
    return some.having(func.count() == bindparam(count, type_=Integer))


_CONDITIONS = {
    "site_digest": kernels.c.site_digest == bindparam("site_digest"),
    "dtype": kernels.c.dtype == bindparam("dtype"),
    "device": kernels.c.device == bindparam("device"),
    "max_latency_us": kernels.c.latency_us <= bindparam("max_latency_us"),
    "max_memory_bytes": kernels.c.memory_bytes <= bindparam("max_memory_bytes"),
    "max_parameters": kernels.c.num_parameters <= bindparam("max_parameters"),
    "required_tags": kernels.c.tag_set.in_(_sets_with("required_tags", "required_count")),
    "excluded_tags": kernels.c.tag_set.not_in(_sets_with_some("excluded_tags")),
    "preferred_tags": kernels.c.tag_set.in_(_sets_with("preferred_tags", "preferred_count")),
    "avoided_tags": kernels.c.tag_set.not_in(_sets_with_some("avoided_tags")),
}

_MATCHED = (
    select(func.count().label("count"))
    .where(_is_one_of("preferred_tags"))
    .group_by(tag_set_members.c.tag_set)
    .subquery()
)
_COUNTS = select(_MATCHED.c.count).distinct().order_by(_MATCHED.c.count.desc())
_FETCH = select(kernels).where(kernels.c.position.in_(bindparam("positions", expanding=True)))
