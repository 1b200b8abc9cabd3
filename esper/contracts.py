"""Everything that travels or is stored: enums, messages and assets, as frozen pydantic models.

No torch here: the same contracts are read by the trainer, by the worker processes and by tools
that have no torch at all. Ids are lowercase hexadecimal SHA-256 digests of canonical JSON
(RFC 8785), so equal things have equal ids on every machine.
"""

import hashlib
import json
import math
import time
import uuid
from enum import IntEnum, StrEnum
from typing import Annotated, Any, ClassVar

import rfc8785
from pydantic import BaseModel, ConfigDict, Field, model_validator

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
SeedId = tuple[str, int]  # (layer FQN, seed index within the layer)
HyperParameter = bool | int | float | str

_LARGEST_EXACT = 2**53 - 1  # of the integers up to it, a JSON number has each


class SeedState(IntEnum):
    """Lifecycle state of a seed; the numbers are shared with ``csrc/seed_layout.h``.

    Each comment says what is allocated, and whose parameters the optimizer moves.
    """

    DORMANT = 0  # nothing
    GERMINATED = 1  # nothing; the seed is taken
    LOADING = 2  # a kernel is being prepared in the background
    TRAINING = 3  # kernel; the seed learns, host bit-exact
    GRAFTING = 4  # kernel; seed and host learn, alpha ramps
    STABILIZATION = 5  # kernel; the host learns, alpha fixed
    EVALUATING = 6  # kernel; the seed is frozen while its contribution is measured
    FINE_TUNING = 7  # kernel; seed and host learn, alpha 1
    FOSSILIZED = 8  # kernel, for good; the seed is frozen
    CULLED = 9  # nothing; embargoed
    CANCELLED = 10  # nothing
    ROLLED_BACK = 11  # nothing; locked


class BlueprintStatus(StrEnum):
    UNVALIDATED = "UNVALIDATED"
    COMPILING = "COMPILING"
    COMPILED = "COMPILED"
    INVALID = "INVALID"


class KernelStatus(StrEnum):
    PENDING_BENCHMARKING = "PENDING_BENCHMARKING"
    VALIDATED = "VALIDATED"
    REJECTED = "REJECTED"
    UNDECIDED = "UNDECIDED"  # right, but could not be measured well enough on this machine


class Pipeline(StrEnum):
    FAST = "FAST"
    STANDARD = "STANDARD"
    AGGRESSIVE = "AGGRESSIVE"


class RampCurve(IntEnum):
    """Shape of an alpha ramp; the numbers are shared with ``csrc/seed_layout.h``."""

    LINEAR = 0
    COSINE = 1
    SIGMOID = 2


class CommandKind(StrEnum):
    GERMINATE = "GERMINATE"
    KEEP = "KEEP"
    CULL = "CULL"
    ROLL_BACK = "ROLL_BACK"


class Outcome(StrEnum):
    FOSSILIZED = "FOSSILIZED"
    CULLED = "CULLED"
    CANCELLED = "CANCELLED"
    ROLLED_BACK = "ROLLED_BACK"
    FAILED = "FAILED"  # the kernel could not be loaded


class Confidence(StrEnum):
    HIGH = "High"
    MODERATE = "Moderate"
    SPECULATIVE = "Speculative"


class RiskSource(StrEnum):
    RULES = "rules"
    MODEL = "model"


class Topic(StrEnum):
    SEED_HEALTH = "telemetry.seed.health"
    KASMINA_COMMANDS = "control.kasmina.commands"
    FIELD_REPORTS = "innovation.field_reports"
    BLUEPRINT_SUBMITTED = "compilation.blueprint.submitted"
    KERNEL_READY = "compilation.kernel.ready"
    KERNEL_CHARACTERIZED = "validation.kernel.characterized"
    EPOCH = "system.events.epoch"
    LIFECYCLE = "system.events.lifecycle"
    TAMIYO_REQUESTS = "control.tamiyo.requests"
    TAMIYO_STATUS = "control.tamiyo.status"


class Contract(BaseModel):
    """Base of all contracts: immutable, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    def canonical(self) -> bytes:
        """Return the RFC 8785 canonical JSON of this contract."""
        return canonical_json(self.model_dump(mode="json"))

    def digest(self) -> str:
        """Return the SHA-256 of :meth:`canonical`."""
        return hashlib.sha256(self.canonical()).hexdigest()


def canonical_json(value: Any) -> bytes:
    """Serialise ``value`` as RFC 8785 canonical JSON, the form that is hashed and signed.

    JSON has no NaN and no infinities, yet a diverged loss must be told: they travel as strings,
    which pydantic reads back as numbers. And it writes 1e20 with all its digits, which Python reads
    back as an integer: that is the same number, and has the same form.
    """
    if _is_plain(value):  # Python's encoder writes it the same, and is faster
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    return rfc8785.dumps(_in_json(value))


def _is_plain(value: Any) -> bool:
    """Whether there are no floats, no large integers and nothing but ASCII in ``value``."""
    kind = type(value)
    if kind is str:
        return bool(value.isascii())
    if kind is int:
        return bool(-_LARGEST_EXACT <= value <= _LARGEST_EXACT)
    if kind is dict:
        return all(type(key) is str and key.isascii() for key in value) and all(
            map(_is_plain, value.values())
        )
    if kind is list or kind is tuple:
        return all(map(_is_plain, value))
    return value is None or kind is bool


def _in_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, int) and _LARGEST_EXACT < abs(value) < 10**21:
        return float(value) if rfc8785.dumps(float(value)) == str(value).encode() else value
    if isinstance(value, dict):
        return {key: _in_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_in_json(item) for item in value]
    return value


# ------------------------------------------------------------------ sites, blueprints, kernels


class SiteSignature(Contract):
    """What a kernel must fit: the shapes at one seed of one host layer, without dtype or device.

    ``inp_shape`` and ``act_shape`` hold ``None`` where any size is allowed (batch, height, ...).
    ``act_shape`` is the shape of the seed's chunk of the layer's output, ``channel_dim`` the
    dimension of ``act`` that was divided among the seeds (non-negative), ``batch_dim`` that of the
    samples. With ``shares_positions`` the input has the positions of ``act`` and differs from it in
    its channels only; a convolution's geometry tells how its positions correspond. The convolution
    fields are empty for other hosts.
    """

    host: str
    inp_shape: tuple[int | None, ...]
    act_shape: tuple[int | None, ...]
    channel_dim: int = Field(ge=0)
    # Left out where they say nothing: ids of before there were such sites stay what they were.
    batch_dim: int = Field(default=0, ge=0, exclude_if=lambda dim: dim == 0)
    shares_positions: bool = Field(default=True, exclude_if=lambda shares: shares)
    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()

    @property
    def act_channels(self) -> int:
        channels = self.act_shape[self.channel_dim]
        assert channels is not None
        return channels

    @property
    def inp_channels(self) -> int:
        """Size of the input's channel dimension; of ``act``'s where the input has none."""
        alike = len(self.inp_shape) == len(self.act_shape)
        channels = self.inp_shape[self.channel_dim] if alike else None
        return channels or self.act_channels

    @model_validator(mode="after")
    def _channel_dim_has_a_size(self) -> "SiteSignature":
        if self.channel_dim >= len(self.act_shape) or not self.act_shape[self.channel_dim]:
            raise ValueError(
                f"act_shape {self.act_shape} has no fixed, non-zero size at channel_dim {self.channel_dim}"
            )
        return self


class Design(Contract):
    """A builder and its hyper-parameters, before it has met a site.

    ``builder`` is an import path ``"package.module:Class"``; calling it with the site's signature
    and the hyper-parameters gives an ``nn.Module`` with ``forward(inp, act) -> out``.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    builder: str = Field(pattern=r"^[A-Za-z0-9_.]+:[A-Za-z0-9_.]+$")
    hparams: dict[str, HyperParameter] = {}


class Blueprint(Contract):
    """A design traced for one site. ``blueprint_id`` is the digest of everything else."""

    design: Design
    site: SiteSignature
    dtype: str
    graph_digest: Sha256  # of the canonical graph.json
    num_parameters: int = Field(ge=0)
    flops_per_sample: int = Field(ge=0)  # forward, multiply and add counted as two
    parents: tuple[Sha256, ...] = ()

    @property
    def blueprint_id(self) -> str:
        return self.digest()


class BlueprintRecord(Contract):
    """A blueprint as the library knows it."""

    blueprint_id: Sha256
    blueprint: Blueprint
    status: BlueprintStatus
    log: str = ""  # of the last change of status
    tamiyo_interest: float = Field(default=0.0, ge=0)  # how much the controller wants it
    urabrask_interest: float = Field(default=0.0, ge=0)  # how unusual the evaluator found it
    lease_owner: str | None = None  # the forge that is compiling it
    lease_expires_at: float | None = None  # seconds since the Unix epoch


class NativeTarget(Contract):
    """What machine code was compiled with and for; elsewhere it must not be loaded."""

    torch_version: str  # whole, with its build: "2.13.0+cpu"
    torch_git: str
    python: str  # "3.11"
    machine: str  # "x86_64"
    instructions: str  # digest of the processor's features, or "sm_90"
    cuda: str | None = None
    threads: int | None = None  # that loops on the CPU are divided among; others may exist


class Speedup(Contract):
    """Time of a baseline over that of something else: the median, and 20 % and 80 % quantiles."""

    median: float = Field(gt=0)
    low: float = Field(gt=0)
    high: float = Field(gt=0)

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f} to {self.high:.2f})"


class NativeBuild(Contract):
    """The machine code of an artifact: what it runs on, how it was made, and what it brings.

    It computes training steps. ``speedups`` tells how much faster than by the FAST program forward
    plus backward are, for each demand for gradients where the code is used: ``inp``, ``act`` and
    ``weights``, joined by ``+``.
    """

    target: NativeTarget
    variant: str  # one of the forge's, by name
    options: dict[str, HyperParameter]  # of the compiler
    speedups: dict[str, Speedup]
    gradient_error: float = Field(ge=0)  # largest, relative to the norm of the float64 reference


class Lease(Contract):
    """Which forge compiles a blueprint, and until when it may be silent."""

    blueprint_id: Sha256
    owner: str
    expires_at: float  # seconds since the Unix epoch


class KernelManifest(Contract):
    """Names every byte of an artifact; ``artifact_id`` is its digest."""

    format_version: int = 1
    blueprint_id: Sha256
    design: Design
    pipeline: Pipeline
    site: SiteSignature
    dtype: str  # "float32", ...
    device: str  # "cpu" or "cuda"
    torch_version: str  # "2.13": a kernel runs under the release it was validated with
    num_parameters: int = Field(ge=0)
    flops_per_sample: int = Field(ge=0)
    files: dict[str, Sha256]  # file name -> digest of its bytes
    # Left out where there is none: ids of FAST artifacts stay what they were.
    native: NativeBuild | None = Field(default=None, exclude_if=lambda build: build is None)

    @property
    def artifact_id(self) -> str:
        return self.digest()


class Compilation(Contract):
    """One attempt of a forge to make a kernel of a blueprint, and what came of it."""

    blueprint_id: Sha256
    pipeline: Pipeline
    device: str  # "cpu" or "cuda"
    torch_version: str  # "2.13"
    owner: str  # the forge
    artifact_id: Sha256 | None  # None: it failed
    log: str = ""
    wall_s: float = Field(ge=0, allow_inf_nan=False)
    cpu_s: float = Field(ge=0, allow_inf_nan=False)  # of the child processes that did the work


class RecompilationProspect(Contract):
    """A compiled blueprint, as a forge of one device and torch release looks at it."""

    blueprint_id: Sha256
    tamiyo_interest: float
    urabrask_interest: float
    rejected: bool  # it has kernels, and the evaluator turned all of them down
    tried: frozenset[Pipeline]


class ForgeStatus(Contract):
    """How the forges and evaluators of a library are doing: now, and over the last while."""

    blueprints: dict[BlueprintStatus, int]  # how many; what there is none of is left out
    kernels: dict[KernelStatus, int]
    leases: tuple[Lease, ...]  # who compiles what; one that ran out stays until it is taken over
    waiting_blueprints: int
    compiling_blueprints: int
    waiting_kernels: int  # for a verdict
    evaluating_kernels: int  # kept by an evaluator, who judges them or puts them off
    window_s: float  # over which the next four are counted
    compiled: dict[Pipeline, int]
    failed: int
    throughput_per_hour: float  # attempts that were finished
    utilisation: float  # forges at work on average: 0.5 is one for half of the time
    recompilations_today: int  # in the last 24 hours
    recompilation_cpu_s_today: float


class KernelStatement(Contract):
    """What the evaluator signs: this verdict on these bytes, for the reasons in that report."""

    artifact_id: Sha256
    status: KernelStatus
    report_digest: Sha256


class KernelRecord(Contract):
    """An artifact as the library knows it."""

    artifact_id: Sha256
    manifest: KernelManifest
    status: KernelStatus
    tags: tuple[str, ...] = ()
    latency_us: float | None = None  # p50 of the forward pass, as measured by the evaluator
    memory_bytes: int | None = None
    risk_score: float | None = None
    statement: KernelStatement | None = None
    signature: str | None = None  # hexadecimal Ed25519 signature over statement.canonical()
    archived: bool = False  # queries no longer find it


class KernelBundle(Contract):
    """All that a loader needs, fetched in one piece: the record and the very bytes to load."""

    record: KernelRecord
    files: dict[str, bytes]


class KernelQuery(Contract):
    """Asks the library for VALIDATED kernels that fit; answered by a ranked list."""

    site: SiteSignature
    dtype: str
    device: str
    required_tags: frozenset[str] = frozenset()
    preferred_tags: frozenset[str] = frozenset()
    excluded_tags: frozenset[str] = frozenset()
    max_latency_us: float | None = Field(default=None, gt=0)
    max_memory_bytes: int | None = Field(default=None, gt=0)
    max_parameters: int | None = Field(default=None, ge=0)
    limit: int = Field(default=16, gt=0, le=1000)


def _later(default: Any) -> Any:
    """A field that first versions did not write: left out where it says nothing.

    So what they wrote keeps its digest.
    """
    return Field(default=default, exclude_if=lambda value: bool(value == default))


class Check(Contract):
    """One question that the evaluator asked, and its answer."""

    name: str
    passed: bool
    reason: str
    numbers: dict[str, float] = {}


class Measurement(Contract):
    """Latencies of one kernel at one batch size, in microseconds, and its peak memory."""

    batch_size: int
    forward_mean_us: float | None = _later(None)
    forward_p50_us: float
    forward_p99_us: float
    forward_backward_mean_us: float | None = _later(None)
    forward_backward_p50_us: float
    forward_backward_p99_us: float | None = _later(None)
    eager_forward_p50_us: float  # the same blueprint as plain eager PyTorch, interleaved
    eager_forward_backward_p50_us: float | None = _later(None)
    samples_per_s: float | None = _later(None)  # forward and backward, at the median
    spread: float | None = _later(
        None
    )  # of the ratio to eager over blocks of rounds, by its median
    memory_bytes: int  # largest amount allocated at once during forward and backward
    power_w: float | None = _later(None)  # of the whole GPU while it trains batch after batch
    energy_per_sample_mj: float | None = _later(None)  # forward and backward, of the whole GPU


class RiskComparison(Contract):
    """The learned risk model against the rules, on outcomes that neither of them was fitted to."""

    num_outcomes: int
    num_blueprints: int
    rules_log_loss: float  # mean, in nats, as the next
    model_log_loss: float
    standard_error: float = Field(ge=0)  # of the difference, by blueprint

    @property
    def advantage(self) -> float:
        """How much less the model loses."""
        return self.rules_log_loss - self.model_log_loss

    @property
    def model_wins(self) -> bool:
        """Whether the model is better with a confidence of 95 percent, one-sided."""
        return self.advantage > 1.645 * self.standard_error


class UrabraskValidationReport(Contract):
    """Verdict on one artifact, with every check that led to it."""

    artifact_id: Sha256
    status: KernelStatus
    checks: tuple[Check, ...]
    measurement: Measurement | None = None
    max_relative_error: float | None = None  # against float64, forward and gradients
    tags: tuple[str, ...] = ()
    risk_score: float = Field(default=1.0, ge=0, le=1)
    risk_components: dict[str, float] = _later({})  # by the rules, whose score is their sum
    risk_by: RiskSource = _later(RiskSource.RULES)
    risk_reason: str = _later("")  # why by them, or by it
    risk_comparison: RiskComparison | None = _later(None)  # the last one, where there was any
    confidence: Confidence = Confidence.SPECULATIVE
    urabrask_interest: float = _later(0.0)  # in [0, 1], how unusual it is
    machine: str
    torch_version: str
    sandbox: str = _later("")  # what held the candidate; empty if none was started
    hidden_seed: int | None = _later(None)  # that the hidden cases were drawn from

    @property
    def conf_level(self) -> Confidence:
        """The name by which the original design knows the confidence."""
        return self.confidence


# ------------------------------------------------------------------------------------ messages


class HealthSignal(Contract):
    """Health of one seed's chunk of its layer's output, over one observed step."""

    seed_id: SeedId
    health_score: float = Field(ge=0, le=1)
    execution_time_us: float
    lifecycle_state: SeedState
    epoch: int
    step: int  # the observed one
    staleness_steps: int = Field(default=0, ge=0)  # from then until the signal was made
    mean: float
    variance: float
    dead_fraction: float = Field(ge=0, le=1)
    saturation: float | None = Field(default=None, ge=0, le=1)  # of a bounded activation
    non_finite: int
    gradient_energy: float  # mean squared gradient of the loss with respect to the chunk
    error_count: int


class HealthBatch(Contract):
    """All signals of one model at one step, so that a burst is one message."""

    signals: tuple[HealthSignal, ...]


class GraftingStrategy(Contract):
    """How long a seed stays in each state, in optimizer steps, and how alpha ramps."""

    training_steps: int = Field(default=60, ge=0)
    grafting_steps: int = Field(default=60, ge=1)
    stabilization_steps: int = Field(default=30, ge=0)
    fine_tuning_steps: int = Field(default=60, ge=0)
    alpha_target: float = Field(default=1.0, ge=0, le=1)
    curve: RampCurve = RampCurve.COSINE


class KasminaControlCommand(Contract):
    """An order to the execution layer. Applied between two steps, once per ``command_id``.

    It is stale, and refused, after ``valid_until_epoch``, and if it is about another kernel than
    the one in place (``artifact_id``, which only a germination must give).
    """

    command_id: str = Field(default_factory=lambda: uuid.uuid4().hex)
    kind: CommandKind
    layer_name: str
    seed_idx: int = Field(ge=0)
    artifact_id: Sha256 | None = None
    strategy: GraftingStrategy = GraftingStrategy()
    epoch: int  # the epoch on whose evidence the command was issued
    valid_until_epoch: int | None = None
    reason: str

    @model_validator(mode="after")
    def _germination_names_its_kernel(self) -> "KasminaControlCommand":
        if self.kind is CommandKind.GERMINATE and self.artifact_id is None:
            raise ValueError("a GERMINATE command without an artifact_id")
        return self


class SeedEvaluation(Contract):
    """The counterfactual: held-out loss without the seed minus with it, paired per sample."""

    seed_id: SeedId
    loss_with: float
    loss_without: float
    contribution: float
    standard_error: float
    num_samples: int


class EpochEvent(Contract):
    """End of an epoch, published by the training loop after validation."""

    epoch: int
    step: int
    train_loss: float
    val_loss: float
    val_loss_standard_error: float
    val_accuracy: float | None = None
    evaluations: tuple[SeedEvaluation, ...] = ()


class LifecycleEvent(Contract):
    """A seed took an edge of its lifecycle."""

    seed_id: SeedId
    source: SeedState
    target: SeedState
    epoch: int
    step: int
    artifact_id: Sha256 | None = None
    reason: str = ""


class FieldReport(Contract):
    """How one adaptation ended, for the library and for whoever improves designs."""

    seed_id: SeedId
    artifact_id: Sha256
    blueprint_id: Sha256
    outcome: Outcome
    reason: str
    started_epoch: int
    ended_epoch: int
    num_parameters: int
    evaluation: SeedEvaluation | None = None


class BlueprintSubmitted(Contract):
    blueprint_id: Sha256


class KernelReady(Contract):
    artifact_id: Sha256
    compile_s: float | None = Field(default=None, ge=0, exclude_if=lambda s: s is None)


class KernelCharacterized(Contract):
    artifact_id: Sha256
    status: KernelStatus
    tags: tuple[str, ...] = ()
    evaluation_s: float | None = Field(default=None, ge=0, exclude_if=lambda s: s is None)


class RequestKind(StrEnum):
    STATUS = "STATUS"
    PAUSE = "PAUSE"
    RESUME = "RESUME"


class TamiyoRequest(Contract):
    """Asks the controller to pause or to go on; it answers with its status in any case."""

    request_id: str = Field(default_factory=lambda: uuid.uuid4().hex)
    kind: RequestKind


class TamiyoStatus(Contract):
    """What the controller is about, in answer to a request."""

    request_id: str | None = None
    paused: bool
    policy: str
    epoch: int | None  # of the last epoch's end that it has heard of
    adapting: tuple[tuple[SeedId, SeedState], ...]
    num_adaptations: int
    num_parameters: int  # of the kernels in place or on their way, as the next two
    flops_per_sample: int
    memory_bytes: int


PAYLOADS: dict[Topic, type[Contract]] = {
    Topic.SEED_HEALTH: HealthBatch,
    Topic.KASMINA_COMMANDS: KasminaControlCommand,
    Topic.FIELD_REPORTS: FieldReport,
    Topic.BLUEPRINT_SUBMITTED: BlueprintSubmitted,
    Topic.KERNEL_READY: KernelReady,
    Topic.KERNEL_CHARACTERIZED: KernelCharacterized,
    Topic.EPOCH: EpochEvent,
    Topic.LIFECYCLE: LifecycleEvent,
    Topic.TAMIYO_REQUESTS: TamiyoRequest,
    Topic.TAMIYO_STATUS: TamiyoStatus,
}


class OonaMessage(BaseModel):
    """Envelope of everything on the bus; ``payload`` is the contract that belongs to the topic."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, extra="forbid", ser_json_inf_nan="strings"
    )

    topic: Topic
    sender_id: str
    payload: Contract
    event_id: str = Field(default_factory=lambda: uuid.uuid4().hex)
    trace_id: str = Field(default_factory=lambda: uuid.uuid4().hex)
    timestamp: float = Field(default_factory=time.time)  # seconds since the Unix epoch

    @model_validator(mode="before")
    @classmethod
    def _payload_by_topic(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("payload"), dict):
            return data | {
                "payload": PAYLOADS[Topic(data["topic"])].model_validate(data["payload"])
            }
        return data

    @model_validator(mode="after")
    def _payload_fits_topic(self) -> "OonaMessage":
        expected = PAYLOADS[self.topic]
        if type(self.payload) is not expected:
            raise ValueError(
                f"topic {self.topic} carries {expected.__name__}, got {type(self.payload).__name__}"
            )
        return self

    def to_json(self) -> bytes:
        return self.model_dump_json(serialize_as_any=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "OonaMessage":
        return cls.model_validate_json(data)
