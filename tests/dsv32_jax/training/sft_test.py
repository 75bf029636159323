"""SFT as a stage of a recipe, from a file of conversations to a checkpoint."""

import dataclasses
import json

import pytest

from dsv32_jax.chat import Message
from dsv32_jax.config.data import DataConfig, SourceConfig
from dsv32_jax.config.training import (
  CheckpointConfig,
  MeshConfig,
  OptimizerConfig,
  RunConfig,
  StageConfig,
)
from dsv32_jax.data import conversations
from dsv32_jax.data.conversations import Conversation
from dsv32_jax.training import recipe
from tests.support import small_runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def quiet(line):
  del line


def question(number: int) -> Conversation:
  """A question whose answer is its own parity."""
  answer = 'odd' if number % 2 else 'even'
  return Conversation(
    messages=(
      Message(role='user', content=f'{number}?'),
      Message(role='assistant', content=answer),
    ),
    tags={'domain': 'mathematics' if number % 3 else 'programming'},
  )


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A finished run of one sft stage."""
  root = tmp_path_factory.mktemp('sft')
  path = root / 'parity.jsonl'
  conversations.write(path, map(question, range(100)))
  data = DataConfig(
    seq_len=48,
    batch_size=2,
    sources=(SourceConfig(kind='conversations', path=str(path)),),
    held_out_fraction=0.0,
  )
  stage = StageConfig(
    kind='sft',
    steps=40,
    data=data,
    optimizer=OptimizerConfig(peak_learning_rate=3e-3),
  )
  config = RunConfig(
    # k of 64 is more than a row has: attention then is dense.
    model=dataclasses.replace(small_runs.model(), index_topk=64),
    stages={'sft': stage},
    order=('sft',),
    mesh=MeshConfig(data=1),
    checkpoint=CheckpointConfig(every_steps=40),
  )
  made = recipe.Run(config, root / 'run', report=quiet)
  made.run()
  return made


def lines(run) -> list[dict]:
  path = run.stage_dir('sft') / 'metrics.jsonl'
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_sft_stage_learns_replies_and_trains_the_indexer(run):
  assert run.is_done('sft')
  first, last = lines(run)[0], lines(run)[-1]
  assert first['loss/lm'] > 5
  # One of two words: with prompts counted in, digits would keep it above 1.
  assert last['loss/lm'] < 0.7
  assert last['loss/indexer_kl'] > 0
  assert last['grad_norm/indexer'] > 0
