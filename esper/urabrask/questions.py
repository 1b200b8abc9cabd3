"""What the evaluator asks of a candidate's process, and what it is answered.

An answer is a claim: it comes from the process that the kernel runs in.
"""

from typing import Annotated, Literal

from pydantic import Field

from esper.contracts import Contract, KernelManifest
from esper.urabrask.roofline import Ceilings

KERNEL_LOADER = "esper.kasmina.compiled:build"

Microseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ReadyQuestion(Contract):
    """Shows that the process has come to life."""

    do: Literal["ready"] = "ready"


class PrepareQuestion(Contract):
    """Start the device, remember the surroundings, and give up the last rights.

    From here on a forbidden system call ends the process.
    """

    do: Literal["prepare"] = "prepare"
    device: str


class LoadQuestion(Contract):
    """Carries the artifact's files as ``file.<name>``; answered with the ``state.<name>``."""

    do: Literal["load"] = "load"
    loader: str = KERNEL_LOADER  # "module:function" with the arguments of Kernel.build
    manifest: KernelManifest


class RunQuestion(Contract):
    """One forward and backward, on ``inp``, ``act`` and ``grad_out``.

    ``act`` may be wider than the kernel's channels; the kernel is given its first channels, laid
    out as a layer lays out the chunk of a seed. Tensors ``state.<name>`` replace the values of
    parameters and buffers first.
    """

    do: Literal["run"] = "run"
    training: bool
    random_seed: int  # of torch's generators, set before the call
    strided: bool = False  # inp is every other element of a tensor twice as wide
    same_memory: bool = False  # the tensors come to lie where those of the last run lay
    poisoned: bool = False  # fresh memory holds nonsense
    autocast: bool = False  # in bfloat16, with act as a host gives it there
    twice: bool = False  # a second backward through the same graph


class TimeQuestion(Contract):
    """Forward, and forward with backward, of kernel and eager baseline in turn.

    In round ``i`` the input is ``inp`` times :func:`freshened` of ``i``, so that no two rounds see
    the same numbers. Answered with the output of round ``kept_round`` as ``out``.
    """

    do: Literal["time"] = "time"
    rounds: int
    kept_round: int
    profiled: bool = False  # peak memory too


class HoldQuestion(Contract):
    """Forward and backward ``rounds`` times, and what the process holds afterwards."""

    do: Literal["hold"] = "hold"
    rounds: int


class Ready(Contract):
    pass


class Prepared(Contract):
    """Said before any kernel is loaded."""

    device_name: str
    device_uuid: str = ""  # of a GPU
    ceilings: Ceilings = Ceilings()


class Loaded(Contract):
    changed: tuple[str, ...] = ()  # what is otherwise in the process than before


class Ran(Contract):
    """Comes with ``out``, with those of ``grad.inp``, ``grad.act`` and ``grad.state.<parameter>``
    that exist, with ``after.<name>`` for everything that the kernel was given, and with
    ``again.<gradient>`` for those of a second backward."""

    out_type: str  # qualified name of the class, and the layout if it is not strided
    out_device: str
    out_strides: tuple[int, ...] = ()
    out_shares_memory_with: tuple[str, ...] = ()
    overrun: tuple[str, ...] = ()  # tensors whose surrounding memory was written to
    changed: tuple[str, ...] = ()
    second_backward: str = ""  # how it was refused


class Timed(Contract):
    """Microseconds of each round. Forward includes the recording of the autograd graph."""

    forward_us: tuple[Microseconds, ...]
    forward_backward_us: tuple[Microseconds, ...]
    eager_forward_us: tuple[Microseconds, ...]
    eager_forward_backward_us: tuple[Microseconds, ...]
    memory_bytes: int = Field(default=0, ge=0)
    changed: tuple[str, ...] = ()

    @property
    def series(self) -> tuple[tuple[float, ...], ...]:
        """All latencies."""
        eager = (self.eager_forward_us, self.eager_forward_backward_us)
        return (self.forward_us, self.forward_backward_us, *eager)

    @property
    def total_us(self) -> float:
        return sum(map(sum, self.series))


class Held(Contract):
    allocated_bytes: int = Field(ge=0)
    python_blocks: int = Field(ge=0)


def freshened(round_index: int) -> float:
    """Return the factor of the input in a round: exact in every dtype, and soon back at 1."""
    return 1.0 + (round_index % 64) / 64
