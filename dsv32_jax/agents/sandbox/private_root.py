"""A file system of its own, for backends whose tool makes only namespaces.

It runs inside the new namespaces, before anything that is not trusted, and
imports nothing of this project.
"""

import ctypes
import os
import platform
from collections.abc import Sequence

_RDONLY, _NOSUID, _NODEV, _NOEXEC = 1, 2, 4, 8
_REMOUNT, _BIND, _REC, _PRIVATE = 32, 4096, 16384, 1 << 18
_DETACH = 2
_PIVOT_ROOT = {'x86_64': 155, 'aarch64': 41}
_DEVICES = ('null', 'zero', 'full', 'random', 'urandom')


def enter(
  mount_point: str,
  *,
  read_only: Sequence[str],
  links: dict[str, str],
  tmp_bytes: int,
) -> None:
  """Makes a small tree the root: all of it read-only but /tmp.

  Args:
    mount_point: an empty directory.
    read_only: directories and files that are seen at the same place.
    links: symbolic links, target by path.
    tmp_bytes: the most that /tmp holds.

  Raises:
    OSError: if the kernel refuses a step.
  """
  libc = ctypes.CDLL(None, use_errno=True)
  root = mount_point

  def mount(source, target, kind, flags, data=None):
    values = [v.encode() if v else None for v in (source, target, kind)]
    options = data.encode() if data else None
    if libc.mount(*values, ctypes.c_ulong(flags), options):
      number = ctypes.get_errno()
      raise OSError(number, f'mount {target}: {os.strerror(number)}')

  mount(None, '/', None, _REC | _PRIVATE)
  mount('tmpfs', root, 'tmpfs', _NOSUID | _NODEV, 'size=1m,mode=755')
  for path in read_only:
    target = root + path
    if os.path.isdir(path):
      os.makedirs(target, exist_ok=True)
    else:
      _touch(target)
    mount(path, target, None, _BIND | _REC)
  for path, target in links.items():
    os.symlink(target, root + path)
  os.mkdir(f'{root}/dev')
  for name in _DEVICES:
    _touch(f'{root}/dev/{name}')
    mount(f'/dev/{name}', f'{root}/dev/{name}', None, _BIND)
  os.mkdir(f'{root}/proc')
  mount('proc', f'{root}/proc', 'proc', _NOSUID | _NODEV | _NOEXEC)
  os.mkdir(f'{root}/tmp')
  options = f'size={tmp_bytes},nr_inodes=65536,mode=777'
  mount('tmpfs', f'{root}/tmp', 'tmpfs', _NOSUID | _NODEV, options)

  os.chdir(root)
  if libc.syscall(_PIVOT_ROOT[platform.machine()], b'.', b'.'):
    number = ctypes.get_errno()
    raise OSError(number, f'pivot_root: {os.strerror(number)}')
  if libc.umount2(b'.', _DETACH):
    number = ctypes.get_errno()
    raise OSError(number, f'umount: {os.strerror(number)}')
  os.chdir('/')
  for place in _mounted():
    if place.startswith(('/dev/', '/proc', '/tmp')):
      continue
    kept = os.statvfs(place).f_flag & (_NOSUID | _NODEV | _NOEXEC | 0x1C00)
    # The kernel counts access times with other bits here than statvfs does
    # only from 1024 on; those are equal.
    flags = _BIND | _REMOUNT | _RDONLY | _NOSUID | kept
    mount(None, place, None, flags)


def _touch(path: str) -> None:
  os.makedirs(os.path.dirname(path), exist_ok=True)
  with open(path, 'w', encoding='utf-8'):
    pass


def _mounted() -> list[str]:
  with open('/proc/self/mountinfo', encoding='utf-8') as file:
    places = [line.split()[4] for line in file]
  return [p.encode().decode('unicode_escape') for p in places]
