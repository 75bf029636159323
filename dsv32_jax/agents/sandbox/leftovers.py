"""What programs leave behind inside a sandbox, and how it is removed.

It imports nothing of this project, because it runs inside the sandbox.
"""

import os
import signal
import stat
import time

# Between killing and giving up.
_PATIENCE_S = 5.0


class DirtyError(Exception):
  """Something of a program stays: this sandbox cannot be used again."""


def descendants() -> dict[int, tuple[int, int]]:
  """Processes below this one, with their processor ticks and resident pages."""
  own = os.getpid()
  parents: dict[int, int] = {}
  used: dict[int, tuple[int, int]] = {}
  for name in os.listdir('/proc'):
    if not name.isdigit():
      continue
    try:
      with open(f'/proc/{name}/stat', encoding='utf-8', errors='replace') as f:
        # The name may hold anything; the fields follow its last bracket.
        fields = f.read().rpartition(')')[2].split()
    except OSError:
      continue
    pid = int(name)
    parents[pid] = int(fields[1])
    used[pid] = int(fields[11]) + int(fields[12]), int(fields[21])
  if own == 1:
    below = [pid for pid in parents if pid != 1]
  else:
    below = [own]
    for pid in below:
      below += [child for child, parent in parents.items() if parent == pid]
    below = below[1:]
  return {pid: used[pid] for pid in below}


def tasks_of_user() -> int:
  """Processes and threads that the limit on processes already counts."""
  count = 0
  for name in os.listdir('/proc'):
    if not name.isdigit():
      continue
    try:
      if os.stat(f'/proc/{name}/task').st_uid in (os.getuid(), 0):
        count += len(os.listdir(f'/proc/{name}/task'))
    except OSError:
      continue
  return count


def signal_all(number: int) -> None:
  """Sends a signal to whatever has been started here."""
  if os.getpid() == 1:
    try:
      os.kill(-1, number)  # Everything here but process 1.
    except ProcessLookupError:
      pass
    return
  for target in descendants():
    try:
      os.kill(target, number)
    except (ProcessLookupError, PermissionError):
      pass


def end_all() -> None:
  """Kills whatever the program has started, and waits until it is gone.

  Raises:
    DirtyError: if something does not go away.
  """
  deadline = time.monotonic() + _PATIENCE_S
  while True:
    signal_all(signal.SIGKILL)
    try:
      while os.waitpid(-1, os.WNOHANG)[0]:
        pass
    except ChildProcessError:
      return
    if time.monotonic() > deadline:
      raise DirtyError('processes do not end')
    time.sleep(0.001)


def wipe(directory: str) -> None:
  """Empties a directory, however its contents are nested and protected.

  A directory's children are moved up and then it is removed, so that no path
  grows long and nothing is recursive.

  Raises:
    DirtyError: if something cannot be removed.
  """
  counter = 0
  try:
    if os.stat(directory).st_uid == os.getuid():
      os.chmod(directory, 0o700)
    while names := os.listdir(directory):
      for name in names:
        path = os.path.join(directory, name)
        if not stat.S_ISDIR(os.lstat(path).st_mode):
          os.unlink(path)
          continue
        os.chmod(path, 0o700)
        for child in os.listdir(path):
          counter += 1
          inside = os.path.join(path, child)
          # To be moved, a directory has to be writable itself.
          if stat.S_ISDIR(os.lstat(inside).st_mode):
            os.chmod(inside, 0o700)
          os.rename(inside, os.path.join(directory, f'.moved-{counter}'))
        os.rmdir(path)
  except OSError as error:
    raise DirtyError(f'files do not go away: {error}') from None
