"""Several independent runs instead of one that is managed."""

import dataclasses
from collections.abc import Sequence

from dsv32_jax.agents.types import Trajectory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
  """The run that counts of several, with what all of them cost.

  Attributes:
    trajectory: the chosen one.
    num_steps: of all runs.
    num_tokens: of the replies of all runs.
  """

  trajectory: Trajectory
  num_steps: int
  num_tokens: int


def fewest_steps(trajectories: Sequence[Trajectory]) -> Choice:
  """Of independent runs, the one that came to an answer in the fewest steps.

  The first of equals. A run that a budget or an error ended counts only where
  all of them did.

  Raises:
    ValueError: without runs.
  """
  if not trajectories:
    raise ValueError('trajectories: got none, expected at least one')
  chosen = min(
    trajectories,
    key=lambda run: (
      run.ending not in ('answered', 'submitted'),
      len(run.steps),
    ),
  )
  steps = [step for run in trajectories for step in run.steps]
  return Choice(
    trajectory=chosen,
    num_steps=len(steps),
    num_tokens=sum(step.num_tokens for step in steps),
  )
