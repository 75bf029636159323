r"""Answers in \boxed{}, compared by value.

Plain numbers are compared here, exactly; everything else is math-verify's, in a
process that can be ended (symbolic mathematics may take for ever).
"""

import re
from fractions import Fraction

from dsv32_jax.rl.rewards.types import Job, Mark
from dsv32_jax.rl.rewards.workers import Call

_BOXED = re.compile(r'\\boxed\s*\{')
_NUMBER = re.compile(r'-?\d{1,30}(?:\.\d{1,30})?')
_RATIO = re.compile(r'(-?)(?:(\d{1,30})/(\d{1,30})|\\frac\{(\d+)\}\{(\d+)\})')
# Arithmetic that is left to do. math-verify would do it: the question itself in
# a box would be right.
_UNFINISHED = re.compile(
  r'[+*^!]|[\d)}]\s*-|\)\s*\(|/.*/|\\(?:cdot|times|div|binom|sum|prod|log|gcd)\b'
)
# Longer ones are no answers, and take a parser long.
_LONGEST = 300


def last_boxed(text: str) -> str | None:
  r"""What stands in the last \boxed{}, or None.

  >>> last_boxed(r'\boxed{1}, no: \boxed{\frac{1}{2}}.')
  '\\frac{1}{2}'
  """
  starts = [found.end() for found in _BOXED.finditer(text)]
  if not starts:
    return None
  depth = 1
  for end in range(starts[-1], len(text)):
    depth += {'{': 1, '}': -1}.get(text[end], 0)
    if not depth:
      return text[starts[-1] : end].strip()
  return None


def number(text: str) -> Fraction | None:
  r"""The value of a plain number or fraction, None for anything else.

  >>> number('0.5') == number('1/2') == number(r'\frac{2}{4}')
  True
  """
  text = text.strip()
  if _NUMBER.fullmatch(text):
    return Fraction(text)
  found = _RATIO.fullmatch(text)
  if not found:
    return None
  above, below = (int(part) for part in found.groups()[1:] if part)
  return Fraction(-above if found[1] else above, below) if below else None


def is_plain(job: Job) -> bool:
  """Whether the answer can be marked here."""
  answer = _final(job)
  if answer is None:
    return True
  reference = job.problem.reference['answer']
  return answer == reference or None not in (number(answer), number(reference))


def mark_plain(job: Job) -> Mark:
  """The mark of such an answer."""
  answer = _final(job)
  if answer is None:
    return Mark(0.0)
  reference = job.problem.reference['answer']
  return Mark(float(answer == reference or number(answer) == number(reference)))


def call_of(job: Job) -> Call:
  """The call that marks any other answer."""
  reference = job.problem.reference['answer']
  return Call('math_answers', 'score', (reference, _final(job) or ''))


def _final(job: Job) -> str | None:
  """The boxed answer, or None where it is none or not worked out."""
  answer = last_boxed(job.message.content)
  if not answer or len(answer) > _LONGEST:
    return None
  reference = job.problem.reference['answer']
  if _UNFINISHED.search(answer) and not _UNFINISHED.search(reference):
    return None
  return answer
