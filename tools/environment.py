"""Makes the checkout's virtual environment and keeps it true to its pins.

  python tools/environment.py [EXTRA ...]

prints the environment's interpreter. The environment is `.venv-py3.X` beside
setup.py, for the Python that runs this file. A stamp inside it records what it
was made from; while that still holds nothing is installed and pip is not even
started. An interrupted installation leaves no stamp, and an environment
without one is made anew. Standard library only: it runs before anything is
installed.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
STAMP = 'installed.json'
LOG = 'pip.log'


def constraints_file(version: tuple[int, int]) -> pathlib.Path:
  """The pins for a Python version: its own file, or that of 3.12."""
  name = 'py311.txt' if version == (3, 11) else 'py312.txt'
  return ROOT / 'constraints' / name


def wanted(extras: set[str]) -> dict[str, Any]:
  """What a stamp must say for an environment with `extras` to be current."""
  pins = constraints_file(sys.version_info[:2])

  def digest(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

  return {
    'python': f'{sys.version} {sys.base_prefix}',
    'root': str(ROOT),
    'constraints': digest(pins),
    'setup': digest(ROOT / 'setup.py'),
    'extras': sorted(extras),
  }


def read_stamp(environment: pathlib.Path) -> dict[str, Any] | None:
  """The stamp of a finished installation, or None."""
  try:
    return json.loads((environment / STAMP).read_text(encoding='utf-8'))
  except (OSError, ValueError):
    return None


def is_current(stamp: dict[str, Any], target: dict[str, Any]) -> bool:
  """Whether an environment with `stamp` serves for `target` as it is."""
  same = all(
    stamp.get(name) == target[name] for name in target if name != 'extras'
  )
  return same and set(target['extras']) <= set(stamp.get('extras', ()))


@contextlib.contextmanager
def exclusive(environment: pathlib.Path):
  """Lets one process at a time install; the lock dies with its holder."""
  with open(f'{environment}.lock', 'w', encoding='utf-8') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def pip_install(python: pathlib.Path, *arguments: str) -> None:
  """Runs pip under the pins; what it says goes to pip.log only.

  Its warnings are about the user's own configuration, and the last lines of
  the log are shown when it fails.
  """
  pins = constraints_file(sys.version_info[:2])
  environment = {
    name: value
    for name, value in os.environ.items()
    if name not in ('PYTHONPATH', 'PYTHONHOME')
  }
  # A user's own site-packages would satisfy requirements that the environment
  # then lacks.
  environment['PYTHONNOUSERSITE'] = '1'
  environment['PIP_DISABLE_PIP_VERSION_CHECK'] = '1'
  with open(python.parent.parent / LOG, 'a', encoding='utf-8') as log:
    subprocess.run(
      [python, '-m', 'pip', 'install', '--constraint', pins, *arguments],
      cwd=ROOT,
      check=True,
      env=environment,
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
    )


def last_lines(path: pathlib.Path, count: int = 12) -> str:
  if not path.exists():
    return '(none)'
  lines = path.read_text(encoding='utf-8', errors='replace').splitlines()
  return '\n'.join(f'  {line}' for line in lines[-count:])


def install(environment: pathlib.Path, extras: set[str]) -> None:
  """Brings `environment` to `extras`, from nothing where it must."""
  target = wanted(extras)
  python = environment / 'bin' / 'python'
  stamp = read_stamp(environment)
  if stamp is not None and is_current(stamp, target):
    return

  # More extras, or a changed setup.py, are added to what is there. Another
  # interpreter, other pins or a moved checkout start from nothing.
  keep = stamp is not None and all(
    stamp.get(name) == target[name]
    for name in ('python', 'root', 'constraints')
  )
  if keep:
    extras = extras | set(stamp['extras'])
    (environment / STAMP).unlink()
  else:
    if environment.exists():
      shutil.rmtree(environment)
    subprocess.run([sys.executable, '-m', 'venv', environment], check=True)

  wish = f'.[{",".join(sorted(extras))}]' if extras else '.'
  print(
    f'installing {wish} into {environment.name} from'
    f' {constraints_file(sys.version_info[:2]).relative_to(ROOT)}'
    ' (a minute or two) ...',
    file=sys.stderr,
    flush=True,
  )
  start = time.monotonic()
  # setuptools first, pinned like the rest: an isolated build would fetch
  # whichever is newest.
  pip_install(python, 'setuptools')
  pip_install(python, '--no-build-isolation', '--editable', wish)
  stamp_text = json.dumps(wanted(extras), indent=1)
  # Renamed into place, so that a stamp is whole or absent.
  temporary = environment / f'{STAMP}.new'
  temporary.write_text(stamp_text, encoding='utf-8')
  os.replace(temporary, environment / STAMP)
  print(f'installed in {time.monotonic() - start:.0f} s', file=sys.stderr)


def main(extras: list[str]) -> int:
  version = '.'.join(map(str, sys.version_info[:2]))
  environment = ROOT / f'.venv-py{version}'
  print(f'Python {sys.version.split()[0]} ({sys.executable})', file=sys.stderr)
  try:
    with exclusive(environment):
      install(environment, set(extras))
  except subprocess.CalledProcessError as error:
    print(
      f'{" ".join(map(str, error.cmd))}\nfailed; the end of its output,'
      f' {environment.name}/{LOG}:\n{last_lines(environment / LOG)}\n'
      'Run the same make command again to install afresh.',
      file=sys.stderr,
    )
    return 1
  except KeyboardInterrupt:
    print('interrupted; the next run installs afresh', file=sys.stderr)
    return 130
  print(environment / 'bin' / 'python')
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
