"""How the forges and evaluators of a library are doing."""

from enum import StrEnum
from typing import TypeVar

from sqlalchemy import Column, Connection, func, select, true

from esper.contracts import BlueprintStatus, ForgeStatus, KernelStatus, Pipeline
from esper.urza.kernel_leases import WAITING
from esper.urza.leases import leases_of
from esper.urza.schema import blueprints, compilations, kernel_leases, kernels

StatusT = TypeVar("StatusT", bound=StrEnum)

_DAY_S = 86400.0
_UNFINISHED = (BlueprintStatus.UNVALIDATED, BlueprintStatus.COMPILING)


def status(connection: Connection, now_s: float, owner: str | None, window_s: float) -> ForgeStatus:
    """See :meth:`Urza.forge_status`."""
    blueprint_counts = _counts(connection, blueprints.c.status, BlueprintStatus)
    kernel_counts = _counts(connection, kernels.c.status, KernelStatus)
    leases = leases_of(connection)
    compiling = sum(lease.expires_at > now_s for lease in leases)
    evaluating = _evaluating(connection, now_s)
    finished = _finished(connection, now_s - window_s, owner)
    compiled = {pipeline: made for pipeline, (made, _, _) in finished.items() if made}
    attempts = sum(count for _, count, _ in finished.values())
    recompilations, cpu_s = _recompiled(connection, now_s - _DAY_S)
    return ForgeStatus(
        blueprints=blueprint_counts,
        kernels=kernel_counts,
        leases=leases,
        waiting_blueprints=sum(blueprint_counts.get(s, 0) for s in _UNFINISHED) - compiling,
        compiling_blueprints=compiling,
        waiting_kernels=sum(kernel_counts.get(s, 0) for s in WAITING) - evaluating,
        evaluating_kernels=evaluating,
        window_s=window_s,
        compiled=compiled,
        failed=attempts - sum(compiled.values()),
        throughput_per_hour=attempts * 3600 / window_s,
        utilisation=sum(wall_s for _, _, wall_s in finished.values()) / window_s,
        recompilations_today=recompilations,
        recompilation_cpu_s_today=cpu_s,
    )


def _counts(connection: Connection, column: Column[str], kind: type[StatusT]) -> dict[StatusT, int]:
    counted = select(column, func.count()).group_by(column)
    return {kind(status): count for status, count in connection.execute(counted)}


def _evaluating(connection: Connection, now_s: float) -> int:
    """Return how many kernels wait for a verdict and are kept by an evaluator."""
    held = (
        select(func.count())
        .select_from(kernels.join(kernel_leases))
        .where(kernels.c.status.in_(WAITING), kernel_leases.c.expires_at > now_s)
    )
    return int(connection.execute(held).scalar_one())


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
