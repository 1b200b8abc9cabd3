"""Landlock and the seccomp filter, on processes of our own that have nothing to do with kernels."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from esper.urabrask import landlock, seccomp

needs_landlock = pytest.mark.skipif(landlock.version() == 0, reason="a Linux without Landlock")

CONFINED = """
import ctypes, os, socket, sys
from pathlib import Path
from esper.urabrask import landlock, seccomp
ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)
folder = Path(sys.argv[1])
"""


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a process of its own, after :data:`CONFINED`."""
    return subprocess.run(
        [sys.executable, "-c", CONFINED + code, str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@needs_landlock
def test_paths_are_read_and_written_as_they_are_allowed(tmp_path: Path) -> None:
    for name in ("readable", "writable", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    done = run(
        "landlock.confine([folder / 'readable', folder / 'missing'], [folder / 'writable'])\n"
        "for name in ('readable', 'writable', 'other'):\n"
        "    for flags in (os.O_RDONLY, os.O_WRONLY):\n"
        "        try:\n"
        "            os.open(folder / name / 'file', flags)\n"
        "            print(name, flags)\n"
        "        except PermissionError:\n"
        "            pass\n",
        tmp_path,
    )
    assert done.stdout.split("\n") == ["readable 0", "writable 0", "writable 1", ""], done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "socket.socket()",
        "socket.socketpair()",
        "os.fork()",
        "os.execv('/bin/true', ['true'])",
        "os.kill(1, 0)",
        "os.kill(-os.getpid(), 0)",
        "ctypes.CDLL(None).ptrace(0, 0, 0, 0)",
        "ctypes.CDLL(None).unshare(0)",
        "ctypes.CDLL(None).shmget(0, 4096, 0o600)",
    ],
)
def test_breaking_out_ends_the_process(tmp_path: Path, code: str) -> None:
    done = run(f"seccomp.confine(writes=True)\n{code}\n", tmp_path)
    assert done.returncode == -signal.SIGSYS, done.stderr


def test_what_libraries_try_fails_and_what_kernels_need_goes_on(tmp_path: Path) -> None:
    done = run(
        "import threading\n"
        "seccomp.confine(writes=True)\n"
        "try:\n"
        "    os.chmod(folder, 0o777)\n"
        "except PermissionError:\n"
        "    print('no chmod')\n"
        "os.kill(os.getpid(), 0)\n"
        "thread = threading.Thread(target=print, args=('thread',))\n"
        "thread.start()\n"
        "thread.join()\n"
        "(folder / 'file').write_text('written')\n",
        tmp_path,
    )
    assert done.stdout == "no chmod\nthread\n", done.stderr
    assert (tmp_path / "file").read_text() == "written"


def test_without_landlock_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    done = run(
        "seccomp.confine(writes=False)\n"
        "for change in ((folder / 'file').unlink, (folder / 'new').touch, (folder / 'd').mkdir,\n"
        "               lambda: os.rename(folder / 'file', folder / 'moved')):\n"
        "    try:\n"
        "        change()\n"
        "    except PermissionError:\n"
        "        print('refused')\n"
        "print((folder / 'file').read_text())\n",
        tmp_path,
    )
    assert done.stdout == "refused\n" * 4 + "kept\n", done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_every_jump_lands_within_the_program(machine: str) -> None:
    program = seccomp._program(machine, 42, writes=False)
    for index, (code, if_true, if_false, _) in enumerate(program):
        if code not in (seccomp._LOAD, seccomp._RETURN):
            assert index + 1 + max(if_true, if_false) < len(program)
            assert max(if_true, if_false) < 256
    assert program[-1] == (seccomp._RETURN, 0, 0, seccomp._ALLOW)
