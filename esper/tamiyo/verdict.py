"""Keep or cull: the counterfactual on held-out data, as a paired test."""

from esper.contracts import CommandKind, KasminaControlCommand, SeedEvaluation
from esper.tamiyo.policy import ModelView


def verdicts(view: ModelView, required_standard_errors: float) -> list[KasminaControlCommand]:
    """Judge every seed that was evaluated at the end of this epoch."""
    return [
        judge(view, evaluation, required_standard_errors)
        for evaluation in view.epochs[-1].evaluations
    ]


def judge(
    view: ModelView, evaluation: SeedEvaluation, required_standard_errors: float
) -> KasminaControlCommand:
    """Keep a seed whose contribution exceeds so many standard errors, and cull it otherwise.

    The contribution is the mean over held-out samples of the loss without the seed minus the loss
    with it, and the error that of the paired differences. It cannot see what the host has lost by
    adapting to the seed: where the loss is higher than before the host heard it, by so many standard
    errors of its own, the seed is rolled back.
    """
    kind, reason = _verdict(view, evaluation, required_standard_errors)
    return KasminaControlCommand(
        kind=kind,
        layer_name=evaluation.seed_id[0],
        seed_idx=evaluation.seed_id[1],
        epoch=view.epoch,
        reason=reason,
    )


def _verdict(
    view: ModelView, evaluation: SeedEvaluation, required_standard_errors: float
) -> tuple[CommandKind, str]:
    before = view.loss_before.get(evaluation.seed_id)
    by_chance = required_standard_errors * view.epochs[-1].val_loss_standard_error
    if before is not None and evaluation.loss_with - before > by_chance:
        return CommandKind.ROLL_BACK, (
            f"the held-out loss has risen from {before:.4f} to {evaluation.loss_with:.4f} since the "
            "host hears the seed"
        )
    needed = required_standard_errors * evaluation.standard_error
    keep = evaluation.contribution > needed
    return (CommandKind.KEEP if keep else CommandKind.CULL), _effect(
        evaluation.contribution, needed
    )


def _effect(contribution: float, needed: float) -> str:
    if not contribution > 0:
        return f"raises the held-out loss by {-contribution:.4f}"
    compared = "more" if contribution > needed else "no more"
    return (
        f"lowers the held-out loss by {contribution:.4f}, "
        f"{compared} than the {needed:.4f} that chance may do"
    )
