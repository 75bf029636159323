"""Samples of a suite, scored: a row each, and a table over rows."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from dsv32_jax.agents.sandbox import SandboxPool
from dsv32_jax.evaluation import pass_at_k
from dsv32_jax.evaluation.suites import human_eval, mutants


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One sample, scored.

  Attributes:
    suite: name of the suite.
    problem: id in it.
    mode: 'completion' (the prompt is continued), 'chat' or 'thinking'.
    strategy: of context management; 'none' without.
    seed: of the sample.
    weights: hash of the weights, or what the samples are instead: 'reference',
      'mutated'.
    passed: whether it did.
    tokens: that the model wrote; 0 without one.
    steps: replies of the model; 0 without one.
    status: of the sandbox, or 'no_room' for a prompt that the model is too
      small for, which counts as not passed.
  """

  suite: str
  problem: str
  mode: str
  strategy: str
  seed: int
  weights: str
  passed: bool
  tokens: int
  steps: int
  status: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
  """An answer to a problem, before it is scored.

  Attributes:
    problem: what it answers.
    program: the whole of it; None where the prompt left no room for one.
    mode: see `Row`.
    seed: see `Row`.
    tokens: see `Row`.
    steps: see `Row`.
  """

  problem: human_eval.Problem
  program: str | None
  mode: str = 'completion'
  seed: int = 0
  tokens: int = 0
  steps: int = 0


def reference_samples(chosen: Sequence[human_eval.Problem]) -> list[Sample]:
  """The suite's own solutions."""
  return [
    Sample(problem=problem, program=program)
    for problem, program in human_eval.references(chosen)
  ]


def mutated_samples(chosen: Sequence[human_eval.Problem]) -> list[Sample]:
  """The suite's own solutions, each returning another value than it should."""
  return [
    Sample(
      problem=problem, program=mutants.off_by_a_little(program, problem.name)
    )
    for problem, program in human_eval.references(chosen)
  ]


def score(
  samples: Sequence[Sample],
  pool: SandboxPool,
  *,
  weights: str,
  strategy: str = 'none',
) -> list[Row]:
  """Runs samples on the tests of their problems.

  Args:
    samples: of HumanEval.
    pool: runs them.
    weights: see `Row`.
    strategy: see `Row`.

  Returns:
    In the order of the samples.
  """
  answers = [(s.problem, s.program) for s in samples if s.program is not None]
  outcomes = iter(human_eval.judge(answers, pool))
  rows = []
  for sample in samples:
    outcome = human_eval.Outcome(passed=False, status='no_room')
    if sample.program is not None:
      outcome = next(outcomes)
    rows.append(
      Row(
        suite=human_eval.NAME,
        problem=sample.problem.id,
        mode=sample.mode,
        strategy=strategy,
        seed=sample.seed,
        weights=weights,
        passed=outcome.passed,
        tokens=sample.tokens,
        steps=sample.steps,
        status=outcome.status,
      )
    )
  return rows


def write(path: pathlib.Path, rows: Sequence[Row]) -> None:
  """Writes rows as JSONL."""
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = [json.dumps(dataclasses.asdict(row)) + '\n' for row in rows]
  path.write_text(''.join(lines), encoding='utf-8')


def read(path: pathlib.Path) -> list[Row]:
  """The rows of a file.

  Raises:
    ValueError: naming the line that is no row.
  """
  rows = []
  for number, line in enumerate(path.read_text('utf-8').splitlines(), 1):
    try:
      rows.append(Row(**json.loads(line)))
    except (ValueError, TypeError) as error:
      raise ValueError(f'{path}:{number}: {error}, expected a row') from None
  return rows


def table(rows: Sequence[Row], ks: Sequence[int] = (1,)) -> str:
  """A Markdown table: a line for each suite, mode, strategy and weights.

  Args:
    rows: of any number of runs.
    ks: of pass@k; a k is left out (a dash) where a problem has fewer samples.

  Raises:
    ValueError: without rows, or for one sample in two rows.
  """
  if not rows:
    raise ValueError('rows: got none, expected at least one')
  groups: dict[tuple[str, ...], list[Row]] = {}
  for row in rows:
    key = row.suite, row.mode, row.strategy, row.weights
    groups.setdefault(key, []).append(row)
  names = ['suite', 'mode', 'context', 'weights', 'problems', 'samples']
  names += [*(f'pass@{k} (95 %)' for k in ks), 'tokens', 'steps']
  lines = [_line(names), _line(['---'] * len(names))]
  for key, group in groups.items():
    passes: dict[str, dict[int, bool]] = {}
    for row in group:
      of_problem = passes.setdefault(row.problem, {})
      if row.seed in of_problem:
        raise ValueError(
          f'rows: got {row.problem} with seed {row.seed} twice, expected each '
          'sample once'
        )
      of_problem[row.seed] = row.passed
    least = min(len(one) for one in passes.values())
    cells: list[Any] = [*key, len(passes), len(group)]
    for k in ks:
      if k > least:
        cells.append('-')
        continue
      found = pass_at_k.estimate([list(p.values()) for p in passes.values()], k)
      low = max(found.low, 0.0)  # Rounding may leave -0.
      cells.append(f'{found.value:.3f} ({low:.3f} to {found.high:.3f})')
    for field in ('tokens', 'steps'):
      mean = sum(getattr(row, field) for row in group) / len(group)
      cells.append(f'{mean:.1f}')
    lines.append(_line(cells))
  return '\n'.join(lines)


def _line(cells: Sequence[Any]) -> str:
  return f'| {" | ".join(map(str, cells))} |'
