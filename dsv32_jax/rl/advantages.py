"""How much better than its group a response is.

Source: arXiv:2512.02556, section 3.1 (Eq. 5); spec section 2.1.

Letters: G responses of a group.
"""

import numpy as np


def group_advantages(
  rewards: np.ndarray, *, divide_by_std: bool = False
) -> np.ndarray:
  """A_i = R_i - mean(R_1 .. R_G): without the group's standard deviation.

  Dividing by it, as the first GRPO did (arXiv:2402.03300), gives groups whose
  rewards hardly differ the same weight as all others.

  Args:
    rewards: [..., G].
    divide_by_std: the first GRPO's, for comparison: by the deviation of the
      sample (ddof 1) plus 1e-4; groups of equal rewards stay at 0.

  Returns:
    float64 [..., G]; sums to 0 over a group.

  Raises:
    ValueError: an empty group.

  Example:
    >>> group_advantages(np.array([1.0, 0.0])).tolist()
    [0.5, -0.5]
  """
  rewards = np.asarray(rewards, np.float64)
  if rewards.ndim == 0 or rewards.shape[-1] == 0:
    raise ValueError(
      f'rewards: got shape {rewards.shape}, expected [..., G] with at least 1'
    )
  advantages = rewards - np.mean(rewards, axis=-1, keepdims=True)
  # Rounding may leave a residue where all are equal.
  is_equal = np.all(rewards == rewards[..., :1], axis=-1, keepdims=True)
  advantages = np.where(is_equal, 0.0, advantages)
  if divide_by_std and rewards.shape[-1] > 1:
    std = np.std(rewards, axis=-1, ddof=1, keepdims=True)
    advantages = advantages / (std + 1e-4)
  return advantages
