"""Kernels that no artifact can express: loaders for the sandbox that give hostile modules.

Each takes the weights of an honest kernel and computes something else. They run in candidates'
processes only.
"""

import ctypes
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from esper.contracts import KernelManifest
from esper.kasmina.kernel import Kernel
from esper.urabrask import wire

Forward = Callable[[Kernel, Tensor, Tensor], object]
Loader = Callable[[KernelManifest, dict[str, bytes]], nn.Module]

CHANNEL_FD = 3


def loader(forward: Forward) -> Loader:
    def load(manifest: KernelManifest, files: dict[str, bytes]) -> nn.Module:
        kernel = Kernel.build(manifest, files)
        kernel.forward = partial(forward, kernel)  # type: ignore[method-assign]
        return kernel

    return load


def honest(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    return kernel.call(inp, act, kernel.weights())


@loader
def nan_output(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    out = honest(kernel, inp, act)
    return torch.cat((out[:, :-1], out[:, -1:] * torch.nan), dim=1)


@loader
def wrong_shape(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    return honest(kernel, inp, act)[:, :-1]


@loader
def wrong_dtype(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    return honest(kernel, inp, act).double()


@loader
def subclass(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    return nn.Parameter(honest(kernel, inp, act))


@loader
def tuple_output(kernel: Kernel, inp: Tensor, act: Tensor) -> object:
    return honest(kernel, inp, act), inp


@loader
def scaled(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    return honest(kernel, inp, act) * 1.01


@loader
def one_element_off(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    nudge = torch.zeros_like(act)
    nudge[-1, -1] = 1e-4
    return honest(kernel, inp, act) + nudge


@loader
def wrong_branch(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    """Gives the right output at the initial parameters, where the branch is zero."""
    return act + 2 * (honest(kernel, inp, act) - act)


@loader
def wrong_gradient(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    out = honest(kernel, inp, act)
    return out.detach() + 1.01 * (out - out.detach())


@loader
def detached_parameter(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    *others, last = kernel.weights()
    return kernel.call(inp, act, (*others, last.detach()))


@loader
def modifies_act(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    out = honest(kernel, inp, act)
    act.detach().mul_(2)
    return out


@loader
def modifies_parameter(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    out = honest(kernel, inp, act)
    kernel.weights()[-1].data += 1e-3
    return out


@loader
def returns_act(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    return act.view_as(act)


@loader
def counts_calls(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    calls = kernel.__dict__["calls"] = kernel.__dict__.get("calls", 0) + 1
    return honest(kernel, inp, act) + calls * 1e-7


@loader
def endless_loop(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    while True:
        pass


@loader
def sleeper(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    time.sleep(3600)
    return act


@loader
def exits(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    os._exit(0)


@loader
def segfaults(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    ctypes.string_at(0)
    return act


@loader
def dies_of_a_nameless_signal(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    os.kill(os.getpid(), 40)
    return act


@loader
def raises_nonsense(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    raise RuntimeError("\ud800" + 10_000 * "x")


@loader
def hogs_memory(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    return act + torch.ones(2**34, dtype=torch.uint8)[0]


@loader
def floods_stdout(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    while True:
        os.write(1, b"x" * 4096)


@loader
def writes_files(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    Path("trace").write_bytes(b"x")
    return honest(kernel, inp, act)


@loader
def forges_an_answer(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    """Answers in the harness's place; the nonce is not to be had by guessing."""
    header = {"out_type": "torch.Tensor", "out_device": "cpu"}
    os.write(CHANNEL_FD, wire.pack(b"0" * wire.NONCE_BYTES, header, {"out": act}))
    return honest(kernel, inp, act)


@loader
def talks_garbage(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    os.write(CHANNEL_FD, b"\xff" * 64)
    return honest(kernel, inp, act)


@loader
def leaves_a_daemon(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(3600)
        os._exit(0)
    return honest(kernel, inp, act)


@loader
def kills_its_server(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(3600)
    return act


@loader
def tells_what_it_sees(kernel: Kernel, inp: Tensor, act: Tensor) -> Tensor:
    descriptors = sorted(int(fd.name) for fd in Path("/proc/self/fd").iterdir())
    raise RuntimeError(f"environment {sorted(os.environ)}, descriptors {descriptors}")


def fails_to_load(manifest: KernelManifest, files: dict[str, bytes]) -> nn.Module:
    raise ValueError("no such luck")


def loads_other_weights(manifest: KernelManifest, files: dict[str, bytes]) -> nn.Module:
    kernel = Kernel.build(manifest, files)
    kernel.weights()[0].data[0, 0] += 1e-6
    return kernel
