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
from cubin import resources  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from esper.kernels import blend as kernels  # noqa: E402

TESTS = Path(__file__).parent


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


def signature_of(
    kernel: triton.JITFunction, types: dict[str, object], default: str
) -> tuple[dict[str, object], dict[tuple[int, ...], object]]:
    """Return the signature and the constants of a kernel; types that are no strings are constants.

    A pointer that has no type is ``default``, another argument int32.
    """
    signature, constants = {}, {}
    for place, name in enumerate(kernel.arg_names):
        given = types.get(name, default if name.endswith("_ptr") else "i32")
        if isinstance(given, str | tuple):
            signature[name] = given
        else:
            signature[name], constants[place,] = "constexpr", given
    return signature, constants


@pytest.mark.parametrize("num_outs", [1, 8])
@pytest.mark.parametrize("index", ["int32", "int64"])
@pytest.mark.parametrize("dtype", ["fp32", "fp64", "fp16", "bf16"])
@pytest.mark.parametrize("name", ["_blend_fwd_kernel", "_blend_bwd_kernel"])
def test_compiles_for_hopper_and_spills_nothing(
    name: str, dtype: str, index: str, num_outs: int, tmp_path: Path
) -> None:
    size = "i64" if index == "int64" else "i32"
    compute = "fp64" if dtype == "fp64" else "fp32"
    places = dict.fromkeys(("lows", "begins", "ends", "highs"), (size,) * num_outs)
    types = places | {
        "alpha_ptr": "*fp32",
        "non_finite_ptr": "*fp32",
        "fault_ptr": "*u8",
        "partial_ptr": f"*{compute}",
        "out_ptrs": (f"*{dtype}",) * num_outs,
        "grad_out_ptrs": (f"*{dtype}",) * num_outs,
        "seed_codes": ("i32",) * num_outs,
        "n_rows": size,
        "row_size": size,
        "BLOCK_ROWS": 16,
        "BLOCK_COLUMNS": kernels.BLOCK_SIZE // 16,
        "INDEX": getattr(tl, index),
        "COMPUTE": getattr(tl, "float64" if compute == "fp64" else "float32"),
    }
    assert_compiles(getattr(kernels, name), types, f"*{dtype}", tmp_path)


@pytest.mark.parametrize("absent", ["y_ptr partial_ptr", "grad_y_ptr", "grad_out_ptrs"])
def test_compiles_where_a_gradient_is_not_needed(absent: str, tmp_path: Path) -> None:
    types: dict[str, object] = {
        "alpha_ptr": "*fp32",
        "partial_ptr": "*fp32",
        "BLOCK_ROWS": 1,
        "BLOCK_COLUMNS": kernels.BLOCK_SIZE,
        "INDEX": tl.int32,
        "COMPUTE": tl.float32,
    }
    tuples = {"out_ptrs": "*fp32", "grad_out_ptrs": "*fp32", "seed_codes": "i32"}
    for name in ("lows", "begins", "ends", "highs"):
        tuples[name] = "i32"
    types |= {name: (kind, kind) for name, kind in tuples.items()}
    types |= dict.fromkeys(absent.split())
    if absent == "grad_out_ptrs":
        types[absent] = ("*fp32", "constexpr")
    assert_compiles(kernels._blend_bwd_kernel, types, "*fp32", tmp_path)


def assert_compiles(
    kernel: triton.JITFunction, types: dict[str, object], default: str, folder: Path
) -> None:
    signature, constants = signature_of(kernel, types, default)
    for place, given in enumerate(signature.values()):
        if isinstance(given, tuple):
            constants |= {(place, i): None for i, kind in enumerate(given) if kind == "constexpr"}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32)
    )
    assert ".target sm_90" in compiled.asm["ptx"]
    taken = resources(compiled.asm["cubin"], folder)
    assert taken.registers > 0
    assert (taken.stack_bytes, taken.local_bytes) == (0, 0)
