"""Keep or cull: the counterfactual on held-out data, as a paired test."""

from esper.contracts import CommandKind, KasminaControlCommand, SeedEvaluation
from esper.tamiyo.policy import ModelView


def verdicts(view: ModelView, required_standard_errors: float) -> list[KasminaControlCommand]:
    """Judge every seed that was evaluated at the end of this epoch."""
    return [
        judge(evaluation, view.epoch, required_standard_errors)
        for evaluation in view.epochs[-1].evaluations
    ]


def judge(
    evaluation: SeedEvaluation, epoch: int, required_standard_errors: float
) -> KasminaControlCommand:
    """Keep a seed whose contribution exceeds so many standard errors, and cull it otherwise.

    The contribution is the mean over held-out samples of the loss without the seed minus the loss
    with it, and the error that of the paired differences.
    """
    needed = required_standard_errors * evaluation.standard_error
    return KasminaControlCommand(
        kind=CommandKind.KEEP if evaluation.contribution > needed else CommandKind.CULL,
        layer_name=evaluation.seed_id[0],
        seed_idx=evaluation.seed_id[1],
        epoch=epoch,
        reason=_effect(evaluation.contribution, needed),
    )


def _effect(contribution: float, needed: float) -> str:
    if not contribution > 0:
        return f"raises the held-out loss by {-contribution:.4f}"
    compared = "more" if contribution > needed else "no more"
    return (
        f"lowers the held-out loss by {contribution:.4f}, "
        f"{compared} than the {needed:.4f} that chance may do"
    )
