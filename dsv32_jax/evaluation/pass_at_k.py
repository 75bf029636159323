"""pass@k: the chance that one of k samples solves a problem.

arXiv:2107.03374, section 2.1.
"""

from collections.abc import Sequence

import numpy as np

from dsv32_jax.evaluation import paired


def pass_at_k(n: int, c: int, k: int) -> float:
  """The unbiased estimate for one problem.

  1 - C(n - c, k) / C(n, k): the share of all sets of k of the n samples that
  hold at least one of the c right ones.

  Args:
    n: samples.
    c: right ones.
    k: samples that one of has to be right.

  Raises:
    ValueError: for c outside of 0 to n, or k outside of 1 to n.

  >>> pass_at_k(4, 1, 2)
  0.5
  """
  if not 0 <= c <= n:
    raise ValueError(f'c: got {c} right of {n} samples, expected 0 to {n}')
  if not 1 <= k <= n:
    raise ValueError(f'k: got {k} of {n} samples, expected 1 to {n}')
  if k > n - c:
    return 1.0
  # As a product: the binomials themselves outgrow a float.
  return float(1 - np.prod(1 - k / np.arange(n - c + 1, n + 1)))


def estimate(passes: Sequence[Sequence[bool]], k: int) -> paired.Estimate:
  """The mean over problems, with its 95 % interval over problems.

  The interval is Wilson's (`paired.accuracy`). For estimates between 0 and 1 it
  is rather too wide: no values of that mean spread more than those that are all
  0 or 1.

  Args:
    passes: of each problem, whether each of its samples passed; different
      problems may have different numbers of samples.
    k: at most the least of these numbers.

  Raises:
    ValueError: without problems, or as `pass_at_k`.
  """
  return paired.accuracy([pass_at_k(len(one), sum(one), k) for one in passes])
