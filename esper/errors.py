"""Every exception that Esper raises on purpose.

Wrong arguments raise ``ValueError`` or ``TypeError``. Everything else is an :class:`EsperError`,
so one ``except`` clause catches what went wrong inside Esper and nothing else.
"""


class EsperError(Exception):
    """Base of all errors that are not plainly a wrong argument."""


class LifecycleError(EsperError):
    """A seed was asked to take an edge that its lifecycle does not have; nothing was changed."""


class BlueprintError(EsperError):
    """A design cannot be traced, or its graph is not allowed: forbidden operator, wrong shape."""


class ForbiddenOperatorError(BlueprintError):
    """The graph calls an operator that no kernel may call."""


class DataDependentShapeError(BlueprintError):
    """What the graph does, or the size of what it computes, depends on the values of its inputs."""


class OutputMismatchError(BlueprintError):
    """The output is not like ``act`` in shape and dtype."""


class BudgetExceededError(BlueprintError):
    """The design has more parameters, computes more or holds more memory than is allowed."""


class ArtifactError(EsperError):
    """A kernel artifact cannot be used."""


class ArtifactNotFoundError(ArtifactError):
    """The library holds no artifact (or blueprint) of that id."""


class ArtifactNotValidatedError(ArtifactError):
    """The artifact exists, but the evaluator has not marked it VALIDATED."""


class ArtifactIntegrityError(ArtifactError):
    """Bytes do not match their digest, or a signature does not hold."""


class ArtifactMismatchError(ArtifactError):
    """The artifact was made for another site, dtype, device kind or torch version."""


class LibraryError(EsperError):
    """The library is damaged, unreachable, or was written by a newer version of Esper."""


class ConflictError(LibraryError):
    """What was asked for is not possible in the state that the library's entry is in."""


class AuditError(LibraryError):
    """The audit log's hash chain is broken; the message names the first bad row."""


class LeaseError(LibraryError):
    """A blueprint or a kernel is leased to somebody else, or to nobody."""


class TokenError(LibraryError):
    """The library's server wants a token, and knows none such as was shown."""


class RoleError(LibraryError):
    """The library's server does not let the token's roles do this."""


class TooLargeError(LibraryError):
    """The library's server takes no request of that size."""


class CheckpointError(EsperError):
    """A checkpoint is damaged, was written by a newer Esper, or belongs to another model."""


class WorkerError(EsperError):
    """A child process of the pipeline crashed, hung or answered with an error."""


class MachineError(WorkerError):
    """The machine failed a child process, whatever it was working on: a disk is full."""


class BusError(EsperError):
    """The message bus cannot take or deliver a message."""


class DistributedError(EsperError):
    """The ranks of a distributed run have lost each other, or their seeds have moved apart."""
