"""Settings of every subsystem, as frozen pydantic models with the defaults written out once."""

from pathlib import Path

from pydantic import Field

from esper.contracts import Contract


class SeedSettings(Contract):
    """What ``esper.wrap`` decides for a model."""

    seeds_per_layer: int = Field(default=4, ge=1)
    telemetry_enabled: bool = True
    observe_every: int = Field(default=64, ge=1)  # steps between two observed ones
    max_errors: int = Field(default=3, ge=1)  # steps with a fault before a seed is quarantined
    embargo_steps: int = Field(default=200, ge=0)  # CULLED lasts that long before DORMANT
    cache_capacity_bytes: int = Field(default=256 * 2**20, ge=0)
    deterministic: bool = False  # steps wait for kernels that are being loaded
    # Of a copy of the host on the CPU, made before it hears a seed; a larger one cannot roll back.
    rollback_capacity_bytes: int = Field(default=256 * 2**20, ge=0)


class ForgeSettings(Contract):
    """Limits of Tezzeret: what a blueprint may cost, and what compiling it may cost."""

    max_parameters: int = Field(default=10_000_000, ge=0)
    max_flops_per_sample: int = Field(default=1_000_000_000, ge=0)
    max_memory_bytes: int = Field(default=2**30, ge=0)  # weights, and all that a sample computes
    timeout_s: float = Field(default=120.0, gt=0)  # of tracing, and of FAST
    optimizing_timeout_s: float = Field(default=900.0, gt=0)  # of the other pipelines
    lease_s: float = Field(default=60.0, gt=0)  # after which a silent forge is taken for lost
    poll_interval_s: float = Field(default=5.0, gt=0)  # between two looks at what waits
    recompiles_when_idle: bool = False
    max_load_per_core: float = Field(default=0.75, gt=0)  # above which a machine is not idle
    aggressive_interest: float = Field(default=1.0, gt=0)  # of the controller, for AGGRESSIVE
    max_recompilations_per_day: int = Field(default=500, ge=0)  # by all forges of a library
    max_recompilation_cpu_s_per_day: float = Field(default=7200.0, ge=0)  # the same
    niceness: int = Field(default=10, ge=0, le=19)
    memory_limit_bytes: int = Field(default=8 * 2**30, gt=0)


class EvaluatorSettings(Contract):
    """Limits and thresholds of Urabrask."""

    timeout_s: float = Field(default=60.0, gt=0)  # for which one candidate is waited for
    cpu_time_s: int = Field(default=30, gt=0)
    memory_limit_bytes: int = Field(default=8 * 2**30, gt=0)
    scratch_limit_bytes: int = Field(default=2**28, ge=0)  # of a file that its loader unpacks
    log_limit_bytes: int = Field(default=2**16, ge=0)  # that a candidate may print
    answer_limit_bytes: int = Field(default=2**28, gt=0)  # of results, at a time
    niceness: int = Field(default=10, ge=0, le=19)
    lease_s: float = Field(default=60.0, gt=0)  # after which a silent evaluator is taken for lost
    undecided_for_s: float = Field(default=600.0, gt=0)  # until another try at measuring
    poll_interval_s: float = Field(default=5.0, gt=0)  # between two looks at what waits
    batch_sizes: tuple[int, ...] = Field(default=(1, 7, 32), min_length=1)
    timed_batch_size: int = 32
    timed_rounds: int = Field(default=3, ge=1)  # in a block, at the least
    timed_block_s: float = Field(default=0.05, gt=0)  # that a block lasts, at the least
    timed_blocks: int = Field(default=5, ge=3)
    max_spread: float = Field(default=0.5, gt=0)  # of the blocks' medians; wider is UNDECIDED
    measured_again: int = Field(default=2, ge=0)  # times, while the spread is wider than half of it
    seed: int = 0  # of the cases that the report's numbers come from; others are drawn in secret


class TamiyoSettings(Contract):
    """When Tamiyo acts, and what her kernels may cost. A budget is for all of a model together."""

    window_epochs: int = Field(default=4, ge=2)  # over which the slope of the loss is fitted
    min_relative_improvement: float = 0.02  # less than this per window is a plateau
    trend_standard_errors: float = Field(default=1.0, ge=0)  # of the slope, to be sure of that
    warmup_epochs: int = Field(default=4, ge=0)
    cooldown_epochs: int = Field(default=2, ge=0)  # after an adaptation ended
    embargo_epochs: int = Field(default=4, ge=0)  # for a seed where a kernel was culled
    # Of the run, if it is known: nothing begins that could not be judged, and undone, by then.
    last_epoch: int | None = Field(default=None, ge=0)
    max_adaptations: int = Field(default=8, ge=0)
    max_concurrent: int = Field(default=1, ge=1)  # adaptations under way
    max_parameters: int | None = Field(default=None, ge=0)
    max_flops_per_sample: int | None = Field(default=None, ge=0)
    max_memory_bytes: int | None = Field(default=None, ge=0)  # as the evaluator measured it
    max_risk_score: float | None = Field(default=None, ge=0, le=1)  # of any one kernel
    required_tags: frozenset[str] = frozenset()
    excluded_tags: frozenset[str] = frozenset()
    required_standard_errors: float = 1.645  # of a contribution, to be kept: 95 %, one-sided
    # A rise of the loss by so many times itself is rolled back; a ramp may cost several for a while.
    explosion_factor: float = Field(default=10.0, gt=0)
    command_lifetime_epochs: int = Field(default=16, ge=0)  # for which a decision holds


class BusSettings(Contract):
    """What Oona holds over Redis, and how long it waits."""

    capacity: int = Field(default=16_384, ge=1)  # unacknowledged control messages of a topic
    telemetry_capacity: int = Field(default=1024, ge=1)  # messages of a topic, here and in Redis
    telemetry_limit_bytes: int = Field(default=64 * 2**20, gt=0)  # of a topic in Redis, about
    max_deliveries: int = Field(default=5, ge=1)
    lease_s: float = Field(default=30.0, gt=0)  # after which a dead consumer's work goes to others
    forget_group_s: float = Field(default=86_400.0, gt=0)  # for which no consumer has shown itself
    timeout_s: float = Field(default=2.0, gt=0)  # for one answer of Redis
    poll_s: float = Field(default=1.0, gt=0)  # between two looks at what nobody announced
    close_timeout_s: float = Field(default=5.0, gt=0)
    spool_folder: Path | None = None  # of the local log; None: the user's state folder
    spool_limit_bytes: int = Field(default=256 * 2**20, gt=0)
