"""Which walls stand around a sandbox, and the commands that raise them."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, Literal, get_args

BackendName = Literal['bubblewrap', 'unshare', 'unsafe_rlimits']
NAMES: tuple[str, ...] = get_args(BackendName)
# In the order of preference. Limits alone keep nothing apart, so that backend
# is never chosen for anybody.
AUTOMATIC: tuple[str, ...] = ('bubblewrap', 'unshare')

# What a dynamically linked interpreter needs beside its own prefix.
_SYSTEM = ('/usr', '/lib', '/lib32', '/lib64', '/bin', '/sbin')
_FILES = ('/etc/ld.so.cache',)
# User ids that belong to nobody; one is drawn for each sandbox, so that limits
# that count by user count for it alone.
_USER_IDS = (1 << 24, 1 << 30)
_HERE = pathlib.Path(__file__).parent
# In the order in which they import each other.
_INSIDE = (
  'seccomp',
  'private_root',
  'leftovers',
  'repl',
  'child',
  'watch',
  'session',
  'supervisor',
)


@dataclasses.dataclass(frozen=True)
class Walls:
  """How to start the supervisor.

  Attributes:
    command: of it, to be run without an environment.
    is_safe: it may run what nobody has read.
  """

  command: list[str]
  is_safe: bool


@contextlib.contextmanager
def walls(name: str, *, disk_bytes: int) -> Iterator[Walls]:
  """The command of a backend, for one sandbox.

  Args:
    name: one of `NAMES`.
    disk_bytes: the most that its file system holds.

  Raises:
    ValueError: unknown names.
    FileNotFoundError: if the backend's tool is not installed.
  """
  as_root = _is_root()
  if name == 'bubblewrap':
    yield Walls(_bubblewrap(disk_bytes, as_root), is_safe=True)
  elif name == 'unshare':
    with tempfile.TemporaryDirectory(prefix='sandbox-') as mount_point:
      yield Walls(_unshare(disk_bytes, as_root, mount_point), is_safe=True)
  elif name == 'unsafe_rlimits':
    with tempfile.TemporaryDirectory(prefix='sandbox-') as top:
      settings = {'uid': None, 'top': top, 'is_isolated': False}
      yield Walls(_python(settings), is_safe=False)
  else:
    raise ValueError(f'backend: got {name!r}, expected one of {list(NAMES)}')


def _bubblewrap(disk_bytes: int, as_root: bool) -> list[str]:
  command = [
    _tool('bwrap'),
    *('--unshare-pid', '--unshare-net', '--unshare-ipc', '--unshare-uts'),
    *('--unshare-cgroup-try', '--as-pid-1', '--clearenv'),
    *('--hostname', 'sandbox'),
  ]
  if as_root:
    command += ['--cap-drop', 'ALL']
    for right in ('CAP_SETUID', 'CAP_SETGID', 'CAP_SETPCAP'):
      command += ['--cap-add', right]
  else:
    command += ['--unshare-user', '--disable-userns']
    command += ['--uid', '65534', '--gid', '65534']
  read_only, links = _tree()
  for path in read_only:
    # Left to itself, bubblewrap gives the directories above the rights they
    # have outside, such as root's for /root.
    for parent in reversed(pathlib.PurePath(path).parents[:-1]):
      command += ['--perms', '0755', '--dir', str(parent)]
    command += ['--ro-bind', path, path]
  for path, target in links.items():
    command += ['--symlink', target, path]
  command += ['--proc', '/proc', '--dev', '/dev', '--remount-ro', '/dev']
  command += ['--perms', '0777', '--size', str(disk_bytes), '--tmpfs', '/tmp']
  command += ['--remount-ro', '/', '--chdir', '/tmp', '--']
  uid = _user_id() if as_root else None
  return command + _python({'uid': uid, 'top': '/tmp', 'is_isolated': True})


def _unshare(disk_bytes: int, as_root: bool, mount_point: str) -> list[str]:
  command = [_tool('unshare'), '--mount', '--pid', '--fork', '--net', '--ipc']
  command += ['--uts', '--kill-child']
  if not as_root:
    command += ['--user', '--map-root-user']
  read_only, links = _tree()
  root = {
    'mount_point': mount_point,
    'read_only': read_only,
    'links': links,
    'tmp_bytes': disk_bytes,
  }
  uid = _user_id() if as_root else None
  settings = {'uid': uid, 'top': '/tmp', 'is_isolated': True, 'root': root}
  return [*command, '--', *_python(settings)]


def _is_root() -> bool:
  """Whether this process is the machine's root.

  Namespaces are then made by the rights of root, and the supervisor becomes a
  user of no rights before it does anything. A user namespace would do for
  anybody else; but what is root outside stays so for the kernel's settings and
  for limits by user. Root of a container that is a user namespace itself is
  anybody else.
  """
  if os.geteuid() != 0:
    return False
  with open('/proc/self/uid_map', encoding='utf-8') as file:
    return file.read().split() == ['0', '0', str(2**32 - 1)]


def _tool(name: str) -> str:
  path = shutil.which(name)
  if path is None:
    raise FileNotFoundError(f'{name}: not installed')
  return path


def _user_id() -> int:
  return random.SystemRandom().randrange(*_USER_IDS)


@functools.cache
def interpreter() -> str:
  """The Python that runs in sandboxes: this one, outside environments."""
  base = getattr(sys, '_base_executable', '') or sys.executable
  return os.path.realpath(base)


@functools.cache
def _tree() -> tuple[list[str], dict[str, str]]:
  """What is seen read-only, and symbolic links, as on this machine."""
  read_only: list[str] = []
  links: dict[str, str] = {}
  for path in _SYSTEM:
    if os.path.islink(path):
      links[path] = os.readlink(path)
    elif os.path.isdir(path):
      read_only.append(path)
  read_only += [path for path in _FILES if os.path.exists(path)]
  prefix = os.path.realpath(sys.base_prefix)
  if not prefix.startswith('/usr/') and prefix not in ('/usr', '/'):
    read_only.append(prefix)
  return read_only, links


def _python(settings: dict[str, Any]) -> list[str]:
  """The supervisor, its modules in the command itself: no file is needed."""
  return [interpreter(), '-I', '-S', '-B', '-c', _bundle(), repr(settings)]


@functools.cache
def _bundle() -> str:
  lines = ['import ast, sys, types']
  packages = 'dsv32_jax', 'dsv32_jax.agents', 'dsv32_jax.agents.sandbox'
  for name in packages:
    lines += [f'sys.modules[{name!r}] = types.ModuleType({name!r})']
  for name in _INSIDE:
    full = f'dsv32_jax.agents.sandbox.{name}'
    source = (_HERE / f'{name}.py').read_text(encoding='utf-8')
    lines += [
      f'm = sys.modules[{full!r}] = types.ModuleType({full!r})',
      f'sys.modules["dsv32_jax.agents.sandbox"].{name} = m',
      f'exec(compile({source!r}, {f"{name}.py"!r}, "exec"), m.__dict__)',
    ]
  lines += [
    'settings = ast.literal_eval(sys.argv[1])',
    'package = sys.modules["dsv32_jax.agents.sandbox"]',
    'root = settings.pop("root", None)',
    'root and package.private_root.enter(root.pop("mount_point"), **root)',
    'package.supervisor.main(settings)',
  ]
  return '\n'.join(lines)
