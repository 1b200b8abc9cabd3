"""What people are shown of a report."""

from rich.console import Console
from test_urabrask_risk import MANIFEST, report

from esper.contracts import RiskComparison, RiskSource, UrabraskValidationReport
from esper.urabrask.presentation import show
from esper.urabrask.risk import Experience, assessed, scored

COMPARISON = RiskComparison(
    num_outcomes=300,
    num_blueprints=60,
    rules_log_loss=0.69,
    model_log_loss=0.38,
    standard_error=0.04,
)


def shown(verdict: UrabraskValidationReport) -> list[str]:
    console = Console(width=200)
    with console.capture() as captured:
        show(verdict, console)
    return captured.get().splitlines()


def test_the_risk_is_shown_with_its_parts_and_who_judged_it() -> None:
    by_rules = assessed(report(), MANIFEST, Experience())
    by_model = scored(by_rules, 0.67, by_rules.confidence).model_copy(
        update={"risk_by": RiskSource.MODEL, "risk_reason": "better", "risk_comparison": COMPARISON}
    )
    lines = shown(by_model)
    assert "risk: 0.67 by the model" in lines
    assert "why by it: better" in lines
    assert f"confidence: {by_model.conf_level.value}" in lines
    [parts] = [line for line in lines if line.startswith("risk by the rules: ")]
    assert parts.startswith(f"risk by the rules: {by_rules.risk_score:.2f} (drift 0.000, size ")
    assert not any(line.startswith(("interest", "power")) for line in lines)


def test_power_and_interest_are_shown_where_there_are_any() -> None:
    plain = report()
    assert plain.measurement is not None
    taken = plain.measurement.model_copy(update={"power_w": 312.4, "energy_per_sample_mj": 0.25})
    lines = shown(plain.model_copy(update={"measurement": taken, "urabrask_interest": 0.75}))
    assert "power: 312 W, 0.25 mJ/sample" in lines
    assert "interest: 0.75: it is unlike its peers" in lines
