"""The states of the random number generators that everybody in the process draws from."""

import random
import sys
from typing import Any

import torch


def random_state() -> dict[str, Any]:
    """Return the states of PyTorch's CPU and CUDA generators, Python's and, if imported, NumPy's.

    Synchronises with CUDA devices that are in use.
    """
    numpy = sys.modules.get("numpy")
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": random.getstate(),
        "numpy": None if numpy is None else _numpy_state(numpy),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Undo all draws since :func:`random_state`; CUDA devices that are not there are left out."""
    torch.set_rng_state(state["torch"])
    for device, generator_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(generator_state, device)
    random.setstate(state["python"])
    numpy = sys.modules.get("numpy")
    if numpy is not None and state["numpy"] is not None:
        numpy.random.set_state(state["numpy"])


def _numpy_state(numpy: Any) -> tuple[Any, ...]:
    name, keys, position, has_gauss, cached = numpy.random.get_state()
    return name, keys.tolist(), position, has_gauss, cached
