"""Builds the native part with CMake and Ninja; everything declarative is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SWITCHES = {"ESPER_CUDA": "AUTO", "ESPER_CUDA_ARCHS": "80;90;100", "ESPER_SANITIZE": ""}


def package_dir(name: str) -> Path:
    """Folder of an installed package, found without the seconds that importing torch takes."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"building esper needs {name}: use --no-build-isolation, see README")
    return Path(spec.origin).parent


def publish(built: Path, target: Path) -> None:
    """Put ``built`` at ``target`` in one step: a process may be importing the file there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f"{target.name}.{os.getpid()}")
    shutil.copy2(built, fresh)
    os.replace(fresh, target)


class CMakeBuild(build_ext):
    """Keeps CMake's build folder between commands, so that a rebuild compiles only what changed."""

    def run(self) -> None:
        kind = "-sanitized" if os.environ.get("ESPER_SANITIZE") else ""
        build_dir = ROOT / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}{kind}"
        configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build_dir)]
        # A switch left out would keep its value from an earlier build.
        configure += [f"-D{name}={os.environ.get(name, SWITCHES[name])}" for name in SWITCHES]
        configure += [
            f"-DESPER_TORCH_DIR={package_dir('torch')}",
            f"-Dpybind11_DIR={package_dir('pybind11') / 'share/cmake/pybind11'}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        subprocess.run(configure, check=True, env=environment)
        subprocess.run(["cmake", "--build", str(build_dir)], check=True, env=environment)
        # Not left to setuptools, which would copy onto the place where --inplace wants them.
        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name))
            if (build_dir / target.name).exists() or not ext.optional:
                publish(build_dir / target.name, target)

    def get_ext_filename(self, fullname: str) -> str:
        # _ops is no Python module but a library of torch ops, the same for every Python.
        if fullname.rpartition(".")[2] == "_ops":
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)


setup(
    packages=[*find_packages(include=["esper", "esper.*"]), "esper.kernels"],
    package_dir={"esper.kernels": "kernels"},
    ext_modules=[
        Extension("esper._host", []),
        Extension("esper._ops", []),
        Extension("esper._autograd", [], optional=True),
    ],
    cmdclass={"build_ext": CMakeBuild},
)
