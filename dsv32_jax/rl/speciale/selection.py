"""Which of many samples are handed in at a contest.

Source: arXiv:2512.02556, section 4.2 and appendix: 500 samples a problem of the
IOI; those that fail the sample tests or are too long are dropped, then those
whose author says that it failed; of the others the 50 with the longest
reasoning are submitted. For the ICPC finals 32 samples, filtered alike.
"""

import dataclasses
from collections.abc import Sequence

from dsv32_jax.rl.speciale.sizes import check_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contest:
  """How much may be sampled and handed in for one problem.

  Attributes:
    samples: drawn.
    submissions: handed in at most.
  """

  samples: int
  submissions: int

  def __post_init__(self):
    check_positive(self)


CONTESTS: dict[str, Contest] = {
  'ioi': Contest(samples=500, submissions=50),
  # No rule of its own limits submissions there, so all that pass may go.
  'icpc': Contest(samples=32, submissions=32),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
  """What selection knows of one sample.

  Attributes:
    passes_sample_tests: what is public of the tests.
    is_within_length: ended by itself.
    declares_failure: its author, or a judge who read it, says that it failed.
    num_reasoning_tokens: length of the thoughts.
  """

  passes_sample_tests: bool
  is_within_length: bool
  declares_failure: bool
  num_reasoning_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
  """What is handed in.

  Attributes:
    submitted: indices of samples, longest reasoning first.
    failed_tests: samples that fell at the first filter, length included.
    declared: samples that fell at the second.
  """

  submitted: tuple[int, ...]
  failed_tests: int
  declared: int


def select(samples: Sequence[Sample], submissions: int) -> Selection:
  """Applies the two filters, then takes the longest reasoning.

  Of samples with equally long reasoning the earlier goes first.

  Raises:
    ValueError: if `submissions` is not positive.

  >>> good = dict(
  ...   passes_sample_tests=True, is_within_length=True, declares_failure=False
  ... )
  >>> select(
  ...   [Sample(num_reasoning_tokens=n, **good) for n in (5, 9, 7)], 2
  ... ).submitted
  (1, 2)
  """
  if submissions < 1:
    raise ValueError(f'submissions: got {submissions}, expected at least 1')
  passing = [
    index
    for index, sample in enumerate(samples)
    if sample.passes_sample_tests and sample.is_within_length
  ]
  hopeful = [i for i in passing if not samples[i].declares_failure]
  longest = sorted(hopeful, key=lambda i: (-samples[i].num_reasoning_tokens, i))
  return Selection(
    submitted=tuple(longest[:submissions]),
    failed_tests=len(samples) - len(passing),
    declared=len(passing) - len(hopeful),
  )
