"""Which system calls a candidate may make: a seccomp filter for x86-64 and ARM64.

No sockets, no processes, no signals to others, no privileges, nothing that outlives the process.
Breaking in is not what a kernel does by mistake, so such a call ends the process with SIGSYS; what
a library may try in passing fails with EPERM. See seccomp(2).
"""

import ctypes
import errno
import os
import platform
import struct
from typing import NamedTuple

_PR_SET_SECCOMP = 22
_MODE_FILTER = 2

_KILL, _FAIL, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_AT_LEAST, _JUMP_IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16
_X32_BIT = 0x40000000  # other numbers for the same calls
_CLONE_THREAD = 0x00010000
_OPENS_FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class _Numbers(NamedTuple):
    """Of one call, by architecture; None where there is no such call."""

    x86_64: int | None
    aarch64: int | None


_KILLED = {
    # network
    "socket": _Numbers(41, 198),
    "socketpair": _Numbers(53, 199),
    "io_uring_setup": _Numbers(425, 425),
    # processes and programs
    "fork": _Numbers(57, None),
    "vfork": _Numbers(58, None),
    "execve": _Numbers(59, 221),
    "execveat": _Numbers(322, 281),
    # other people's processes
    "ptrace": _Numbers(101, 117),
    "process_vm_readv": _Numbers(310, 270),
    "process_vm_writev": _Numbers(311, 271),
    "pidfd_open": _Numbers(434, 434),
    "pidfd_getfd": _Numbers(438, 438),
    "pidfd_send_signal": _Numbers(424, 424),
    "tkill": _Numbers(200, 130),
    "rt_sigqueueinfo": _Numbers(129, 138),
    "rt_tgsigqueueinfo": _Numbers(297, 240),
    # privileges
    "mount": _Numbers(165, 40),
    "umount2": _Numbers(166, 39),
    "pivot_root": _Numbers(155, 41),
    "chroot": _Numbers(161, 51),
    "unshare": _Numbers(272, 97),
    "setns": _Numbers(308, 268),
    "move_mount": _Numbers(429, 429),
    "open_tree": _Numbers(428, 428),
    "fsopen": _Numbers(430, 430),
    "mount_setattr": _Numbers(442, 442),
    "bpf": _Numbers(321, 280),
    "perf_event_open": _Numbers(298, 241),
    "userfaultfd": _Numbers(323, 282),
    "keyctl": _Numbers(250, 219),
    "add_key": _Numbers(248, 217),
    "request_key": _Numbers(249, 218),
    "init_module": _Numbers(175, 105),
    "finit_module": _Numbers(313, 273),
    "delete_module": _Numbers(176, 106),
    "kexec_load": _Numbers(246, 104),
    "reboot": _Numbers(169, 142),
    "settimeofday": _Numbers(170, 170),
    "clock_settime": _Numbers(227, 112),
    "open_by_handle_at": _Numbers(304, 265),
    # what outlives the process
    "shmget": _Numbers(29, 194),
    "semget": _Numbers(64, 190),
    "msgget": _Numbers(68, 186),
    "mq_open": _Numbers(240, 180),
}

# Landlock does not speak of these.
_FAILED = {
    "chmod": _Numbers(90, None),
    "fchmod": _Numbers(91, 52),
    "fchmodat": _Numbers(268, 53),
    "fchmodat2": _Numbers(452, 452),
    "chown": _Numbers(92, None),
    "fchown": _Numbers(93, 55),
    "lchown": _Numbers(94, None),
    "fchownat": _Numbers(260, 54),
    "utime": _Numbers(132, None),
    "utimes": _Numbers(235, None),
    "futimesat": _Numbers(261, None),
    "utimensat": _Numbers(280, 88),
    "setxattr": _Numbers(188, 5),
    "lsetxattr": _Numbers(189, 6),
    "fsetxattr": _Numbers(190, 7),
    "removexattr": _Numbers(197, 14),
    "setpriority": _Numbers(141, 140),
    "sched_setparam": _Numbers(142, 118),
    "sched_setscheduler": _Numbers(144, 119),
    "sched_setattr": _Numbers(314, 274),
}

# For kernels without Landlock: what changes the file system.
_FAILED_WITHOUT_LANDLOCK = {
    "openat2": _Numbers(437, 437),
    "creat": _Numbers(85, None),
    "truncate": _Numbers(76, 45),
    "mkdir": _Numbers(83, None),
    "mkdirat": _Numbers(258, 34),
    "mknod": _Numbers(133, None),
    "mknodat": _Numbers(259, 33),
    "rmdir": _Numbers(84, None),
    "unlink": _Numbers(87, None),
    "unlinkat": _Numbers(263, 35),
    "rename": _Numbers(82, None),
    "renameat": _Numbers(264, 38),
    "renameat2": _Numbers(316, 276),
    "link": _Numbers(86, None),
    "linkat": _Numbers(265, 37),
    "symlink": _Numbers(88, None),
    "symlinkat": _Numbers(266, 36),
}

_CLONE, _CLONE3 = _Numbers(56, 220), _Numbers(435, 435)
_KILL_CALL, _TGKILL, _PRLIMIT = _Numbers(62, 129), _Numbers(234, 131), _Numbers(302, 261)
_OPEN, _OPENAT = _Numbers(2, None), _Numbers(257, 56)
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand


def available() -> bool:
    return platform.machine() in _ARCHITECTURES


def confine(*, writes: bool) -> None:
    """Filter this process's system calls from now on; ``writes=False`` opens no file for writing.

    The caller has set ``PR_SET_NO_NEW_PRIVS``.
    """
    program = _program(platform.machine(), os.getpid(), writes=writes)
    code = b"".join(struct.pack("<HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code)

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    argument = Program(len(program), ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(argument), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "the seccomp filter was refused")


def _program(machine: str, pid: int, *, writes: bool) -> list[Instruction]:
    def number(call: _Numbers) -> int | None:
        return call.x86_64 if machine == "x86_64" else call.aarch64

    kill, fail = _KILL, _FAIL | errno.EPERM
    program: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_JUMP_IF_EQUAL, 1, 0, _ARCHITECTURES[machine]),
        (_RETURN, 0, 0, kill),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_JUMP_IF_AT_LEAST, 0, 1, _X32_BIT),
        (_RETURN, 0, 0, kill),
    ]
    failed = _FAILED if writes else _FAILED | _FAILED_WITHOUT_LANDLOCK
    for calls, action in ((_KILLED, kill), (failed, fail)):
        for call in calls.values():
            program += _always(number(call), action)
    # Its flags lie in memory, which a filter cannot read; without it the C library calls clone.
    program += _always(number(_CLONE3), _FAIL | errno.ENOSYS)
    program += _unless_any_bit(number(_CLONE), 0, _CLONE_THREAD, kill)
    program += _unless_equal(number(_KILL_CALL), 0, (pid,), kill)
    program += _unless_equal(number(_TGKILL), 0, (pid,), kill)
    program += _unless_equal(number(_PRLIMIT), 0, (0, pid), kill)
    if not writes:
        program += _if_any_bit(number(_OPEN), 1, _OPENS_FOR_WRITING, fail)
        program += _if_any_bit(number(_OPENAT), 2, _OPENS_FOR_WRITING, fail)
    return [*program, (_RETURN, 0, 0, _ALLOW)]


def _always(number: int | None, action: int) -> list[Instruction]:
    return _guarded(number, [(_RETURN, 0, 0, action)])


def _if_any_bit(number: int | None, argument: int, bits: int, action: int) -> list[Instruction]:
    return _on_argument(number, argument, [(_JUMP_IF_ANY_BIT, 0, 1, bits), (_RETURN, 0, 0, action)])


def _unless_any_bit(number: int | None, argument: int, bits: int, action: int) -> list[Instruction]:
    return _on_argument(number, argument, [(_JUMP_IF_ANY_BIT, 1, 0, bits), (_RETURN, 0, 0, action)])


def _unless_equal(
    number: int | None, argument: int, values: tuple[int, ...], action: int
) -> list[Instruction]:
    tests = [(_JUMP_IF_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
    return _on_argument(number, argument, [*tests, (_RETURN, 0, 0, action)])


def _on_argument(number: int | None, argument: int, test: list[Instruction]) -> list[Instruction]:
    """Test the low half of an argument, then have the number loaded again."""
    load = (_LOAD, 0, 0, _ARGUMENTS_AT + 8 * argument)
    return _guarded(number, [load, *test, (_LOAD, 0, 0, _NUMBER_AT)])


def _guarded(number: int | None, then: list[Instruction]) -> list[Instruction]:
    return [] if number is None else [(_JUMP_IF_EQUAL, 0, len(then), number), *then]
