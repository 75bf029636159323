"""Problem sources by name."""

import difflib
import types
from collections.abc import Callable
from typing import Any

from dsv32_jax.rl.problems import (
  gym,
  logic,
  mathematics,
  programming,
  question_answering,
  writing,
)
from dsv32_jax.rl.problems.types import ProblemSource

_MAKERS: dict[str, Callable[..., ProblemSource]] = {
  'logic': logic.LogicSource,
  'mathematics': mathematics.MathematicsSource,
  'programming': programming.ProgrammingSource,
  'question_answering': question_answering.QuestionSource,
  'writing': writing.WritingSource,
}

# Domains whose problems are tasks in environments.
_WITHOUT_SOURCE = ('general_agent', 'agentic_coding', 'agentic_search')


def register(name: str, maker: Callable[..., ProblemSource]) -> None:
  """Makes a source known; `make(name, **options)` calls `maker(**options)`.

  Raises:
    ValueError: if another maker has the name.
  """
  if _MAKERS.get(name, maker) is not maker:
    raise ValueError(f'name: got {name!r}, which another source has')
  _MAKERS[name] = maker


def names() -> list[str]:
  """All names, those of reasoning-gym's families included if it is there."""
  try:
    families = gym.names()
  except ModuleNotFoundError:
    families = ()
  return sorted([*_MAKERS, *families, *_speciale().NAMES])


def make(name: str, /, **options: Any) -> ProblemSource:
  """The source of that name.

  Args:
    name: one of `names()`; 'gym/<family>' is a family of reasoning-gym,
      'speciale/<task>' one of docs/speciale.md.
    **options: of the source; `seed` and `mode` are options of all.

  Raises:
    ValueError: unknown names and options.
    ModuleNotFoundError: without the extra `rl`, for what needs it.
  """
  if name.startswith('gym/'):
    return gym.make(name, options)
  if name.startswith('speciale/'):
    return _speciale().make(name, options)
  if name in _WITHOUT_SOURCE:
    raise ValueError(
      f'name: got {name!r}, a domain of tasks in environments, for which there '
      f'is no source yet; expected one of {sorted(_MAKERS)} or gym/<family>'
    )
  if name not in _MAKERS:
    close = difflib.get_close_matches(name, names(), n=1)
    hint = f' (did you mean {close[0]!r}?)' if close else ''
    raise ValueError(
      f'name: got {name!r}, expected one of {sorted(_MAKERS)} or gym/<family>'
      f'{hint}'
    )
  try:
    return _MAKERS[name](**options)
  except TypeError as error:
    raise ValueError(f'options: got {options} for {name!r}: {error}') from None


def _speciale() -> types.ModuleType:
  """Sources that import this package, so they are imported when asked for."""
  from dsv32_jax.rl.speciale import sources

  return sources
