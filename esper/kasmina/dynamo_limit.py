"""A warning before dynamo gives up on a model that is compiled as a whole.

After ``recompile_limit`` variants it leaves a function uncompiled, and says so in one line of its
own log. Whoever calls ``torch.compile(model)`` meets that limit by two or three germinations.
"""

import logging
import sys

from torch import nn

from esper.kasmina.forms import MAX_FORMS

logger = logging.getLogger(__name__)


def warn_before_limit(model: nn.Module, seed: str) -> None:
    """Warn if the forms that a germination brings are more than dynamo will compile by default."""
    if "torch._dynamo" not in sys.modules:
        return
    import torch._dynamo.config as config

    num_variants, limit = _num_variants(model), config.recompile_limit
    if num_variants and num_variants + MAX_FORMS > limit:
        logger.warning(
            "%s: torch.compile has %d variants of the model and by default makes no more than %d, "
            "and a germination needs up to %d: then the model runs uncompiled (or raises, under "
            "fullgraph). esper.compile(model) compiles block by block; torch.compile(..., "
            "recompile_limit=...) sets the limit",
            seed,
            num_variants,
            limit,
            MAX_FORMS,
        )


def _num_variants(model: nn.Module) -> int:
    """Count what dynamo has compiled of the function that it counts for ``torch.compile(model)``."""
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list
    from torch._dynamo.external_utils import wrap_inline

    forward = type(model).forward
    if forward.__module__.startswith("torch.nn."):  # which dynamo does not compile by themselves
        forward = wrap_inline(forward)
    code = getattr(forward, "__code__", None)
    return 0 if code is None else len(_debug_get_cache_entry_list(code))
