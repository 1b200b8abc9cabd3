"""What the compilers say of the GPU kernels: every one was compiled for every architecture, and
none spills registers to memory. Needs no GPU, only a build with nvcc."""

import re
import shutil
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
CUDA_SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))

KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)")
ENTRY = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for 'sm_(?P<arch>\w+)'"
    r".*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def log_of(source: Path) -> str:
    log = BUILD / "CMakeFiles" / "_ops.dir" / "csrc" / "cuda" / f"{source.name}.o.log"
    if not log.exists():
        pytest.skip(f"needs a build with nvcc in {BUILD}: make build")
    return log.read_text()


def architectures() -> set[str]:
    [line] = re.findall("^ESPER_CUDA_ARCHS.*=(.*)$", (BUILD / "CMakeCache.txt").read_text(), re.M)
    return {re.match(r"\w+", arch).group() for arch in line.split(";")}


@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda source: source.name)
def test_every_kernel_is_compiled_for_every_architecture(source: Path) -> None:
    log = log_of(source)
    for kernel in KERNEL.findall(source.read_text()):
        found = {entry["arch"] for entry in ENTRY.finditer(log) if kernel in entry["symbol"]}
        assert found == architectures(), kernel


@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda source: source.name)
def test_no_kernel_spills(source: Path) -> None:
    entries = list(ENTRY.finditer(log_of(source)))
    assert len(entries) == log_of(source).count("Compiling entry function")
    spilling = [entry[0] for entry in entries if int(entry["stores"]) or int(entry["loads"])]
    assert not spilling
    assert all(0 < int(entry["registers"]) <= 255 for entry in entries)


def test_a_spill_is_seen() -> None:
    entry = ENTRY.search(
        "ptxas info    : Compiling entry function '_Z4tick' for 'sm_90'\n"
        "ptxas info    : Function properties for _Z4tick\n"
        "    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 0 barriers\n"
    )
    assert entry is not None
    assert entry.groupdict() == {
        "symbol": "_Z4tick",
        "arch": "90",
        "stores": "12",
        "loads": "8",
        "registers": "255",
    }
