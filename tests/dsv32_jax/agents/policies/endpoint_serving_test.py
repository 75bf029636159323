"""The endpoint's policy against this project's own server, model and all."""

import pytest

from dsv32_jax.agents.loop import Budgets, run_episode
from dsv32_jax.agents.policies import EndpointPolicy
from dsv32_jax.agents.policies.openai_http import ChatEndpoint
from dsv32_jax.agents.tools import function_tool
from dsv32_jax.agents.types import Score
from dsv32_jax.chat import Message
from tests.support import scripted_model, serving


class Store:
  """One article, whose level is asked for."""

  is_over = False

  def __init__(self):
    self.asked = []
    self.tools = [function_tool(self.stock_level)]

  def stock_level(self, sku: str, limit: int) -> int:
    """How many are left."""
    self.asked.append((sku, limit))
    return 12

  def start(self):
    return [
      Message(role='system', tools=tuple(tool.spec for tool in self.tools)),
      Message(role='user', content='Is A-7 in stock?'),
    ]

  def score(self, messages):
    return Score(reward=1.0)

  def close(self):
    pass


@pytest.mark.slow
@pytest.mark.parametrize('mode', ['thinking', 'chat'])
def test_episode_through_our_server_calls_its_tool_in_every_step(mode):
  loaded = scripted_model.loaded(scripted_model.CALLS)
  store = Store()
  with serving.running(loaded) as server:
    found = run_episode(
      EndpointPolicy(ChatEndpoint(f'{server.url}/v1'), 'scripted'),
      store,
      budgets=Budgets(steps=2, new_tokens=200),
      mode=mode,
    )
  assert found.ending == 'steps', found.error
  assert store.asked == [('A-7', 3)] * 2
  reasoning = ''.join(scripted_model.REASONING) if mode == 'thinking' else ''
  for step in found.steps:
    assert step.reply.reasoning == reasoning
    (call,), (result,) = step.reply.tool_calls, step.results
    assert call.id == result.tool_call_id != ''
    assert step.num_tokens > 5
