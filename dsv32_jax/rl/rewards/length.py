"""The length penalty."""


def length_penalty(length: int, *, max_length: int, buffer: int) -> float:
  """P_len = clip((L - (L_max - L_buf)) / L_buf, 0, 1).

  The paper has a length penalty without a formula (arXiv:2512.02556, section
  3); this is the soft overlong form of DAPO (arXiv:2503.14476, Eq. 13).

  Args:
    length: L, tokens that were sampled.
    max_length: L_max, at least 1.
    buffer: L_buf, tokens over which the penalty rises, at most L_max; 0 for a
      step at L_max.

  >>> [length_penalty(n, max_length=10, buffer=4) for n in (6, 7, 10, 11)]
  [0.0, 0.25, 1.0, 1.0]
  """
  if not buffer:
    return float(length >= max_length)
  return min(max((length - (max_length - buffer)) / buffer, 0.0), 1.0)
