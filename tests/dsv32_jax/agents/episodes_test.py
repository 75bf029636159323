import itertools
import sys
import threading

import pytest

from dsv32_jax.agents.episodes import Episode, Failure, run_episodes
from dsv32_jax.agents.loop import Budgets
from dsv32_jax.agents.policies import ScriptedPolicy
from dsv32_jax.agents.types import Trajectory
from dsv32_jax.chat import Message, ToolCall
from tests.support import agent_episodes

DONE = Message(role='assistant', content='Done.', reasoning='So.')


class Faulty(agent_episodes.GeneratedEnvironment):
  """Fails at one place, in one way."""

  def __init__(self, place, made):
    if place == 'make':
      raise OSError('no file')
    super().__init__(0)
    self._place = place
    self._runs = False
    made.append(self)

  def start(self):
    if self._place == 'start':
      raise KeyError('a')
    found = super().start()
    self._runs = True
    return found

  def score(self, messages):
    if self._place == 'score':
      sys.exit(3)
    return super().score(messages)

  @property
  def tools(self):
    # Checks of its type look here too, before it runs (Python 3.11).
    if self._place == 'tools' and self._runs:
      raise ZeroDivisionError
    return super().tools

  def close(self):
    super().close()
    if self._place == 'close':
      raise RuntimeError('is stuck')


def _policy():
  call = Message(role='assistant', tool_calls=(ToolCall(name='f'),))
  return ScriptedPolicy([call, DONE])


def test_each_failure_costs_its_own_episode_and_is_reported():
  places = ['', 'make', 'start', 'tools', 'score', 'close', '']
  made = []
  episodes = [
    Episode(
      task=f'{index}', make=lambda place=place: Faulty(place, made), seed=index
    )
    for index, place in enumerate(places)
  ]
  found = list(run_episodes(episodes, _policy(), parallel=3))
  assert [one.task for one in found] == [str(i) for i in range(7)]
  errors = {
    place: one.error
    for place, one in zip(places, found, strict=True)
    if isinstance(one, Failure)
  }
  assert errors == {
    'make': "task '1', seed 1: OSError: no file",
    'start': (
      "task '2', seed 2: the environment, starting, raised KeyError: 'a'"
    ),
    'tools': (
      "task '3', seed 3: the environment, asked for its tools, raised "
      'ZeroDivisionError: '
    ),
    'score': "task '4', seed 4: SystemExit: 3",
    'close': "task '5', seed 5: RuntimeError: is stuck",
  }
  assert 'in start' in found[2].trace
  assert len(made) == 6
  assert all(one.num_closed == 1 for one in made)
  assert all(isinstance(found[i], Trajectory) for i in (0, 6))


def test_episodes_run_at_once_and_give_what_each_gives_alone():
  barrier = threading.Barrier(4, timeout=20)

  def reply(query):
    # Only passed if four episodes ask at a time.
    if len(query.messages) == 2:
      barrier.wait()
    return DONE

  episodes = [
    Episode(
      task=str(seed),
      make=lambda seed=seed: agent_episodes.GeneratedEnvironment(seed),
      seed=seed,
      budgets=Budgets(steps=2),
    )
    for seed in range(8)
  ]
  found = list(run_episodes(episodes, ScriptedPolicy(reply), parallel=4))
  alone = list(run_episodes(episodes, ScriptedPolicy([DONE]), parallel=1))
  assert [one.score for one in found] == [one.score for one in alone]
  assert [one.seed for one in found] == list(range(8))


def test_endless_episodes_are_taken_as_there_is_room():
  taken = itertools.count()
  episodes = (
    Episode(
      task='a', make=lambda: agent_episodes.GeneratedEnvironment(0), seed=i
    )
    for i in taken
  )
  running = run_episodes(episodes, ScriptedPolicy([DONE]), parallel=2)
  assert next(running).seed == 0
  assert next(running).seed == 1
  running.close()
  assert next(taken) < 30


def test_parallel_below_1_is_refused():
  with pytest.raises(ValueError, match='parallel: got 0, expected at least 1'):
    run_episodes([], _policy(), parallel=0)
