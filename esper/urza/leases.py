"""Leases: which forge compiles a blueprint, and until when it may be silent.

A lease that ran out is not ended by anyone: the next claim takes the blueprint over.
"""

import math
from typing import Any

from sqlalchemy import Connection, Row, or_, select

from esper.contracts import BlueprintStatus, Lease
from esper.errors import LeaseError
from esper.urza.schema import blueprints

UNLEASED = {"lease_owner": None, "lease_expires_at": None, "leased_from": None}

_WAITING = blueprints.c.status == BlueprintStatus.UNVALIDATED
_COMPILED = blueprints.c.status == BlueprintStatus.COMPILED
_COMPILING = blueprints.c.status == BlueprintStatus.COMPILING
_PRIORITY = blueprints.c.tamiyo_interest + blueprints.c.urabrask_interest


def check_terms(owner: str, lease_s: float) -> None:
    if not owner:
        raise ValueError("a lease needs the name of its owner, got ''")
    if not (math.isfinite(lease_s) and lease_s > 0):
        raise ValueError(f"a lease must last a finite, positive number of seconds, got {lease_s}")


def next_claimable(
    connection: Connection, now_s: float, blueprint_id: str | None
) -> Row[Any] | None:
    """Return the row of the most interesting blueprint that waits or was left behind.

    Equally interesting ones come oldest first. Asked for by id, a COMPILED one may be had as well.
    """
    expires_at = blueprints.c.lease_expires_at
    left_behind = _COMPILING & or_(expires_at.is_(None), expires_at <= now_s)
    chosen = select(blueprints).order_by(_PRIORITY.desc(), blueprints.c.position).limit(1)
    if blueprint_id is None:
        chosen = chosen.where(or_(_WAITING, left_behind))
    else:
        chosen = chosen.where(
            blueprints.c.blueprint_id == blueprint_id, or_(_WAITING, left_behind, _COMPILED)
        )
    return connection.execute(chosen).first()


def lease_values(row: Row[Any], owner: str, expires_at_s: float) -> dict[str, Any]:
    """Return the columns of a new lease; one that is taken over started where the lost one did."""
    taken_over = row.status == BlueprintStatus.COMPILING
    source = (row.leased_from or BlueprintStatus.UNVALIDATED) if taken_over else row.status
    return {"lease_owner": owner, "lease_expires_at": expires_at_s, "leased_from": source}


def check_owner(row: Row[Any], owner: str | None, now_s: float) -> None:
    """Raise LeaseError unless ``owner`` holds the lease, or nobody holds one and none is claimed.

    A lease that ran out is its owner's until somebody takes it over.
    """
    if owner is None and (row.lease_expires_at is None or row.lease_expires_at <= now_s):
        return
    if owner != row.lease_owner:
        raise LeaseError(
            f"blueprint {row.blueprint_id} is leased to {row.lease_owner or 'nobody'}, not to "
            f"{owner or 'nobody'}"
        )


def leases_of(connection: Connection) -> tuple[Lease, ...]:
    """Return who compiles what, oldest blueprint first."""
    chosen = select(blueprints).where(blueprints.c.lease_owner.is_not(None))
    return tuple(
        Lease(
            blueprint_id=row.blueprint_id,
            owner=row.lease_owner,
            expires_at=row.lease_expires_at,
        )
        for row in connection.execute(chosen.order_by(blueprints.c.position))
    )
