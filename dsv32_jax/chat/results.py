"""Which result answers which call, and whether all are there."""

import itertools
from collections.abc import Sequence

from dsv32_jax.chat.errors import ChatError
from dsv32_jax.chat.types import Message


def results_of(messages: Sequence[Message], index: int) -> list[Message]:
  """The results that follow an assistant message, in the order of its calls.

  A result with an id goes to the call of that id, the others to the calls that
  are left, in order. At the end of a conversation some may be missing.

  Args:
    messages: the conversation.
    index: of the assistant message.

  Raises:
    ChatError: if there are more results than calls, one names no call or a call
      that has its result, or another message stands where one is expected.
  """
  calls = messages[index].tool_calls
  following = list(
    itertools.takewhile(
      lambda message: message.role == 'tool', messages[index + 1 :]
    )
  )
  end = index + 1 + len(following)
  if len(following) > len(calls):
    raise ChatError(
      f'messages[{index + 1 + len(calls)}]',
      f'is result {len(calls) + 1}, but messages[{index}] makes {len(calls)} '
      'call(s)',
    )
  if 0 < len(following) < len(calls) and end < len(messages):
    raise ChatError(
      f'messages[{end}]',
      f'is a {messages[end].role} message, expected result '
      f'{len(following) + 1} of the {len(calls)} calls of messages[{index}]',
    )

  places = {call.id: place for place, call in enumerate(calls) if call.id}
  if len(places) < sum(bool(call.id) for call in calls):
    raise ChatError(
      f'messages[{index}].tool_calls', 'two calls have the same id'
    )
  taken: dict[int, Message] = {}
  in_order = []
  for offset, message in enumerate(following):
    if not places or not message.tool_call_id:
      in_order.append(message)
      continue
    place = places.get(message.tool_call_id)
    if place is None or place in taken:
      what = 'no call' if place is None else 'a call that has its result'
      raise ChatError(
        f'messages[{index + 1 + offset}].tool_call_id',
        f'got {message.tool_call_id!r}, which is {what} of messages[{index}]',
      )
    taken[place] = message
  free = (place for place in range(len(calls)) if place not in taken)
  taken.update(zip(free, in_order, strict=False))
  return [taken[place] for place in sorted(taken)]


def settled(messages: Sequence[Message]) -> Sequence[Message]:
  """The conversation without a last block of results that lacks some."""
  caller, missing = last_caller(messages)
  if missing > 0 and caller + 1 < len(messages):
    return messages[: caller + 1]
  return messages


def last_caller(messages: Sequence[Message]) -> tuple[int, int]:
  """The last message that is no result, and how many results it lacks.

  Returns:
    Its index, or -1 if there is none, and calls less results.
  """
  index = len(messages) - 1
  while index >= 0 and messages[index].role == 'tool':
    index -= 1
  num_calls = len(messages[index].tool_calls) if index >= 0 else 0
  return index, num_calls - (len(messages) - 1 - index)
