"""What a kernel must leave alone in the process that it runs in.

The harness compares before and after. A kernel that is out to deceive shares its process and can
undo what it did in time; one that forgets to cannot.
"""

import builtins
import ctypes
import gc
import hashlib
import json
import os
import random
import signal
import socket
import sys
import threading
import time
import types
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.random  # which numpy imports when it is first used
import torch
from torch import nn

TORCH_RANDOM = "torch's random numbers"

_WATCHED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGSEGV, signal.SIGABRT)


class Surroundings:
    """The state of the process at one moment.

    ``harness`` are the modules that ask and answer, whose functions must stay what they are, as
    those of Python and PyTorch must.
    """

    def __init__(self, harness: Iterable[types.ModuleType]) -> None:
        self._harness = tuple(harness)
        self._values = _values()
        self._functions = {name: _functions(owner) for name, owner in _owners(self._harness)}

    def changed(self) -> tuple[str, ...]:
        """Return what is no longer as it was, in words."""
        now = _values()
        values = [name for name, value in self._values.items() if now[name] != value]
        return (*values, *self.patched())

    def patched(self) -> tuple[str, ...]:
        """Return the names of functions that were replaced."""
        return tuple(
            f"{name}.{attribute}"
            for name, owner in _owners(self._harness)
            for attribute, function in self._functions[name].items()
            if vars(owner).get(attribute) is not function
        )


def _owners(harness: tuple[types.ModuleType, ...]) -> list[tuple[str, object]]:
    of_python = (builtins, time, os, socket, json, gc, signal, threading, hashlib, random)
    of_torch = (torch, torch.autograd, torch.nn.functional, torch.testing, torch.cuda)
    named = [(module.__name__, module) for module in (*of_python, *of_torch, *harness)]
    return [*named, ("torch.Tensor", torch.Tensor), ("torch.nn.Module", nn.Module)]


def _functions(owner: object) -> dict[str, object]:
    return {name: value for name, value in vars(owner).items() if callable(value)}


def _values() -> dict[str, object]:
    """Return the state by name; reading it changes nothing."""
    return _of_torch() | _of_python() | _of_numbers()


def _of_torch() -> dict[str, object]:
    cuda = torch.cuda.is_initialized()
    return {
        "the default dtype": torch.get_default_dtype(),
        "the default device": torch.get_default_device(),
        "the number of threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "anomaly mode": torch.is_anomaly_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "the precision of products": (
            torch.get_float32_matmul_precision(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.backends.mkldnn.enabled,
        ),
        "cuDNN's settings": (torch.backends.cudnn.benchmark, torch.backends.cudnn.enabled),
        "the current stream": torch.cuda.current_stream().cuda_stream if cuda else None,
        "the current device": torch.cuda.current_device() if cuda else None,
    }


def _of_python() -> dict[str, object]:
    return {
        "the environment": tuple(sorted(os.environ.items())),
        "the working folder": str(Path.cwd()),
        "the import path": (*sys.path, *map(id, sys.meta_path)),
        "standard output": (id(sys.stdout), id(sys.stderr)),
        "signal handlers": tuple(map(signal.getsignal, _WATCHED_SIGNALS)),
        "a timer": signal.getitimer(signal.ITIMER_REAL)[0] > 0,
        "trace functions": (sys.gettrace(), sys.getprofile()),
        "garbage collection": (gc.isenabled(), gc.get_threshold(), len(gc.callbacks)),
        "the recursion limit": sys.getrecursionlimit(),
    }


def _of_numbers() -> dict[str, object]:
    """Random numbers, and how the processor rounds."""
    streams = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        streams.append(torch.cuda.get_rng_state())
    numpy_state = np.random.get_state(legacy=False)
    return {
        TORCH_RANDOM: b"".join(stream.numpy().tobytes() for stream in streams),
        "Python's random numbers": hash(random.getstate()),
        "NumPy's random numbers": str(numpy_state["state"]),
        "denormal numbers": _keeps_denormals(),
        "rounding": ctypes.CDLL(None).fegetround(),
    }


def _keeps_denormals() -> bool:
    return bool((torch.full((8,), 1e-40) * 1.0 > 0).all())
