"""What the forges have tried, and what could be made anew."""

from collections.abc import Collection

from sqlalchemy import ColumnElement, Connection, and_, exists, false, insert, or_, select

from esper.contracts import (
    BlueprintStatus,
    Compilation,
    KernelStatus,
    Pipeline,
    RecompilationProspect,
)
from esper.urza.schema import blueprints, compilations, kernels

_MAX_PROSPECTS = 1000  # at a time: there will be another look


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
    others = (judged[status] for status in KernelStatus if status is not KernelStatus.REJECTED)
    rejected = and_(judged[KernelStatus.REJECTED], *(~other for other in others)).label("rejected")
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


def _target(device: str, torch_version: str) -> tuple[ColumnElement[bool], ...]:
    return compilations.c.device == device, compilations.c.torch_version == torch_version
