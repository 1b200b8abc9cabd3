"""What the forges have tried, what that has cost, and what could be made anew."""

from collections.abc import Collection
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    and_,
    exists,
    false,
    func,
    insert,
    or_,
    select,
    true,
)

from esper.contracts import (
    BlueprintStatus,
    Compilation,
    ForgeStatus,
    KernelStatus,
    Pipeline,
    RecompilationProspect,
)
from esper.urza.schema import blueprints, compilations, kernel_leases, kernels

_DAY_S = 86400.0
_MAX_PROSPECTS = 1000  # at a time: there will be another look

_COMPILING = blueprints.c.status == BlueprintStatus.COMPILING
_PENDING = kernels.c.status == KernelStatus.PENDING_BENCHMARKING


def record(
    connection: Connection, compilation: Compilation, *, recompiled: bool, now_s: float
) -> None:
    values = compilation.model_dump(mode="json", exclude={"log"})
    values |= {"recompiled": recompiled, "finished_at": now_s}
    connection.execute(insert(compilations).values(values))


def tried(
    connection: Connection, blueprint_id: str, pipeline: Pipeline, device: str, torch_version: str
) -> bool:
    attempts = select(compilations.c.position).where(
        compilations.c.blueprint_id == blueprint_id,
        compilations.c.pipeline == pipeline,
        *_target(device, torch_version),
    )
    return connection.execute(attempts.limit(1)).first() is not None


def prospects(
    connection: Connection, device: str, torch_version: str, pipelines: Collection[Pipeline]
) -> list[RecompilationProspect]:
    """Return compiled blueprints that somebody is interested in or that have no good kernel.

    The most interesting come first. What all of ``pipelines`` have tried is left out.
    """
    of_blueprint = blueprints.c.blueprint_id
    attempts = compilations.c.blueprint_id == of_blueprint
    target = _target(device, torch_version)
    made = and_(kernels.c.blueprint_id == of_blueprint, kernels.c.device == device)
    judged = {
        status: exists().where(made, kernels.c.status == status, kernels.c.archived == false())
        for status in KernelStatus
    }
    rejected = and_(
        judged[KernelStatus.REJECTED],
        ~judged[KernelStatus.VALIDATED],
        ~judged[KernelStatus.PENDING_BENCHMARKING],
    ).label("rejected")
    by = {
        pipeline: exists()
        .where(attempts, compilations.c.pipeline == pipeline, *target)
        .label(pipeline.value)
        for pipeline in Pipeline
    }
    interest = blueprints.c.tamiyo_interest + blueprints.c.urabrask_interest
    chosen = (
        select(blueprints, rejected, *by.values())
        .where(
            blueprints.c.status == BlueprintStatus.COMPILED,
            or_(interest > 0, rejected, ~by[Pipeline.FAST]),
            or_(false(), *(~by[pipeline] for pipeline in pipelines)),
        )
        .order_by(interest.desc(), blueprints.c.position)
        .limit(_MAX_PROSPECTS)
    )
    return [
        RecompilationProspect(
            blueprint_id=row.blueprint_id,
            tamiyo_interest=row.tamiyo_interest,
            urabrask_interest=row.urabrask_interest,
            rejected=row.rejected,
            tried=frozenset(p for p in Pipeline if row._mapping[p.value]),
        )
        for row in connection.execute(chosen)
    ]


def status(connection: Connection, now_s: float, owner: str | None, window_s: float) -> ForgeStatus:
    """See :meth:`Urza.forge_status`."""
    leased = and_(_COMPILING, blueprints.c.lease_expires_at > now_s)
    held = and_(_PENDING, kernel_leases.c.expires_at > now_s)
    compiling = _count(connection, blueprints.c.position, leased)
    unfinished = _count(
        connection,
        blueprints.c.position,
        or_(blueprints.c.status == BlueprintStatus.UNVALIDATED, _COMPILING),
    )
    pending = _count(connection, kernels.c.position, _PENDING)
    evaluating = _count(
        connection, kernels.c.position, held, kernels.c.artifact_id == kernel_leases.c.artifact_id
    )
    finished = _finished(connection, now_s - window_s, owner)
    compiled = {pipeline: made for pipeline, (made, _, _) in finished.items() if made}
    attempts = sum(count for _, count, _ in finished.values())
    recompilations, cpu_s = _recompiled(connection, now_s - _DAY_S)
    return ForgeStatus(
        waiting_blueprints=unfinished - compiling,
        compiling_blueprints=compiling,
        waiting_kernels=pending - evaluating,
        evaluating_kernels=evaluating,
        window_s=window_s,
        compiled=compiled,
        failed=attempts - sum(compiled.values()),
        throughput_per_hour=attempts * 3600 / window_s,
        utilisation=sum(wall_s for _, _, wall_s in finished.values()) / window_s,
        recompilations_today=recompilations,
        recompilation_cpu_s_today=cpu_s,
    )


def _target(device: str, torch_version: str) -> tuple[ColumnElement[bool], ...]:
    return compilations.c.device == device, compilations.c.torch_version == torch_version


def _count(connection: Connection, what: ColumnElement[Any], *conditions: Any) -> int:
    return int(connection.execute(select(func.count(what)).where(*conditions)).scalar_one())


def _finished(
    connection: Connection, since_s: float, owner: str | None
) -> dict[Pipeline, tuple[int, int, float]]:
    """Return for each pipeline kernels made, attempts, and the time that they took."""
    chosen = (
        select(
            compilations.c.pipeline,
            func.count(compilations.c.artifact_id),
            func.count(),
            func.sum(compilations.c.wall_s),
        )
        .where(compilations.c.finished_at > since_s)
        .group_by(compilations.c.pipeline)
    )
    if owner is not None:
        chosen = chosen.where(compilations.c.owner == owner)
    return {
        Pipeline(pipeline): (made, attempts, wall_s)
        for pipeline, made, attempts, wall_s in connection.execute(chosen)
    }


def _recompiled(connection: Connection, since_s: float) -> tuple[int, float]:
    chosen = select(func.count(), func.coalesce(func.sum(compilations.c.cpu_s), 0.0)).where(
        compilations.c.finished_at > since_s, compilations.c.recompiled == true()
    )
    count, cpu_s = connection.execute(chosen).one()
    return int(count), float(cpu_s)
