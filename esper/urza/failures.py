"""What goes wrong in a library, as HTTP tells it: one table, which server and client both go by."""

from collections.abc import Mapping
from http import HTTPStatus

from esper.contracts import Contract
from esper.errors import (
    ArtifactIntegrityError,
    ArtifactNotFoundError,
    AuditError,
    ConflictError,
    LeaseError,
    LibraryError,
    RoleError,
    TokenError,
    TooLargeError,
)

STATUS_OF: Mapping[type[Exception], int] = {
    ArtifactIntegrityError: 400,
    TokenError: 401,
    RoleError: 403,
    ArtifactNotFoundError: 404,
    ConflictError: 409,
    AuditError: 412,  # the log is not what the caller goes by
    TooLargeError: 413,
    ValueError: 422,
    LeaseError: 423,
    LibraryError: 503,
    OSError: 507,  # of the server's disk, mostly that it is full
}
ERROR_OF = {status: error for error, status in STATUS_OF.items()}
_BY_NAME = {error.__name__: error for error in STATUS_OF}


class Failure(Contract):
    """The body of every answer that is no success."""

    error: str  # name of a class in the table
    message: str


def told(error: Exception) -> tuple[int, Failure]:
    """Return the status and the body that tell of ``error``, by the nearest class in the table."""
    kind = next(base for base in type(error).__mro__ if base in STATUS_OF)
    return STATUS_OF[kind], Failure(error=kind.__name__, message=str(error))


def failure_in(body: bytes) -> Failure | None:
    """Return what an Urza has to say; None if something in between has answered instead."""
    try:
        return Failure.model_validate_json(body)
    except ValueError:
        return None


def heard(status: int, body: bytes, what: str) -> Exception:
    """Return the exception that the answer to ``what`` tells of."""
    failure = failure_in(body)
    if failure is not None:
        return _BY_NAME.get(failure.error, LibraryError)(failure.message)
    phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else "no known status"
    return ERROR_OF.get(status, LibraryError)(f"{what}: answered by {status} {phrase}")
