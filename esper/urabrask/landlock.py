"""What a candidate may see of the file system: a list of paths, enforced by Linux's Landlock.

Needs no privilege and no helper program, binds every thread of the process, and cannot be undone.
See landlock(7).
"""

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path

# The same numbers on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_ASK_VERSION = 1
_PATH_BENEATH = 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_TRUNCATE, _IOCTL_DEV = 1 << 14, 1 << 15
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_NO_TCP = 0b11  # bind, connect
_NO_ABSTRACT_SOCKETS_AND_SIGNALS = 0b11


class _Ruleset(ctypes.Structure):
    _fields_ = (
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),  # from version 4
        ("scoped", ctypes.c_uint64),  # from version 6
    )


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


_libc = ctypes.CDLL(None, use_errno=True)


def version() -> int:
    """Return the version of Landlock's interface; 0 where the kernel has none."""
    found: int = _libc.syscall(_CREATE_RULESET, None, 0, _ASK_VERSION)
    return max(0, found)


def confine(readable: Iterable[Path], writable: Iterable[Path]) -> None:
    """Let this process read below ``readable``, read and write below ``writable``, and no more.

    Paths that are not there are left out. TCP, and signals to processes outside, are refused by
    kernels that can (from versions 4 and 6). The caller has set ``PR_SET_NO_NEW_PRIVS``.
    """
    available = version()
    handled = _handled_access(available)
    attributes = _Ruleset(handled, _NO_TCP, _NO_ABSTRACT_SOCKETS_AND_SIGNALS)
    size = 8 if available < 4 else 16 if available < 6 else 24
    ruleset = _call(_CREATE_RULESET, ctypes.byref(attributes), ctypes.c_size_t(size), 0)
    for path in readable:
        _allow(ruleset, path, handled & (_READ_FILE | _READ_DIR))
    for path in writable:
        _allow(ruleset, path, handled & ~_EXECUTE)
    _call(_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _handled_access(available: int) -> int:
    """Every right that this version knows: what is handled and not allowed is refused."""
    rights = 13 + (available >= 2) + (available >= 3) + (available >= 5)
    return (1 << rights) - 1


def _allow(ruleset: int, path: Path, access: int) -> None:
    try:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    if not path.is_dir():
        access &= _OF_FILES
    rule = _PathBeneath(access, opened)
    _call(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(rule), 0)
    os.close(opened)


def _call(number: int, *arguments: object) -> int:
    result: int = _libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"Landlock's system call {number} failed")
    return result
