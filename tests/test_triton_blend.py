"""The Triton kernels, as far as a machine without a GPU can judge them.

Their results are checked under the interpreter, and the very same source is compiled for a GPU
that need not be there. On a GPU, test_ops_blend.py runs them for real.
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

from esper.kernels import blend as kernels  # noqa: E402

TESTS = Path(__file__).parent
POINTERS = {
    "alpha_ptr": "*fp32",
    "non_finite_ptr": "*fp32",
    "fault_ptr": "*u8",
}


def test_results_under_the_interpreter() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "interpreted_blend.py"],
        cwd=TESTS,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("index", ["int32", "int64"])
@pytest.mark.parametrize("dtype", ["fp32", "fp64", "fp16", "bf16"])
@pytest.mark.parametrize("name", ["_blend_fwd_kernel", "_blend_bwd_kernel"])
def test_compiles_for_hopper(name: str, dtype: str, index: str) -> None:
    kernel = getattr(kernels, name)
    compute = "fp64" if dtype == "fp64" else "fp32"
    constants = {
        "BLOCK_SIZE": kernels.BLOCK_SIZE,
        "INDEX": getattr(tl, index),
        "COMPUTE": tl.float64 if dtype == "fp64" else tl.float32,
    }
    size = "i64" if index == "int64" else "i32"

    def type_of(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument == "partial_ptr":
            return f"*{compute}"
        if argument.endswith("_ptr"):
            return POINTERS.get(argument, f"*{dtype}")
        return size

    signature = {argument: type_of(argument) for argument in kernel.arg_names}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32)
    )
    assert ".target sm_90" in compiled.asm["ptx"]
    assert compiled.asm["cubin"]
