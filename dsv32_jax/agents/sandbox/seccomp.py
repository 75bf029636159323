"""A system call filter: what no sandboxed program needs is refused.

Namespaces and limits already confine a program; the filter takes away calls
that would get around a limit (memory that belongs to no process) or that have
been ways out of kernels before. It imports nothing of this project, because it
runs inside the sandbox.
"""

import ctypes
import errno
import platform
import struct
import sys

_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_SECCOMP = 22
_MODE_FILTER = 2

# Numbers on x86-64 and on 64-bit ARM (linux: syscall_64.tbl, unistd.h).
_REFUSED = {
  # Memory that is counted for nobody.
  'shmget': (29, 194),
  'shmat': (30, 196),
  'msgget': (68, 186),
  'semget': (64, 190),
  'mq_open': (240, 180),
  'memfd_create': (319, 279),
  'memfd_secret': (447, 447),
  # Other processes.
  'ptrace': (101, 117),
  'process_vm_readv': (310, 270),
  'process_vm_writev': (311, 271),
  'pidfd_getfd': (438, 438),
  'kcmp': (312, 272),
  # Namespaces and mounts of its own.
  'unshare': (272, 97),
  'setns': (308, 268),
  'mount': (165, 40),
  'umount2': (166, 39),
  'pivot_root': (155, 41),
  'chroot': (161, 51),
  'open_tree': (428, 428),
  'move_mount': (429, 429),
  'fsopen': (430, 430),
  'mount_setattr': (442, 442),
  # The kernel and the machine.
  'add_key': (248, 217),
  'request_key': (249, 218),
  'keyctl': (250, 219),
  'bpf': (321, 280),
  'perf_event_open': (298, 241),
  'userfaultfd': (323, 282),
  'io_uring_setup': (425, 425),
  'io_uring_enter': (426, 426),
  'io_uring_register': (427, 427),
  'fanotify_init': (300, 262),
  'open_by_handle_at': (304, 265),
  'init_module': (175, 105),
  'finit_module': (313, 273),
  'kexec_load': (246, 104),
  'reboot': (169, 142),
  'swapon': (167, 224),
  'acct': (163, 89),
  'settimeofday': (164, 170),
  'clock_settime': (227, 112),
  'clock_adjtime': (305, 266),
  'adjtimex': (159, 171),
  'personality': (135, 92),
  'syslog': (103, 116),
  'quotactl': (179, 60),
}
_CLONE = (56, 220)
# Its flags lie in memory, where a filter cannot look; C libraries fall back to
# clone when the kernel does not know it.
_CLONE3 = (435, 435)
_CLONE_NEWUSER = 0x10000000

_MACHINES = {'x86_64': (0, 0xC000003E), 'aarch64': (1, 0xC00000B7)}

# Instructions of classic BPF.
_LOAD = 0x20  # ld [offset]
_EQUAL = 0x15  # jeq value, then, else
_AT_LEAST = 0x35  # jge
_ANY_BIT = 0x45  # jset
_RETURN = 0x06
_ALLOW = 0x7FFF0000
_KILL = 0x80000000
_ERRNO = 0x00050000


def program(machine: str) -> bytes | None:
  """The filter as the kernel takes it, or None for machines without numbers."""
  if machine not in _MACHINES:
    return None
  column, architecture = _MACHINES[machine]
  code = [
    # Another architecture's numbers mean other calls.
    (_LOAD, 0, 0, 4),
    (_EQUAL, 1, 0, architecture),
    (_RETURN, 0, 0, _KILL),
    (_LOAD, 0, 0, 0),
  ]
  if machine == 'x86_64':  # The x32 numbers.
    code += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _ERRNO | 38)]
  for numbers in _REFUSED.values():
    code += [
      (_EQUAL, 0, 1, numbers[column]),
      (_RETURN, 0, 0, _ERRNO | errno.EPERM),
    ]
  code += [
    (_EQUAL, 0, 1, _CLONE3[column]),
    (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
    (_EQUAL, 0, 3, _CLONE[column]),
    (_LOAD, 0, 0, 16),  # The low half of the flags.
    (_ANY_BIT, 0, 1, _CLONE_NEWUSER),
    (_RETURN, 0, 0, _ERRNO | errno.EPERM),
    (_RETURN, 0, 0, _ALLOW),
  ]
  return b''.join(struct.pack('<HBBI', *line) for line in code)


def install() -> bool:
  """Filters this process and its children from now on.

  Returns:
    Whether it does: not on machines without numbers or kernels without filters.
  """
  if sys.byteorder != 'little' or sys.maxsize < 2**32:
    return False
  code = program(platform.machine())
  if code is None:
    return False
  libc = ctypes.CDLL(None, use_errno=True)
  libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
  text = ctypes.create_string_buffer(code, len(code))
  header = struct.pack('@HP', len(code) // 8, ctypes.addressof(text))
  return libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, header, 0, 0) == 0
