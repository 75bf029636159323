"""Contexts that are too long, made shorter."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from dsv32_jax.chat import Message

Count = Callable[[Sequence[Message]], int]
"""Tokens of a conversation; a part of one has no more than the whole."""

Summarise = Callable[[Sequence[Message], int], str]
"""The work of a conversation in at most so many tokens: one model call."""

SUMMARY_BEGIN = '\n\n## What was found before the context was cleared\n\n'
SUMMARY_END = '\n\n(End of what was found before.)'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
  """When a context is too long, and how short it is to become.

  Attributes:
    window: tokens that the model reads at most.
    trigger: share of the window beyond which a context is managed.
    target: share of the window that what a strategy returns stays under, if
      what always stays leaves room for it.
    max_resets: how often an episode's context may be managed.

  Raises:
    ValueError: if a share or a count makes no sense.
  """

  window: int
  trigger: float = 0.8
  target: float = 0.5
  max_resets: int = 16

  def __post_init__(self):
    if self.window < 1:
      raise ValueError(f'window: got {self.window}, expected at least 1')
    if not 0 < self.target < self.trigger <= 1:
      raise ValueError(
        f'target, trigger: got {self.target} and {self.trigger}, expected '
        '0 < target < trigger <= 1'
      )
    if self.max_resets < 0:
      raise ValueError(f'max_resets: got {self.max_resets}, expected 0 or more')

  def is_over(self, num_tokens: int) -> bool:
    """Whether a context of so many tokens has passed the trigger."""
    return num_tokens > self.trigger * self.window


@runtime_checkable
class Strategy(Protocol):
  """What to do with a context that is too long.

  Attributes:
    name: for reports.
  """

  @property
  def name(self) -> str: ...

  def on_overflow(
    self, messages: Sequence[Message], *, budget: Budget, count: Count
  ) -> tuple[Message, ...]:
    """A shorter conversation with the same questions; the same without calls.

    Args:
      messages: a conversation that renders.
      budget: of the window.
      count: of tokens.
    """
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Discard:
  """Drops the first calls, and leaves no trace of them.

  At least one group is dropped, and as many more as the budget's target needs,
  oldest first.

  Attributes:
    share: of the groups, rounded down; 1 for all.

  Raises:
    ValueError: for a share outside of 0 to 1.
  """

  share: float = 1.0

  def __post_init__(self):
    if not 0 < self.share <= 1:
      raise ValueError(f'share: got {self.share}, expected 0 < share <= 1')

  @property
  def name(self) -> str:
    return 'Discard-all' if self.share == 1 else f'Discard-{self.share:.0%}'

  def on_overflow(
    self, messages: Sequence[Message], *, budget: Budget, count: Count
  ) -> tuple[Message, ...]:
    num_groups = sum(map(_makes_calls, messages))
    at_least = max(1, math.floor(self.share * num_groups))
    return _until(
      messages, count, limit=budget.target * budget.window, at_least=at_least
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
  """Restarts from the question and a summary that one more model call writes.

  The summary stands at the end of the last user or developer message, in the
  place of an earlier one. If the conversation and the summary do not fit the
  window together, the writer reads it without its first calls.

  Attributes:
    summarise: writes it.
    max_tokens: of the summary; what is longer is cut.
  """

  summarise: Summarise
  max_tokens: int = 1024

  @property
  def name(self) -> str:
    return 'Summary'

  def on_overflow(
    self, messages: Sequence[Message], *, budget: Budget, count: Count
  ) -> tuple[Message, ...]:
    """As `Strategy.on_overflow`.

    Raises:
      ValueError: if nobody asks anything in the conversation.
      PolicyError: as the summariser.
    """
    if not any(map(_makes_calls, messages)):
      return tuple(messages)
    place = _last_question(messages)
    room = budget.window - self.max_tokens
    read = _until(_without_open_calls(messages), count, limit=room)
    text = self.summarise(read, self.max_tokens)
    # Only the markers around it say where it ends.
    for marker in (SUMMARY_BEGIN, SUMMARY_END):
      text = text.replace(marker.strip(), '')

    question = _without_summary(messages[place].content)
    bare = _drop(messages, len(messages))
    place = _last_question(bare)
    bare[place] = dataclasses.replace(bare[place], content=question)
    # The whole is shorter than what it replaces, however long the summary is.
    limit = min(count(bare) + self.max_tokens, count(messages) - 1)

    def with_first(num_characters: int) -> list[Message]:
      summary = text[:num_characters].strip()
      if not summary:
        return bare
      content = question + SUMMARY_BEGIN + summary + SUMMARY_END
      new = dataclasses.replace(bare[place], content=content)
      return [*bare[:place], new, *bare[place + 1 :]]

    low, high = 0, len(text)
    if count(with_first(high)) <= limit:
      low = high
    while high - low > 1:
      middle = (low + high) // 2
      if count(with_first(middle)) <= limit:
        low = middle
      else:
        high = middle
    return tuple(with_first(low))


DISCARD_75 = Discard(share=0.75)
DISCARD_ALL = Discard(share=1.0)


def _makes_calls(message: Message) -> bool:
  return bool(message.tool_calls)


def _drop(messages: Sequence[Message], num_groups: int) -> list[Message]:
  """The conversation without its first groups."""
  kept, seen = [], 0
  for message in messages:
    seen += _makes_calls(message)
    in_group = message.role == 'tool' or _makes_calls(message)
    if not in_group or seen > num_groups:
      kept.append(message)
  return kept


def _until(
  messages: Sequence[Message],
  count: Count,
  *,
  limit: int | float,
  at_least: int = 0,
) -> tuple[Message, ...]:
  """Drops the fewest groups that bring the count to `limit`, or all of them."""
  low, high = at_least, sum(map(_makes_calls, messages))
  while low < high:
    middle = (low + high) // 2
    if count(_drop(messages, middle)) <= limit:
      high = middle
    else:
      low = middle + 1
  return tuple(_drop(messages, low))


def _without_open_calls(messages: Sequence[Message]) -> tuple[Message, ...]:
  """Drops a last group that lacks results: nobody can speak after it."""
  last = len(messages) - 1
  while last >= 0 and messages[last].role == 'tool':
    last -= 1
  if last >= 0:
    missing = len(messages[last].tool_calls) - (len(messages) - 1 - last)
    if missing > 0:
      return tuple(messages[:last])
  return tuple(messages)


def _last_question(messages: Sequence[Message]) -> int:
  for place in range(len(messages) - 1, -1, -1):
    if messages[place].role in ('user', 'developer'):
      return place
  raise ValueError('messages: got no user or developer message, expected one')


def _without_summary(content: str) -> str:
  if content.endswith(SUMMARY_END) and SUMMARY_BEGIN in content:
    return content.rpartition(SUMMARY_BEGIN)[0]
  return content
