"""The ways to compile that a pipeline tries, on each kind of device."""

from esper.contracts import Pipeline
from esper.tezzeret.inductor import Variant

STANDARD = Variant("standard", {})

# Bounded, since each costs two runs of a C++ compiler.
_AGGRESSIVE = {
    "cpu": (
        STANDARD,
        Variant("contract", {"cpp.enable_floating_point_contract_flag": "fast"}),
        Variant(
            "stack",
            {
                "aot_inductor.allow_stack_allocation": True,
                "aot_inductor.compile_wrapper_opt_level": "O3",
            },
        ),
    ),
    "cuda": (
        STANDARD,
        Variant("autotune", {"max_autotune": True}),
        Variant("descend", {"coordinate_descent_tuning": True}),
    ),
}


def variants(pipeline: Pipeline, device: str) -> tuple[Variant, ...]:
    """Return what ``pipeline`` tries, beside the FAST program."""
    return (STANDARD,) if pipeline is Pipeline.STANDARD else _AGGRESSIVE[device]
