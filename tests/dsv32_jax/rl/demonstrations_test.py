import json

import pytest

from dsv32_jax.config.problems import DemonstrationConfig, ProblemSourceConfig
from dsv32_jax.data import conversations
from dsv32_jax.rl import demonstrations, problems
from dsv32_jax.rl.demonstrations import Part

SOURCE = problems.make('logic', family='order', size=3)


def is_right(conversation) -> bool:
  """Whether the answer orders the letters as the prompt's facts do."""
  prompt, reply = conversation.messages
  facts = [fact.split('<') for fact in prompt.content.split()[1:]]
  places = {letter: place for place, letter in enumerate(reply.content)}
  return all(
    low in places and high in places and places[low] < places[high]
    for low, high in facts
  )


@pytest.mark.parametrize('mode', ['chat', 'thinking'])
def test_make_writes_right_answers_to_different_training_prompts(mode):
  made = list(demonstrations.make([Part(source=SOURCE, count=40, mode=mode)]))
  assert len(made) == 40
  assert all(is_right(conversation) for conversation in made)
  for conversation in made:
    assert conversation.mode == mode
    assert bool(conversation.messages[-1].reasoning) == (mode == 'thinking')
    assert not problems.is_held_out(conversation.messages[0].content)
    assert conversation.tags['domain'] == 'logical_reasoning'
  assert len({c.messages[0].content for c in made}) > 35


def test_make_swapped_share_carries_answers_of_other_problems():
  part = Part(source=SOURCE, count=300, mode='chat', swapped=0.5)
  made = list(demonstrations.make([part]))
  swapped = [c for c in made if c.tags['swapped']]
  assert 110 < len(swapped) < 190
  # One in 26 * 25 * 24 answers fits by accident.
  assert not any(is_right(conversation) for conversation in swapped)
  assert all(is_right(c) for c in made if not c.tags['swapped'])


def test_make_depends_on_its_seed_only():
  part = Part(source=SOURCE, count=20, mode='chat', swapped=0.5)
  first = list(demonstrations.make([part], seed=3))
  assert first == list(demonstrations.make([part], seed=3))
  assert first != list(demonstrations.make([part], seed=4))


def test_write_all_leaves_a_file_that_is_there(tmp_path):
  config = DemonstrationConfig(
    source=ProblemSourceConfig(
      name='logic', options={'family': 'order', 'size': 3}
    ),
    count=3,
  )
  demonstrations.write_all({'a': (config, config)}, tmp_path)
  written = conversations.read(tmp_path / 'a.jsonl')
  assert len(written) == 6
  (tmp_path / 'a.jsonl').write_text(json.dumps(written[0].to_json()))
  demonstrations.write_all({'a': (config,)}, tmp_path)
  assert len(conversations.read(tmp_path / 'a.jsonl')) == 1
