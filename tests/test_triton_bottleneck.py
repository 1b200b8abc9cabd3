"""The Triton kernels of bottlenecks, as far as a machine without a GPU can judge them.

Their results are checked under the interpreter, and the very same source is compiled for a GPU
that need not be there. On a GPU, test_ops_bottleneck.py runs them for real.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402 - only where triton is installed
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from esper.kernels import bottleneck as kernels  # noqa: E402

TESTS = Path(__file__).parent
POINTERS = {
    "alpha_ptr": "*fp32",
    "non_finite_ptr": "*fp32",
    "fault_ptr": "*u8",
    "lost_ptr": "*i32",
}
KERNELS = (
    "_bottleneck_fwd_kernel",
    "_branch_gradient_kernel",
    "_activate_bwd_kernel",
    "_make_finite_kernel",
)


def test_results_under_the_interpreter() -> None:
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "interpreted_bottleneck.py",
        ],
        cwd=TESTS,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("activation", ["GELU", "TANH"])
@pytest.mark.parametrize("dtype", ["fp32", "fp64", "fp16", "bf16"])
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_hopper(name: str, dtype: str, activation: str) -> None:
    kernel = getattr(kernels, name)
    blocks = ("BLOCK_ROWS", "BLOCK_CHANNELS", "BLOCK_RANK", "BLOCK_SIZE")
    constants = {block: getattr(kernels, block) for block in blocks} | {
        "HAS_BIAS": True,
        "HAS_ALPHA": True,
        "ACTIVATION": getattr(kernels, activation).value,
        "COMPUTE": tl.float64 if dtype == "fp64" else tl.float32,
    }
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}

    def type_of(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument.endswith("_ptr"):
            return POINTERS.get(argument, f"*{dtype}")
        return "i32"

    signature = {argument: type_of(argument) for argument in kernel.arg_names}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32)
    )
    assert ".target sm_90" in compiled.asm["ptx"]
    assert compiled.asm["cubin"]
