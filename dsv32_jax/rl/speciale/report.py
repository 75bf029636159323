"""Tables of what the protocols came to, with 95 % intervals."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from dsv32_jax.rl.speciale.protocols import Protocol

Row = dict[str, Any]


def table(protocol: Protocol, rows: Sequence[Row]) -> str:
  """What a protocol came to, as a Markdown table."""
  if not rows:
    return 'no tasks\n'
  lines = _TABLES[protocol](rows)
  width = len(lines[0])
  rule = ['---'] * width
  return ''.join(
    f'| {" | ".join(line)} |\n' for line in (lines[0], rule, *lines[1:])
  )


def wilson(
  right: int | float, total: int, z: float = 1.96
) -> tuple[float, float]:
  """Wilson's interval of a share.

  >>> [round(end, 3) for end in wilson(8, 10)]
  [0.49, 0.943]
  """
  if total < 1:
    raise ValueError(f'total: got {total}, expected at least 1')
  share = right / total
  centre = share + z * z / (2 * total)
  half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total**2))
  scale = 1 + z * z / total
  return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def share(values: Sequence[bool]) -> str:
  """A share in percent with its interval and count."""
  if not values:
    return 'none'
  low, high = wilson(sum(values), len(values))
  return (
    f'{100 * sum(values) / len(values):.1f} % ({100 * low:.1f} to '
    f'{100 * high:.1f}, n {len(values)})'
  )


def _mean(values: Sequence[int | float]) -> str:
  return f'{sum(values) / len(values):.2f}' if values else 'none'


def _refine(rows: Sequence[Row]) -> list[list[str]]:
  """Round by round, what a task's last attempt so far is worth.

  A task that has stopped keeps its last attempt.
  """
  longest = max(len(row['truth']) for row in rows)
  lines = [
    ['round', 'right', 'self-score 1', 'of these right', 'tokens a task']
  ]
  for count in range(1, longest + 1):
    last = [min(count, len(row['truth'])) - 1 for row in rows]
    right = [r['truth'][i] == 1 for r, i in zip(rows, last, strict=True)]
    sure = [r['self'][i] == 1 for r, i in zip(rows, last, strict=True)]
    both = [r for r, s in zip(right, sure, strict=True) if s]
    tokens = [sum(row['tokens'][:count]) for row in rows]
    lines.append(
      [str(count), share(right), share(sure), share(both), _mean(tokens)]
    )
  return lines


def _search(rows: Sequence[Row]) -> list[list[str]]:
  passed = [row for row in rows if row['stopped'] == 'passed']
  return [
    ['of all tasks', 'value'],
    *_lines(
      rows,
      {
        'best of the first proofs by mean score is right': lambda row: (
          row['first_truth'] == 1
        ),
        'any of the first proofs is right': lambda row: row['right_at_start'],
        'best after search is right': lambda row: row['best_truth'] == 1,
        'any of the pool is right': lambda row: row['right_in_pool'],
        'a proof passed all checks': lambda row: row['stopped'] == 'passed',
      },
    ),
    [
      'of these the best is right',
      share([row['best_truth'] == 1 for row in passed]),
    ],
    ['rounds', _mean([row['rounds'] for row in rows])],
    ['proofs in the pool', _mean([row['pool'] for row in rows])],
    ['tokens a task', _mean([row['tokens'] for row in rows])],
  ]


def _contest(rows: Sequence[Row]) -> list[list[str]]:
  chance = [row['unfiltered'] for row in rows]
  low, high = wilson(sum(chance), len(chance))
  return [
    ['of all tasks', 'value'],
    *_lines(
      rows,
      {
        'solved, longest reasoning first': lambda row: row['longest'],
        'solved, random order': lambda row: row['random'],
        'solved, shortest reasoning first': lambda row: row['shortest'],
      },
    ),
    [
      'solved, drawn blindly from all samples (expected)',
      f'{100 * sum(chance) / len(chance):.1f} % ({100 * low:.1f} to '
      f'{100 * high:.1f}, n {len(chance)})',
    ],
    *_lines(rows, {'any sample is right': lambda row: row['right'] > 0}),
    ['samples a task', _mean([row['samples'] for row in rows])],
    ['right samples a task', _mean([row['right'] for row in rows])],
    ['failed the sample tests', _mean([row['failed_tests'] for row in rows])],
    ['declared a failure', _mean([row['declared'] for row in rows])],
    ['submitted a task', _mean([row['submitted'] for row in rows])],
    ['tokens a task', _mean([row['tokens'] for row in rows])],
  ]


def _label(rows: Sequence[Row]) -> list[list[str]]:
  kept = [row for row in rows if row['label'] is not None]
  read = [row for row in rows if row['first'] is not None]
  lines = [
    ['of all derivations', 'value'],
    ['got a label', share([row['label'] is not None for row in rows])],
    ['of these the true one', share([r['label'] == r['truth'] for r in kept])],
    [
      'one analysis alone has the true score',
      share([row['first'] == row['truth'] for row in read]),
    ],
  ]
  for score in (0.0, 0.5, 1.0):
    mine = [row for row in kept if row['truth'] == score]
    lines.append(
      [
        f'label is true where the truth is {score:g}',
        share([row['label'] == score for row in mine]),
      ]
    )
  return [*lines, ['tokens a task', _mean([row['tokens'] for row in rows])]]


def _lines(
  rows: Sequence[Row], what: dict[str, Callable[[Row], bool]]
) -> list[list[str]]:
  return [
    [name, share([bool(holds(row)) for row in rows])]
    for name, holds in what.items()
  ]


_TABLES: dict[Protocol, Callable[[Sequence[Row]], list[list[str]]]] = {
  'refine': _refine,
  'search': _search,
  'contest': _contest,
  'label': _label,
}
