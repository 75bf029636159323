"""Seeded random histories of agents: turns with many groups of calls.

Run as a program it checks the context strategies on many of them:

  python -m tests.support.histories 10000 1
"""

import dataclasses
import random
import sys
from collections.abc import Sequence

from dsv32_jax.agents import context
from dsv32_jax.chat import Message, Mode, render
from tests.support import chat_conversations as conversations


def history(rng: random.Random) -> tuple[tuple[Message, ...], Mode]:
  """Messages and their mode; with at least one call, sometimes open ones."""
  mode: Mode = rng.choice(('chat', 'thinking'))
  messages = []
  if rng.random() < 0.7:
    messages.append(
      Message(
        role='system',
        content=conversations.text(rng, with_markup=True),
        tools=conversations.tools(rng),
      )
    )
  for _ in range(rng.choice((0, 0, 1))):
    messages += conversations.turn(rng, mode)
  messages.append(
    Message(
      role=rng.choice(('user', 'user', 'developer')),
      content=conversations.text(rng, with_markup=True),
    )
  )
  for _ in range(rng.choice((1, 2, 3, 4, 7, 12))):
    messages += _group(rng, mode)
  ending = rng.random()
  if ending < 0.15:
    messages.append(conversations.assistant(rng, mode, calls=False))
  elif ending < 0.3:
    # Results are still to come: none of them is there, or not all.
    reply, *results = _group(rng, mode)
    messages += [reply, *results[: rng.randrange(len(results))]]
  return tuple(messages), mode


def _group(rng: random.Random, mode: Mode) -> list[Message]:
  reply = conversations.assistant(rng, mode, calls=True)
  ids = rng.random() < 0.5
  if ids:
    calls = tuple(
      dataclasses.replace(call, id=f'call-{index}')
      for index, call in enumerate(reply.tool_calls)
    )
    reply = dataclasses.replace(reply, tool_calls=calls)
  results = [
    Message(
      role='tool',
      content=conversations.text(rng, with_markup=True)
      * rng.choice((1, 1, 5, 40)),
      tool_call_id=call.id,
    )
    for call in reply.tool_calls
  ]
  if ids:
    rng.shuffle(results)
  return [reply, *results]


def counter(mode: Mode) -> context.Count:
  """A count that needs the messages to be valid."""
  return lambda messages: len(render(messages, mode=mode))


def check(messages: Sequence[Message], mode: Mode, rng: random.Random) -> int:
  """Manages a history by every strategy; returns the groups dropped in all.

  Raises:
    AssertionError: what a result lacks.
    ChatError: it does not render.
  """
  num_characters = counter(mode)
  before = num_characters(messages)
  budget = context.Budget(window=max(1, int(before / rng.uniform(0.5, 1.0))))
  written = conversations.text(rng, with_markup=True) * rng.choice((1, 50))
  summary = context.Summary(
    summarise=lambda read, limit: _summary(read, limit, mode, budget, written),
    max_tokens=budget.window // 10,
  )
  num_dropped = 0
  for strategy in (context.DISCARD_75, context.DISCARD_ALL, summary):
    after = strategy.on_overflow(messages, budget=budget, count=num_characters)
    render(after, mode=mode)
    assert num_characters(after) < before, strategy.name
    _check_kept(messages, after, is_summary=strategy is summary)
    kept = sum(bool(message.tool_calls) for message in after)
    num_groups = sum(bool(message.tool_calls) for message in messages)
    if strategy is context.DISCARD_75:
      bare = context.DISCARD_ALL.on_overflow(
        messages, budget=budget, count=num_characters
      )
      limit = max(budget.target * budget.window, num_characters(bare))
      assert num_characters(after) <= limit
      assert kept <= num_groups - max(1, int(0.75 * num_groups))
    else:
      assert kept == 0, strategy.name
    again = strategy.on_overflow(after, budget=budget, count=num_characters)
    assert num_characters(again) <= num_characters(after)
    num_dropped += num_groups - kept
  return num_dropped


def _summary(
  read: Sequence[Message],
  limit: int,
  mode: Mode,
  budget: context.Budget,
  written: str,
) -> str:
  # What the writer reads can be asked about.
  render((*read, Message(role='user', content='Summarise.')), mode=mode)
  if any(message.tool_calls for message in read):
    assert counter(mode)(read) <= budget.window - limit
  return written


def _check_kept(
  before: Sequence[Message], after: Sequence[Message], *, is_summary: bool
) -> None:
  """What must stay did, in order; a group is whole or gone."""
  stays = [m for m in before if m.role != 'tool' and not m.tool_calls]
  stayed = [m for m in after if m.role != 'tool' and not m.tool_calls]
  assert len(stays) == len(stayed)
  for old, new in zip(stays, stayed, strict=True):
    if is_summary and old != new:
      assert new.content.startswith(old.content)
      new = dataclasses.replace(new, content=old.content)
    assert old == new
  # Groups are compared by identity: equal ones may occur twice.
  kept = {id(message) for message in after}
  inside = None
  for message in before:
    if message.tool_calls:
      inside = id(message) in kept
    elif message.role == 'tool':
      assert inside == (id(message) in kept)


def run(num_histories: int, *, seed: int) -> int:
  """Checks so many histories; returns how many groups were dropped."""
  rng = random.Random(seed)
  return sum(check(*history(rng), rng) for _ in range(num_histories))


if __name__ == '__main__':
  count = int(sys.argv[1])
  dropped = run(count, seed=int(sys.argv[2]))
  print(f'{count} histories, {dropped} groups dropped')
