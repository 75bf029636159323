r"""Whether two mathematical answers are equal: the file that knows math-verify.

It imports nothing of this project, because a process that scores loads it alone
(`rewards.worker_main`).
"""

import logging
from typing import Any

# They say at every call that their own time limits are off.
logging.getLogger('math_verify').setLevel(logging.ERROR)


def score(reference: str, answer: str) -> float:
  r"""1 if the answer equals the reference as mathematics, else 0.

  Args:
    reference: LaTeX, as it would stand in \boxed{}.
    answer: likewise.
  """
  from math_verify import LatexExtractionConfig, parse, verify

  config = [LatexExtractionConfig(boxed_match_priority=0)]
  # Its own time limits work by signals; this process is ended from outside.
  no_limit: Any = None
  found: list[Any] = [
    parse(rf'\boxed{{{text}}}', config, parsing_timeout=no_limit)
    for text in (reference, answer)
  ]
  if not all(found):
    return 0.0
  gold, target = found
  return float(verify(gold, target, timeout_seconds=None))
