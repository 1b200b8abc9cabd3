"""Leases: which evaluator judges a kernel, and until when it may be silent.

A lease is no state of the kernel, which waits for its verdict all the time. One that is not given
back keeps the others off until it runs out; so does a kernel that could not be judged.
"""

from typing import Any

from sqlalchemy import Connection, Row, delete, insert, or_, select, update

from esper.contracts import KernelStatus
from esper.errors import LeaseError
from esper.urza.schema import kernel_leases, kernels

WAITING = (KernelStatus.PENDING_BENCHMARKING, KernelStatus.UNDECIDED)  # for a verdict


def claim(
    connection: Connection,
    owner: str,
    now_s: float,
    lease_s: float,
    *,
    device: str,
    torch_version: str,
    artifact_id: str | None,
) -> str | None:
    """Lease the oldest kernel that waits for a verdict which can be given there, or None."""
    chosen = (
        select(kernels.c.artifact_id)
        .outerjoin(kernel_leases, kernels.c.artifact_id == kernel_leases.c.artifact_id)
        .where(
            kernels.c.status.in_(WAITING),
            kernels.c.device == device,
            # The manifest is canonical JSON, in which a quotation mark within a text is escaped.
            kernels.c.manifest.contains(f'"torch_version":"{torch_version}"', autoescape=True),
            or_(kernel_leases.c.expires_at.is_(None), kernel_leases.c.expires_at <= now_s),
        )
        .order_by(kernels.c.position)
        .limit(1)
    )
    if artifact_id is not None:
        chosen = chosen.where(kernels.c.artifact_id == artifact_id)
    found: str | None = connection.execute(chosen).scalar()
    if found is not None:
        connection.execute(delete(kernel_leases).where(kernel_leases.c.artifact_id == found))
        lease = {"artifact_id": found, "owner": owner, "expires_at": now_s + lease_s}
        connection.execute(insert(kernel_leases).values(lease))
    return found


def renew(connection: Connection, artifact_id: str, owner: str, expires_at_s: float) -> None:
    """Raise LeaseError if it is not ``owner``'s any more; late is in time if nobody came."""
    _check_owner(connection, artifact_id, owner)
    held = kernel_leases.c.artifact_id == artifact_id
    connection.execute(update(kernel_leases).where(held).values(expires_at=expires_at_s))


def release(connection: Connection, artifact_id: str, owner: str) -> None:
    _check_owner(connection, artifact_id, owner)
    connection.execute(delete(kernel_leases).where(kernel_leases.c.artifact_id == artifact_id))


def _check_owner(connection: Connection, artifact_id: str, owner: str) -> None:
    held = kernel_leases.c.artifact_id == artifact_id
    row: Row[Any] | None = connection.execute(select(kernel_leases).where(held)).first()
    holder = None if row is None else row.owner
    if holder != owner:
        raise LeaseError(f"kernel {artifact_id} is leased to {holder or 'nobody'}, not to {owner}")
