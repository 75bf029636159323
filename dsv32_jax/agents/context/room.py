"""Room for the next reply: when a strategy is asked."""

import dataclasses
from collections.abc import Sequence

from dsv32_jax.agents.context.strategies import Budget, Count, Strategy
from dsv32_jax.chat import Message


@dataclasses.dataclass(frozen=True, kw_only=True)
class Room:
  """A context with room for a reply, or none.

  Attributes:
    messages: to go on with.
    resets: managed so far in the episode.
    is_full: it is still beyond the trigger: the episode ends with 'tokens'.
  """

  messages: tuple[Message, ...]
  resets: int
  is_full: bool


def make_room(
  messages: Sequence[Message],
  *,
  strategy: Strategy | None,
  budget: Budget,
  count: Count,
  resets: int = 0,
) -> Room:
  """What a loop asks before each reply. Steps go on counting.

  Args:
    messages: so far.
    strategy: None for no management: the window is then used to its end.
    budget: of the window.
    count: of tokens.
    resets: so far.
  """
  messages = tuple(messages)
  if strategy is None:
    return Room(
      messages=messages,
      resets=resets,
      is_full=count(messages) >= budget.window,
    )
  if not budget.is_over(count(messages)):
    return Room(messages=messages, resets=resets, is_full=False)
  if resets < budget.max_resets:
    shorter = strategy.on_overflow(messages, budget=budget, count=count)
    if shorter != messages:
      return Room(
        messages=shorter,
        resets=resets + 1,
        is_full=budget.is_over(count(shorter)),
      )
  return Room(messages=messages, resets=resets, is_full=True)


class Manager:
  """`make_room` for one episode, as `loop.run_episode` asks it (`manage`).

  Attributes:
    resets: managed so far.
  """

  def __init__(
    self, strategy: Strategy | None, *, budget: Budget, count: Count
  ):
    """Binds what `make_room` needs beside the messages; see there."""
    self._strategy = strategy
    self._budget = budget
    self._count = count
    self.resets = 0

  def __call__(self, messages: Sequence[Message]) -> tuple[Message, ...] | None:
    """The messages to go on with; None if there is no room."""
    room = make_room(
      messages,
      strategy=self._strategy,
      budget=self._budget,
      count=self._count,
      resets=self.resets,
    )
    self.resets = room.resets
    return None if room.is_full else room.messages
