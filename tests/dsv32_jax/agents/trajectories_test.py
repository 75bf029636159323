import dataclasses
import json
import multiprocessing
import threading

import pytest

from dsv32_jax.agents import trajectories
from dsv32_jax.agents.loop import Budgets, run_episode
from dsv32_jax.agents.policies import ScriptedPolicy
from dsv32_jax.agents.trajectories import ReplayError, replay
from dsv32_jax.agents.types import PolicyError, Score
from dsv32_jax.chat import Message, ToolCall
from tests.support import agent_episodes

TOKENIZER = agent_episodes.PairTokenizer()


def _trajectory(seed):
  mode = agent_episodes.mode_of(seed)
  return run_episode(
    agent_episodes.policy(seed, mode, TOKENIZER),
    agent_episodes.GeneratedEnvironment(seed),
    budgets=Budgets(steps=agent_episodes.STEPS),
    tokenizer=TOKENIZER,
    mode=mode,
    seed=seed,
    task=f'generated/{seed}',
  )


def test_trajectories_come_back_as_they_were(tmp_path):
  path = tmp_path / 'episodes.jsonl'
  written = [_trajectory(seed) for seed in range(12)]
  written[0] = dataclasses.replace(
    written[0],
    error='half a pair: \ud800',
    score=Score(reward=0.5, reasons=('öne',), parts={'x': 0.25}),
  )
  trajectories.append(path, written[:5])
  trajectories.append(path, written[5:])
  assert list(trajectories.read(path)) == written
  lines = path.read_bytes().splitlines()
  assert [json.loads(line)['version'] for line in lines] == [1] * 12


def test_what_the_engine_recorded_is_not_written(tmp_path):
  one = dataclasses.replace(_trajectory(1), completions=(object(),))
  trajectories.append(tmp_path / 'a', [one])
  (found,) = trajectories.read(tmp_path / 'a')
  assert found == dataclasses.replace(one, completions=())


@pytest.mark.parametrize('left', [1, 100, 70_000])
def test_last_line_that_was_cut_is_passed_over_and_replaced(tmp_path, left):
  path = tmp_path / 'episodes.jsonl'
  first, second, third = (_trajectory(seed) for seed in (1, 2, 3))
  long = dataclasses.replace(second, error='x' * 200_000)
  trajectories.append(path, [first])
  whole = path.stat().st_size
  trajectories.append(path, [long])
  with open(path, 'r+b') as file:
    file.truncate(whole + left)
  assert list(trajectories.read(path)) == [first]
  trajectories.append(path, [third])
  assert list(trajectories.read(path)) == [first, third]


def test_line_that_is_no_trajectory_is_named(tmp_path):
  path = tmp_path / 'episodes.jsonl'
  one = trajectories.to_json(_trajectory(1))
  for wrong, problem in (
    (one | {'version': 2}, 'line 2: ValueError: version: got 2, expected 1'),
    (one | {'is_policy': [3]}, 'line 2: ValueError: is_policy: got 3 for'),
    ({'version': 1}, 'line 2: KeyError'),
  ):
    path.write_text(json.dumps(one) + '\n' + json.dumps(wrong) + '\n')
    with pytest.raises(ValueError, match=problem):
      list(trajectories.read(path))


def _append_many(path, first):
  for seed in range(first, first + 4):
    trajectories.append(path, [_trajectory(seed)])


def test_threads_and_processes_append_whole_lines(tmp_path):
  path = tmp_path / 'episodes.jsonl'
  context = multiprocessing.get_context('forkserver')
  workers = [
    threading.Thread(target=_append_many, args=(path, 0)),
    threading.Thread(target=_append_many, args=(path, 4)),
    context.Process(target=_append_many, args=(path, 8)),
  ]
  for worker in workers:
    worker.start()
  for worker in workers:
    worker.join()
  seeds = sorted(one.seed for one in trajectories.read(path))
  assert seeds == list(range(12))


def _call(amount):
  call = ToolCall(name='keep', arguments={'key': 'a', 'value': amount})
  return Message(role='assistant', reasoning='Hm.', tool_calls=(call,))


@pytest.mark.parametrize(
  'ending', ['steps', 'tokens', 'wall', 'policy_error', 'none']
)
@pytest.mark.parametrize('with_tokens', [True, False])
def test_episode_that_ran_out_replays_to_the_same_end(ending, with_tokens):
  def reply(query):
    if ending == 'none' or (ending != 'steps' and len(query.messages) > 6):
      end = 'policy_error' if ending == 'none' else ending
      raise PolicyError('it is gone', ending=end)
    return _call(len(query.messages))

  tokenizer = TOKENIZER if with_tokens else None
  recorded = run_episode(
    ScriptedPolicy(reply),
    agent_episodes.GeneratedEnvironment(3),
    budgets=Budgets(steps=4),
    tokenizer=tokenizer,
  )
  assert recorded.ending == ('policy_error' if ending == 'none' else ending)
  found = replay(
    recorded, agent_episodes.GeneratedEnvironment(3), tokenizer=tokenizer
  )
  steps = tuple(
    dataclasses.replace(step, seconds=old.seconds)
    for step, old in zip(found.steps, recorded.steps, strict=True)
  )
  assert dataclasses.replace(found, steps=steps) == recorded


def test_replay_in_another_environment_is_refused():
  recorded = _trajectory(1)
  with pytest.raises(ReplayError, match='start: the environment begins'):
    replay(
      recorded, agent_episodes.GeneratedEnvironment(2), tokenizer=TOKENIZER
    )
  with pytest.raises(ReplayError, match='tokenizer: got None'):
    replay(recorded, agent_episodes.GeneratedEnvironment(1))
