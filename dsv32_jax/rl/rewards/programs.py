"""Answers that are programs: run on hidden inputs, compared outside.

What an answer returns comes out of the sandbox as JSON and is compared here.
What it should return never goes in, so there is nothing inside to find or to
overwrite.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from dsv32_jax.agents.sandbox import Limits, Program, Result
from dsv32_jax.rl.problems import expressions
from dsv32_jax.rl.rewards.types import Job, Mark

# Small functions on small inputs.
LIMITS = Limits(
  wall_s=4.0,
  cpu_s=1.0,
  memory_bytes=256 << 20,
  processes=4,
  file_bytes=1 << 20,
  output_bytes=1 << 16,
)
_LONGEST_ANSWER = 20_000

_HARNESS = """
import json as _json, sys as _sys
def _outputs(_kind, _answer, _inputs):
  if _kind == 'expression':
    _f = eval('lambda x: (' + _answer + '\\n)', {{}})
  else:
    _names = {{'__name__': 'answer'}}
    exec(compile(_answer, 'answer.py', 'exec'), _names)
    _f = _names['f']
  _found = []
  for _arguments in _inputs:
    try:
      _value = _f(*_arguments)
      _json.dumps(_value)
      _found.append([_value])
    except Exception:
      _found.append([])
  return _json.dumps(_found)
_line = _outputs({kind!r}, {answer!r}, {inputs!r})
_sys.stdout.write('\\n' + _line)
"""


def code_of(text: str) -> str:
  r"""The code of an answer: what a fence marks, or all of it.

  >>> code_of('Here it is:\n```python\ndef f(x):\n  return x\n```')
  'def f(x):\n  return x\n'
  """
  found = re.search(r'```[a-z0-9]*\n(.*?)```', text, re.DOTALL)
  return found[1] if found else text.strip()


def score(
  jobs: Sequence[Job], run: Callable[[list[Program]], list[Result]]
) -> list[Mark]:
  """1 for an answer that is right on every input, else 0.

  Args:
    jobs: of problems whose reference has 'kind' ('expression' in x, or a
      'function' called f), 'inputs' (arguments of each call) and 'expected'.
    run: runs what cannot be worked out here in sandboxes.
  """
  marks: dict[int, Mark] = {}
  programs: dict[int, Program] = {}
  for index, job in enumerate(jobs):
    reference = job.problem.reference
    code = code_of(job.message.content)
    if len(code) > _LONGEST_ANSWER or not code:
      marks[index] = Mark(0.0)
      continue
    if reference['kind'] == 'expression':
      found = expressions.values(code, [x for (x,) in reference['inputs']])
      if found is not None:
        marks[index] = Mark(float(found == reference['expected']))
        continue
      if expressions.is_nonsense(code):
        marks[index] = Mark(0.0)
        continue
    programs[index] = Program(
      source=_HARNESS.format(
        kind=reference['kind'], answer=code, inputs=reference['inputs']
      ),
      limits=LIMITS,
    )
  results = run(list(programs.values())) if programs else []
  for index, result in zip(programs, results, strict=True):
    marks[index] = _mark(result, jobs[index].problem.reference['expected'])
  return [marks[index] for index in range(len(jobs))]


def _mark(result: Result, expected: list[Any]) -> Mark:
  if result.status == 'error':
    return Mark(0.0, f'the sandbox failed: {result.detail}')
  if result.status != 'ok':
    return Mark(0.0)
  try:
    found = json.loads(result.stdout.rpartition('\n')[2])
  except (ValueError, RecursionError):
    return Mark(0.0)
  if not isinstance(found, list) or len(found) != len(expected):
    return Mark(0.0)
  return Mark(
    float(
      all(
        isinstance(one, list) and len(one) == 1 and _same(one[0], want)
        for one, want in zip(found, expected, strict=True)
      )
    )
  )


def _same(found: Any, expected: Any) -> bool:
  """Equal, and of the same JSON type; True is not 1 here."""
  if isinstance(found, bool) or isinstance(expected, bool):
    return found is expected
  if isinstance(expected, list) and isinstance(found, list):
    return len(found) == len(expected) and all(
      _same(one, want) for one, want in zip(found, expected, strict=True)
    )
  if isinstance(expected, int | float):
    return isinstance(found, int | float) and found == expected
  return type(found) is type(expected) and found == expected
