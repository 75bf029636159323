"""One configuration to a work directory: its config.json says which."""

import importlib.metadata
import json
import pathlib
import platform
import subprocess
import sys
from collections.abc import Collection
from typing import Any

from dsv32_jax.checkpoints import integrity
from dsv32_jax.config import convert

CONFIG = 'config.json'


def check(
  config: Any,
  workdir: pathlib.Path,
  *,
  free: Collection[str] = (),
  beside: Collection[str] = (),
) -> None:
  """Refuses a work directory that belongs to another run.

  Args:
    config: the whole run, a config dataclass.
    workdir: new, or of the same run.
    free: fields that may differ: they change no number.
    beside: names of files that a new directory may hold already.

  Raises:
    ValueError: naming the first field that differs, with both values, or the
      file that is in the way.
  """
  path = workdir / CONFIG
  if not path.exists():
    found = {p.name for p in workdir.iterdir()} if workdir.exists() else set()
    if found - set(beside):
      raise ValueError(
        f'workdir: {workdir} holds files that are not of a run (no {CONFIG}), '
        f'such as {min(found - set(beside))}; expected an empty or new '
        'directory'
      )
    return
  saved = json.loads(path.read_text(encoding='utf-8'))['config']
  mine = json.loads(json.dumps(convert.to_dict(config)))
  for name in free:
    saved.pop(name, None)
    mine.pop(name, None)
  difference = first_difference(saved, mine)
  if difference is not None:
    where, old, new = difference
    raise ValueError(
      f'workdir: {workdir} belongs to a run with {where} = {old!r}, this one '
      f'has {new!r}; choose another --workdir or the same config'
    )


def claim(config: Any, workdir: pathlib.Path) -> None:
  """Writes config.json, with versions, commit and command."""
  content = {
    'config': convert.to_dict(config),
    'versions': versions(),
    'git': git_state(),
    'command': sys.argv,
  }
  workdir.mkdir(parents=True, exist_ok=True)
  path = workdir / CONFIG
  integrity.write_atomically(path, json.dumps(content, indent=1))


def first_difference(
  old: Any, new: Any, where: str = ''
) -> tuple[str, Any, Any] | None:
  """Path and both values of the first difference of two JSON trees."""
  if isinstance(old, dict) and isinstance(new, dict):
    for key in sorted({*old, *new}):
      inner = f'{where}.{key}' if where else key
      found = first_difference(old.get(key), new.get(key), inner)
      if found is not None:
        return found
    return None
  return None if old == new else (where, old, new)


def versions() -> dict[str, str]:
  """Versions of what decides a run's numbers."""
  found = {'python': platform.python_version()}
  for package in (
    'jax',
    'jaxlib',
    'flax',
    'optax',
    'orbax-checkpoint',
    'grain',
  ):
    found[package] = importlib.metadata.version(package)
  return found


def git_state() -> dict[str, Any]:
  """Commit of the checkout and whether it has changes; {} outside of git."""
  here = pathlib.Path(__file__).parent

  def git(*arguments: str) -> str:
    return subprocess.run(
      ('git', *arguments),
      cwd=here,
      capture_output=True,
      text=True,
      check=True,
    ).stdout.strip()

  try:
    return {
      'commit': git('rev-parse', 'HEAD'),
      'changed': bool(git('status', '--porcelain')),
    }
  except (OSError, subprocess.CalledProcessError):
    return {}
