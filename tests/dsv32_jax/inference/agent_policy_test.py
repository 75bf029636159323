"""Agents on a real engine, whose model knows one reply by heart."""

import dataclasses
import threading

import pytest

from dsv32_jax import chat, inference
from dsv32_jax.agents.episodes import Episode, run_episodes
from dsv32_jax.agents.loop import Budgets, run_episode
from dsv32_jax.agents.tools import function_tool
from dsv32_jax.agents.trajectories import replay
from dsv32_jax.agents.types import Policy, PolicyError, Query, Score
from dsv32_jax.chat import Message
from dsv32_jax.inference.agent_policy import EnginePolicy
from tests.support import scripted_model, serving

# Compiling an engine's programs takes nearly all of it.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

STEPS = 2
RECORD = inference.Record(kept=True)
SAMPLING = inference.Sampling(temperature=1.0, top_p=0.95)
# The prompts have a section of tools.
ENGINE = dataclasses.replace(serving.ENGINE, max_waiting=1, prefill_chunk=1024)


class Store:
  """One article."""

  is_over = False

  def __init__(self):
    self.asked = []
    self.tools = [function_tool(self.stock_level)]

  def stock_level(self, sku: str, limit: int) -> str:
    """How many are left."""
    self.asked.append((sku, limit))
    return f'{len(self.asked)} left'

  def start(self):
    return [
      Message(role='system', tools=tuple(tool.spec for tool in self.tools)),
      Message(role='user', content='Is A-7 in stock?'),
    ]

  def score(self, messages):
    return Score(reward=len(self.asked) / 10)

  def close(self):
    pass


@pytest.fixture(scope='module')
def running():
  loaded = scripted_model.loaded(scripted_model.CALLS)
  engine = inference.Engine(loaded.model, loaded.variables, ENGINE)
  with inference.EngineThread(engine) as thread:
    yield thread, loaded.tokenizer


def test_episodes_on_an_engine_keep_the_tokens_that_it_sampled(running):
  thread, tokenizer = running
  policy = EnginePolicy(thread, tokenizer, record=RECORD)
  assert isinstance(policy, Policy)
  episodes = [
    Episode(task='store', make=Store, seed=seed, budgets=Budgets(steps=STEPS))
    for seed in range(3)
  ]
  found = list(run_episodes(episodes, policy, tokenizer=tokenizer))
  # Words are tokens of the model that its tokenizer never makes of text: had a
  # reply been encoded again, they would be gone.
  special = tokenizer.special_ids
  sampled = (
    *scripted_model.ids(scripted_model.REASONING),
    special[chat.THINK_END],
    *scripted_model.ids(scripted_model.CALLS),
    special[chat.EOS],
  )
  for one in found:
    assert (one.ending, one.score.reward) == ('steps', STEPS / 10)
    policy_tokens = tuple(
      token
      for token, is_policy in zip(one.tokens, one.is_policy, strict=True)
      if is_policy
    )
    assert policy_tokens == sampled * STEPS
    assert [c.tokens for c in one.completions] == [sampled] * STEPS
    # Each prompt is the sequence so far: nothing is ever told anew.
    for completion in one.completions:
      size = len(completion.prompt) + len(sampled)
      assert completion.prompt + sampled == one.tokens[:size]
    assert replay(one, Store(), tokenizer=tokenizer).tokens == one.tokens


def test_engine_without_room_or_time_ends_the_episode_as_such(running):
  thread, tokenizer = running
  policy = EnginePolicy(thread, tokenizer, record=RECORD)
  cut = run_episode(
    policy, Store(), tokenizer=tokenizer, budgets=Budgets(new_tokens=3)
  )
  assert (cut.ending, cut.steps[0].num_tokens) == ('tokens', 3)
  with pytest.raises(PolicyError, match='the engine takes 4096') as error:
    policy.reply(Query(messages=(), tokens=(1,) * 4096))
  assert error.value.ending == 'tokens'
  with pytest.raises(PolicyError, match='no time is left') as error:
    policy.reply(Query(messages=tuple(Store().start()), timeout_s=1e-6))
  assert error.value.ending == 'wall'


def test_full_engine_is_waited_for_as_long_as_there_is_time(running):
  thread, tokenizer = running
  policy = EnginePolicy(thread, tokenizer, sampling=SAMPLING, record=RECORD)
  stands, goes_on = threading.Event(), threading.Event()

  def stop(_):
    stands.set()
    goes_on.wait(60)

  # As the requests above are: no further program is compiled.
  query = Query(messages=tuple(Store().start()), max_new_tokens=2)
  request = inference.Request(
    prompt=tuple(chat.encode(query.messages, tokenizer, mode=query.mode)),
    max_new_tokens=2,
    sampling=SAMPLING,
    record=RECORD,
  )
  # What was given up above is gone.
  serving.wait_for(lambda: thread.engine.stats().waiting == 0, 60)
  # The engine stands still while it reports; one more request may wait.
  tickets = [thread.submit(request, stop)]
  assert stands.wait(60)
  tickets.append(thread.submit(request))
  with pytest.raises(inference.QueueFull):
    thread.submit(request)
  with pytest.raises(PolicyError, match='no time is left') as error:
    policy.reply(dataclasses.replace(query, timeout_s=0.1))
  assert error.value.ending == 'wall'
  threading.Timer(0.1, goes_on.set).start()
  assert policy.reply(query).num_tokens == 2
  assert [ticket.result(60).finish_reason for ticket in tickets] == [
    *['length'] * 2
  ]


def test_engine_that_has_ended_is_a_policy_error():
  loaded = scripted_model.loaded(scripted_model.CALLS)
  engine = inference.Engine(loaded.model, loaded.variables, ENGINE)
  with inference.EngineThread(engine) as thread:
    policy = EnginePolicy(thread, loaded.tokenizer)
  with pytest.raises(PolicyError, match='the engine does not run') as error:
    policy.reply(Query(messages=(Message(role='user'),)))
  assert error.value.ending == 'policy_error'
