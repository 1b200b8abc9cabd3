"""The process that candidates are forked from.

It has imported torch but has never run an operator, so that a fork is cheap (about 10 ms) and
safe: forking a process whose OpenMP pool has been used hangs. It serves one candidate at a time,
and is told what to do over a ``SOCK_SEQPACKET`` socket: ``fork``, with the candidate's two file
descriptors attached, and ``reap``. When the other side goes away, it takes the candidate along.

A candidate inherits nothing but its channel, its log and a scratch folder. It is limited by
rlimits and, where Linux has it, by Landlock to reading what Python and PyTorch are made of; before
its artifact is loaded its system calls are filtered.
"""

import ctypes
import fcntl
import gc
import json
import os
import platform
import resource
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

# Imported here so that no candidate pays for it; torch imports symbolic_shapes (and with it
# sympy, 0.4 s) at the first backward, and the profiler at its first use.
import torch
import torch.autograd.profiler
import torch.fx.experimental.symbolic_shapes

import esper.urabrask.landlock as landlock
import esper.urabrask.seccomp as seccomp
from esper.urabrask import candidate

MESSAGE_LIMIT_BYTES = 2**16

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_CHANNEL_FD = 3
_OPEN_FILES = 64
_SPARE_TASKS = 16
_TELL_WHICH_GPU = ("CUDA_VISIBLE_DEVICES",)

# What Python and PyTorch are made of, and what they look up. No home, no library, no key.
_READABLE = (
    *map(Path, ("/usr", "/lib", "/lib64", "/proc", "/sys")),
    *map(Path, ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")),
    *map(Path, ("/etc/ld.so.cache", "/etc/localtime")),
    *map(Path, (sys.prefix, sys.base_prefix)),
    *(Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")),
    Path(__file__).parents[1],
    *map(Path, torch.__path__),
)


def main() -> None:
    control, scratch = socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2])
    # What a candidate forks and abandons becomes our child, so that it can be found and killed.
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    torch.set_num_threads(1)
    if not seccomp.available():
        sys.exit(f"no seccomp filter for {platform.machine()}: candidates cannot be confined")
    gc.freeze()  # a candidate's collections need not walk all of torch
    pid = 0
    while True:
        message, fds, _, _ = socket.recv_fds(control, MESSAGE_LIMIT_BYTES, maxfds=2)
        if not message:
            break
        job = json.loads(message)
        if job["do"] == "fork":
            pid = _fork(job, _emptied(scratch), channel_fd=fds[0], log_fd=fds[1])
            control.send(json.dumps({"pid": pid, "confinement": _confinement()}).encode())
        else:
            control.send(json.dumps({"status": _reap(pid)}).encode())
            pid = 0
    if pid:
        _reap(pid)
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(0)  # taking torch down in good order would take a second


def _confinement() -> str:
    """Say in a few words what holds a candidate, for the report."""
    if landlock.version():
        return f"rlimits, seccomp, Landlock {landlock.version()}"
    return "rlimits, seccomp without any writing"


def _emptied(scratch: Path) -> Path:
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(mode=0o700, exist_ok=True)
    return scratch


def _fork(job: dict[str, Any], scratch: Path, *, channel_fd: int, log_fd: int) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            _confine(job, str(scratch), channel_fd, log_fd)
            channel = socket.socket(fileno=_CHANNEL_FD)
            key = bytes.fromhex(job["key"])
            candidate.serve(channel, key, writes=landlock.version() > 0)
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(channel_fd)
    os.close(log_fd)
    return pid


def _confine(job: dict[str, Any], scratch: str, channel_fd: int, log_fd: int) -> None:
    """Give up everything that a candidate has no business with; there is no way back."""
    os.setsid()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _keep_only(channel_fd, log_fd)
    os.chdir(scratch)
    visible = {name: os.environ[name] for name in _TELL_WHICH_GPU if name in os.environ}
    os.environ.clear()
    os.environ.update(visible, HOME=scratch, TMPDIR=scratch)
    tempfile.tempdir = scratch  # it may have looked for one before
    for limited, limit in _limits(job).items():
        _limit(limited, limit, limit)
    if landlock.version():
        landlock.confine(
            readable=(*_READABLE, *map(Path, job["readable"])),
            writable=(Path(scratch), *Path("/dev").glob("nvidia*")),
        )
    # Past the soft limit it is sent SIGXCPU, which names the reason, and past the hard one SIGKILL.
    _limit(resource.RLIMIT_CPU, job["cpu_time_s"], job["cpu_time_s"] + 1)


def _keep_only(channel_fd: int, log_fd: int) -> None:
    channel, log = (fcntl.fcntl(fd, fcntl.F_DUPFD, _OPEN_FILES) for fd in (channel_fd, log_fd))
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2), (channel, _CHANNEL_FD)):
        os.dup2(source, target)
    os.closerange(_CHANNEL_FD + 1, os.sysconf("SC_OPEN_MAX"))


def _limits(job: dict[str, Any]) -> dict[int, int]:
    return {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: job["scratch_limit_bytes"],
        resource.RLIMIT_NOFILE: _OPEN_FILES,
        # Not RLIMIT_AS: the CUDA runtime reserves far more addresses than it uses.
        resource.RLIMIT_DATA: job["memory_limit_bytes"],
        # Counts the tasks of the user on the whole machine, so the limit is relative to them.
        # The kernel does not apply it to root.
        resource.RLIMIT_NPROC: _running_tasks() + _SPARE_TASKS,
    }


def _limit(limited: int, soft: int, hard: int) -> None:
    """Set a limit for good; one that is already lower stays as it is."""
    ceiling = resource.getrlimit(limited)[1]
    if ceiling != resource.RLIM_INFINITY:
        soft, hard = min(soft, ceiling), min(hard, ceiling)
    resource.setrlimit(limited, (soft, hard))


def _running_tasks() -> int:
    return int(Path("/proc/loadavg").read_text().split()[3].split("/")[1])


def _reap(pid: int) -> int:
    """Kill what is left of a candidate, and return the wait status of its first process."""
    _kill_group(pid)
    status = os.waitpid(pid, 0)[1]
    while orphans := _children():
        for orphan in orphans:
            os.kill(orphan, signal.SIGKILL)
            os.waitpid(orphan, 0)
    return status


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # it died before setsid()
        os.kill(pid, signal.SIGKILL)


def _children() -> list[int]:
    me = os.getpid()
    return [int(pid) for pid in Path(f"/proc/{me}/task/{me}/children").read_text().split()]


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


if __name__ == "__main__":
    main()
