"""Runs that differ in their seed: mean and spread of what they found."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def flat_numbers(tree: Any, path: str = '') -> dict[str, float]:
  """Every number of nested dicts under its path; lists are left out."""
  if isinstance(tree, Mapping):
    found: dict[str, float] = {}
    for name, value in tree.items():
      found |= flat_numbers(value, f'{path}/{name}' if path else str(name))
    return found
  if isinstance(tree, int | float) and not isinstance(tree, bool):
    return {path: float(tree)}
  return {}


def headline(found: Mapping[str, Any]) -> dict[str, float]:
  """The numbers of one run's results that it is judged by.

  Args:
    found: from `results.collect`.

  Returns:
    path -> value: selection (`quality/...`), held-out loss (`loss/...`) and
    recall accuracy (`recall/...`).
  """
  parts = {name: found.get(name, {}) for name in ('quality', 'loss', 'recall')}
  skipped = ('/k', '/seq_len', '/tokens')
  return {
    name: value
    for name, value in flat_numbers(parts).items()
    if not name.endswith(skipped) and 'answers_per_distance' not in name
  }


def table(runs: Sequence[Mapping[str, Any]]) -> str:
  """A Markdown table of mean, least and greatest over runs.

  Args:
    runs: results of each run, of one recipe.

  Raises:
    ValueError: if there is no run or they hold different numbers.
  """
  if not runs:
    raise ValueError('runs: got none, expected at least one')
  rows = [headline(found) for found in runs]
  for row in rows[1:]:
    if row.keys() != rows[0].keys():
      odd = sorted(row.keys() ^ rows[0].keys())
      raise ValueError(
        f'runs: one has no {odd[0]}, expected runs of one recipe'
      )
  lines = ['| what | mean | least | greatest |', '|---|---|---|---|']
  for name in rows[0]:
    values = [row[name] for row in rows]
    mean = statistics.fmean(values)
    lines.append(
      f'| {name} | {mean:.4f} | {min(values):.4f} | {max(values):.4f} |'
    )
  return '\n'.join(lines)
