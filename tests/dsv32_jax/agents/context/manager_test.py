"""Managing an episode's context through the loop."""

import itertools

import pytest

from dsv32_jax.agents import context
from dsv32_jax.agents.loop import Budgets, run_episode
from dsv32_jax.agents.policies import ScriptedPolicy
from dsv32_jax.agents.tools import function_tool
from dsv32_jax.agents.types import Score
from dsv32_jax.chat import Message, ToolCall


class Library:
  """Its only tool returns a page of a hundred characters."""

  is_over = False

  def __init__(self):
    self.tools = [function_tool(self.read)]

  def read(self, page: int) -> str:
    """Reads a page."""
    return f'{page:03}' + 'x' * 97

  def start(self):
    specs = tuple(tool.spec for tool in self.tools)
    return [
      Message(role='system', tools=specs),
      Message(role='user', content='What is on page 29?'),
    ]

  def score(self, messages):
    return Score(reward=float(messages[-1].content.startswith('029')))

  def close(self):
    pass


def _count(messages):
  return sum(len(message.content) for message in messages)


def _reads_on():
  """Reads one page after the other, whatever it still sees."""
  pages = itertools.count()

  def reply(query):
    call = ToolCall(name='read', arguments={'page': next(pages)})
    return Message(role='assistant', tool_calls=(call,))

  return ScriptedPolicy(reply)


@pytest.mark.parametrize(
  ('strategy', 'max_resets', 'ending', 'resets'),
  [
    (None, 16, 'tokens', 0),
    (context.DISCARD_ALL, 16, 'steps', 3),
    (context.DISCARD_75, 16, 'steps', 4),
    (context.DISCARD_ALL, 1, 'tokens', 1),
  ],
)
def test_episode_goes_on_in_a_context_that_is_kept_short(
  strategy, max_resets, ending, resets
):
  manager = context.Manager(
    strategy,
    budget=context.Budget(window=1000, max_resets=max_resets),
    count=_count,
  )
  found = run_episode(
    _reads_on(),
    Library(),
    budgets=Budgets(steps=30),
    mode='chat',
    manage=manager,
  )
  assert (found.ending, manager.resets) == (ending, resets)
  assert sum(bool(step.context) for step in found.steps) == resets
  assert found.score.reward == float(ending == 'steps')
  assert _count(found.messages) <= 1000 + 119
