"""The default policy: grow where the gradient asks for it, once the held-out loss stands still."""

from dataclasses import dataclass, field

from esper.config import TamiyoSettings
from esper.contracts import GraftingStrategy, KasminaControlCommand
from esper.tamiyo.offers import best_offer, germinate, may_begin
from esper.tamiyo.policy import ModelView
from esper.tamiyo.trend import Trend, fit_trend, plateau
from esper.tamiyo.verdict import verdicts


@dataclass(frozen=True)
class PlateauPolicy:
    """Grow where the gradient asks for it, once the held-out loss no longer falls.

    A seed under evaluation is kept if its contribution (held-out loss without it minus with it)
    exceeds ``required_standard_errors`` of its paired standard error, and culled otherwise. A new
    one is germinated when the slope of the held-out loss since the last change, and
    ``trend_standard_errors`` of its error, lie below ``min_relative_improvement`` for each
    ``window_epochs``, at the seed with the largest expected gain for its cost; but not while the
    held-out loss rises and the training loss falls, since then capacity is not what is missing.
    """

    settings: TamiyoSettings = field(default_factory=TamiyoSettings)
    strategy: GraftingStrategy = field(default_factory=GraftingStrategy)

    def decide(self, view: ModelView) -> list[KasminaControlCommand]:
        commands = verdicts(view, self.settings.required_standard_errors)
        if commands or not may_begin(view, self.settings, self.strategy):
            return commands
        trend = self._exhausted(view)
        offer = None if trend is None else best_offer(view, self.settings)
        if trend is None or offer is None:
            return []
        return [germinate(view, offer, self.strategy, self._reason(trend, offer.gain))]

    def _exhausted(self, view: ModelView) -> Trend | None:
        """Return the trend of the held-out loss if it shows that capacity is missing."""
        settings, since = self.settings, view.last_change_epoch
        window = settings.window_epochs
        recent = [event for event in view.epochs if since is None or event.epoch > since]
        held_out = [event.val_loss for event in recent or view.epochs[-window:]]
        if len(held_out) < window:
            held_out = [event.val_loss for event in view.epochs[-window:]]
        trend = plateau(
            held_out, window, settings.min_relative_improvement, settings.trend_standard_errors
        )
        if trend is None or trend.improvement >= 0:
            return trend
        trained = fit_trend([event.train_loss for event in view.epochs[-window:]], window)
        return None if trained.improvement > 0 else trend

    def _reason(self, trend: Trend, gain: float) -> str:
        direction = "falls" if trend.improvement >= 0 else "rises"
        return (
            f"the held-out loss {direction} by {abs(trend.improvement):.1%} in "
            f"{self.settings.window_epochs} epochs (standard error {trend.standard_error:.1%}); "
            f"the expected gain for its cost, {gain:.3g}, is the largest on offer"
        )
