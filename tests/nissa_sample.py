"""A hand-made run for the tests of Nissa: one kernel kept, one removed, one rejected."""

import hashlib
import math

from esper.contracts import (
    Check,
    Design,
    EpochEvent,
    FieldReport,
    KernelManifest,
    KernelRecord,
    KernelStatus,
    LifecycleEvent,
    Measurement,
    Outcome,
    Pipeline,
    SeedEvaluation,
    SeedId,
    SeedState,
    SiteSignature,
    UrabraskValidationReport,
)
from esper.nissa.record import (
    AlphaSeries,
    KernelConsidered,
    LayerSummary,
    ResultRow,
    RunRecord,
    SeedSummary,
    StepLoss,
)

STEPS_PER_EPOCH = 40
KEPT: SeedId = ("layers.2", 0)
REMOVED: SeedId = ("layers.1", 1)
EPOCH = EpochEvent(
    epoch=1,
    step=40,
    train_loss=0.5,
    val_loss=0.6,
    val_loss_standard_error=0.01,
    val_accuracy=0.875,
)
GRADIENT_REASON = "the gradient of 'inp' is off by a factor of 2 against float64"


def empty_record(**fields: object) -> RunRecord:
    run = {"name": "empty", "network": "4-2", "command": "train", "seed": 0, "machine": "here"}
    clock = {"torch_version": "2.13", "started_at": 0.0, "duration_s": 0.0, "finished": False}
    return RunRecord.model_validate(run | clock | fields)


def sample_record() -> RunRecord:
    epochs = [_epoch(epoch) for epoch in range(1, 31)]
    return empty_record(
        name="digits",
        network="64-24-12-10",
        command="esper demo --seed 0",
        started_at=1.7e9,
        duration_s=74.2,
        finished=True,
        step_losses=[
            StepLoss(step=step, epoch=1 + (step - 1) // STEPS_PER_EPOCH, loss=_loss(step))
            for step in range(1, 30 * STEPS_PER_EPOCH + 1)
        ],
        epochs=epochs,
        lifecycle=[*_kept_lifecycle(), *_removed_lifecycle()],
        alphas=[_ramp(KEPT, 540, 1.0), _ramp(REMOVED, 860, 0.0)],
        before=_network(),
        after=_network(
            SeedSummary(
                index=0,
                state=SeedState.FOSSILIZED,
                design="low_rank",
                artifact_id=kernel("low_rank").kernel.artifact_id,
                parameters=352,
                contribution=0.162,
            )
        ),
        kernels=[kernel("low_rank"), kernel("gated"), rejected_kernel()],
        field_reports=[
            field_report(),
            field_report("gated", REMOVED, Outcome.CULLED, contribution=-0.003, epochs=(20, 25)),
        ],
        results=result_rows(),
        audit_head=_digest("audit"),
    )


def result_rows(static_accuracy: float = 0.9222) -> list[ResultRow]:
    return [
        ResultRow(label="small", parameters=1990, test_accuracy=0.8611, test_loss=0.441),
        ResultRow(
            label="grown by Esper",
            parameters=2342,
            test_accuracy=0.9139,
            test_loss=0.279,
            training_flops=3.5e9,
            note="one kernel kept",
            grown=True,
        ),
        ResultRow(
            label="large", parameters=4210, test_accuracy=static_accuracy, training_flops=6.6e9
        ),
    ]


def kernel(
    design: str,
    status: KernelStatus = KernelStatus.VALIDATED,
    checks: tuple[Check, ...] = (),
    *,
    report: bool = True,
) -> KernelConsidered:
    manifest = KernelManifest(
        blueprint_id=_digest(design),
        design=Design(name=design, builder="esper.blueprints:Any", hparams={"rank": 16}),
        pipeline=Pipeline.FAST,
        site=SiteSignature(host="Linear", inp_shape=(None, 12), act_shape=(None, 5), channel_dim=1),
        dtype="float32",
        device="cpu",
        torch_version="2.13",
        num_parameters=352,
        flops_per_sample=704,
        files={"graph.json": _digest("graph")},
    )
    record = KernelRecord(artifact_id=manifest.artifact_id, manifest=manifest, status=status)
    verdict = UrabraskValidationReport(
        artifact_id=manifest.artifact_id,
        status=status,
        checks=checks,
        measurement=Measurement(
            batch_size=32,
            forward_p50_us=11.2,
            forward_p99_us=15.0,
            forward_backward_p50_us=30.0,
            eager_forward_p50_us=11.9,
            memory_bytes=18432,
        ),
        max_relative_error=1.2e-7,
        machine="here",
        torch_version="2.13",
    )
    return KernelConsidered(kernel=record, report=verdict if report else None)


def rejected_kernel() -> KernelConsidered:
    return kernel(
        "bad_gradient",
        KernelStatus.REJECTED,
        (
            Check(name="safety", passed=True, reason="only known operators"),
            Check(name="gradients", passed=False, reason=GRADIENT_REASON),
        ),
    )


def field_report(
    design: str = "low_rank",
    seed_id: SeedId = KEPT,
    outcome: Outcome = Outcome.FOSSILIZED,
    *,
    contribution: float = 0.162,
    epochs: tuple[int, int] = (12, 18),
) -> FieldReport:
    return FieldReport(
        seed_id=seed_id,
        artifact_id=kernel(design).kernel.artifact_id,
        blueprint_id=_digest(design),
        outcome=outcome,
        reason="judged on held-out data",
        started_epoch=epochs[0],
        ended_epoch=epochs[1],
        num_parameters=352,
        evaluation=SeedEvaluation(
            seed_id=seed_id,
            loss_with=0.28,
            loss_without=0.28 + contribution,
            contribution=contribution,
            standard_error=0.011,
            num_samples=360,
        ),
    )


def _loss(step: int) -> float:
    grown = max(0, step - 14 * STEPS_PER_EPOCH)
    return 0.42 + 1.9 * math.exp(-step / 50) - 0.17 * (1 - math.exp(-grown / 120))


def _epoch(epoch: int) -> EpochEvent:
    loss = _loss(epoch * STEPS_PER_EPOCH)
    return EpochEvent(
        epoch=epoch,
        step=epoch * STEPS_PER_EPOCH,
        train_loss=loss,
        val_loss=1.06 * loss,
        val_loss_standard_error=0.01,
        val_accuracy=max(0.0, 1 - loss / 3),
    )


def _kept_lifecycle() -> list[LifecycleEvent]:
    return _lifecycle(
        KEPT,
        "low_rank",
        (SeedState.GERMINATED, 480, "validation loss flat over 4 epochs"),
        (SeedState.LOADING, 481, ""),
        (SeedState.TRAINING, 483, ""),
        (SeedState.GRAFTING, 540, ""),
        (SeedState.STABILIZATION, 600, ""),
        (SeedState.EVALUATING, 640, ""),
        (SeedState.FINE_TUNING, 641, ""),
        (SeedState.FOSSILIZED, 701, "contribution 0.162, 14.7 standard errors"),
    )


def _removed_lifecycle() -> list[LifecycleEvent]:
    return _lifecycle(
        REMOVED,
        "gated",
        (SeedState.GERMINATED, 800, "validation loss flat over 4 epochs"),
        (SeedState.LOADING, 801, ""),
        (SeedState.TRAINING, 802, ""),
        (SeedState.GRAFTING, 860, ""),
        (SeedState.STABILIZATION, 920, ""),
        (SeedState.EVALUATING, 960, ""),
        (SeedState.CULLED, 961, "contribution -0.003 does not exceed 1 standard error"),
        (SeedState.DORMANT, 1080, "embargo over"),
    )


def _lifecycle(
    seed_id: SeedId, design: str, *edges: tuple[SeedState, int, str]
) -> list[LifecycleEvent]:
    sources = [SeedState.DORMANT, *(state for state, _, _ in edges)]
    return [
        LifecycleEvent(
            seed_id=seed_id,
            source=source,
            target=target,
            epoch=1 + (step - 1) // STEPS_PER_EPOCH,
            step=step,
            artifact_id=kernel(design).kernel.artifact_id,
            reason=reason,
        )
        for source, (target, step, reason) in zip(sources, edges, strict=False)
    ]


def _ramp(seed_id: SeedId, start: int, end_alpha: float) -> AlphaSeries:
    ramp = [(start + i, 0.5 - 0.5 * math.cos(math.pi * i / 60)) for i in range(61)]
    return AlphaSeries(seed_id=seed_id, points=(*ramp, (961, 1.0), (962, end_alpha)))


def _network(last: SeedSummary | None = None) -> list[LayerSummary]:
    sizes = [(64, 24), (24, 12), (12, 10)]
    seeds = [[SeedSummary(index=0), SeedSummary(index=1)] for _ in sizes]
    seeds[-1][0] = last or seeds[-1][0]
    return [
        LayerSummary(
            fqn=f"layers.{i}",
            type="Linear",
            output_shape=(None, channels),
            channels=channels,
            host_parameters=(inputs + 1) * channels,
            seeds=tuple(seeds[i]),
        )
        for i, (inputs, channels) in enumerate(sizes)
    ]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
