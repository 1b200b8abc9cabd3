"""What a compiler finds in a process beside the graph, and what its cache is keyed by as well."""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.config
from torch._inductor.runtime.cache_dir_utils import cache_dir

from esper.kasmina.traced import Json, UnportableGraphError

_MATMUL = (
    "fp32_precision",
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
)
_CONFIGS = {"inductor": torch._inductor.config, "functorch": torch._functorch.config}


def write_ambient(options: dict[str, Any]) -> Json:
    """Return what :func:`ambient` needs; ``options`` are Inductor's, as ``torch.compile`` has them."""
    state = {
        "cache_dir": cache_dir(),
        "num_threads": torch.get_num_threads(),
        "grad_enabled": torch.is_grad_enabled(),
        "default_dtype": _name(torch.get_default_dtype()),
        "matmul": {name: getattr(torch.backends.cuda.matmul, name) for name in _MATMUL},
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "autocast": {
            device: _name(torch.get_autocast_dtype(device))
            for device in torch._C._autocast_supported_devices()
            if torch.is_autocast_enabled(device)
        },
        "configs": {name: _changed(config) for name, config in _CONFIGS.items()},
        "options": options,
    }
    try:
        json.dumps(state)
    except TypeError as error:
        raise UnportableGraphError(f"the compiler's settings: {error}") from None
    return state


@contextlib.contextmanager
def ambient(state: Json) -> Iterator[None]:
    """Have the process in that state; what concerns the whole of it stays so."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = state["cache_dir"]
    torch.set_num_threads(state["num_threads"])
    torch.set_default_dtype(getattr(torch, state["default_dtype"]))
    for name, value in state["matmul"].items():
        # To be set to what it is may change it: from what is left open to what that means.
        if getattr(torch.backends.cuda.matmul, name) != value:
            setattr(torch.backends.cuda.matmul, name, value)
    torch.use_deterministic_algorithms(state["deterministic"], warn_only=state["warn_only"])
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(state["grad_enabled"]))
        for device, dtype in state["autocast"].items():
            stack.enter_context(torch.autocast(device, getattr(torch, dtype)))
        for name, changed in state["configs"].items():
            stack.enter_context(_CONFIGS[name].patch(changed))
        yield


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _changed(config: Any) -> dict[str, Any]:
    """Return the settings that are not what they are by default."""
    settings: dict[str, Any] = config.save_config_portable()
    return {name: value for name, value in settings.items() if not config._is_default(name)}
