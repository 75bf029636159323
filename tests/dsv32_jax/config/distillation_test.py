import dataclasses

import pytest

from dsv32_jax.config import convert, presets
from dsv32_jax.config.data import DataConfig, SourceConfig
from dsv32_jax.config.distillation import (
  SPECIALISED_DOMAINS,
  BaseConfig,
  DistillationConfig,
  PairedEvaluationConfig,
  RejectionConfig,
  RLStepConfig,
  SpecialistDomain,
)
from dsv32_jax.config.problems import DemonstrationConfig, ProblemSourceConfig
from dsv32_jax.config.rollout import RolloutConfig
from dsv32_jax.config.sft import SFTConfig, SFTRunConfig
from dsv32_jax.config.training import StageConfig

SOURCE = ProblemSourceConfig(name='logic')
MODEL = dataclasses.replace(presets.tiny(), num_nextn_predict_layers=0)


def pretraining(path: str = 'demonstrations:base') -> StageConfig:
  data = DataConfig(sources=(SourceConfig(kind='conversations', path=path),))
  return StageConfig(kind='pretrain', steps=2, data=data)


def config(**changes) -> DistillationConfig:
  rl = RLStepConfig(batches=2, rollout=RolloutConfig(max_new_tokens=32))
  settings = {
    'model': MODEL,
    'base': BaseConfig(
      stages={'pretrain': pretraining()},
      order=('pretrain',),
      demonstrations={'base': (DemonstrationConfig(source=SOURCE, count=5),)},
    ),
    'domains': {
      'logical_reasoning': SpecialistDomain(sources=(SOURCE,)),
      'programming': SpecialistDomain(sources=(SOURCE,), modes=('chat',)),
      'agentic_search': SpecialistDomain(unpopulated='later'),
    },
    'specialist_sft': SFTConfig(steps=3),
    'specialist_rl': rl,
    'rejection': RejectionConfig(),
    'student_sft': SFTConfig(steps=3),
    'mixed_rl': rl,
  }
  return DistillationConfig(**(settings | changes))


def test_distillation_pairs_are_populated_domains_in_their_modes():
  assert config().pairs == (
    ('logical_reasoning', 'thinking'),
    ('logical_reasoning', 'chat'),
    ('programming', 'chat'),
  )


def test_distillation_dict_round_trip_gives_equal_config():
  built = convert.from_dict(DistillationConfig, convert.to_dict(config()))
  assert built == config()


def test_distillation_base_run_reads_demonstrations_where_they_lie():
  run = config().base_run('some/where')
  [source] = run.stages['pretrain'].data.sources
  assert source.path == 'some/where/base.jsonl'


def test_distillation_knows_the_papers_six_domains():
  assert len(SPECIALISED_DOMAINS) == 6
  for name in SPECIALISED_DOMAINS:
    domains = {name: SpecialistDomain(sources=(SOURCE,))}
    assert config(domains=domains).pairs == (
      (name, 'thinking'),
      (name, 'chat'),
    )


@pytest.mark.parametrize(
  ('build', 'message'),
  [
    (lambda: SFTConfig(steps=0), 'steps: got 0'),
    (lambda: SFTConfig(steps=1, batch_size=0), 'batch_size: got 0'),
    (lambda: RLStepConfig(batches=0), 'batches: got 0'),
    (lambda: RejectionConfig(samples=0), 'samples: got 0'),
    (lambda: RejectionConfig(temperature=0.0), r'temperature: got 0\.0'),
    (lambda: RejectionConfig(top_p=1.5), r'top_p: got 1\.5'),
    (lambda: PairedEvaluationConfig(problems=1), 'problems: got 1, expected'),
    (lambda: SpecialistDomain(), 'sources: got 0 with unpopulated'),
    (
      lambda: SpecialistDomain(sources=(SOURCE,), unpopulated='later'),
      'sources: got 1 with unpopulated',
    ),
    (
      lambda: SpecialistDomain(sources=(SOURCE,), modes=('chat', 'chat')),
      r"modes: got \('chat', 'chat'\)",
    ),
    (lambda: BaseConfig(), 'init_from: got None with order'),
    (
      lambda: BaseConfig(init_from='x', order=('a',)),
      "init_from: got 'x' with order",
    ),
    (
      lambda: BaseConfig(order=('a',), stages={'a': pretraining()}),
      r"got path 'demonstrations:base', expected one of \[\]",
    ),
    (
      lambda: config(domains={'cooking': SpecialistDomain(sources=(SOURCE,))}),
      "domains: got 'cooking', expected one of",
    ),
    (
      lambda: config(
        domains={'mathematics': SpecialistDomain(unpopulated='later')}
      ),
      'domains: got none with sources',
    ),
    (
      lambda: config(
        domains={
          'mathematics': SpecialistDomain(sources=(SOURCE,), max_new_tokens=64)
        }
      ),
      r'domains\.mathematics\.max_new_tokens: got 64, expected at most',
    ),
    (
      lambda: config(model=dataclasses.replace(MODEL, q_lora_rank=None)),
      'q_lora_rank: got None',
    ),
  ],
)
def test_distillation_impossible_values_are_refused(build, message):
  with pytest.raises(ValueError, match=message) as error:
    build()
  assert 'expected' in str(error.value)


def sft_run() -> SFTRunConfig:
  stages = {
    'pretrain': pretraining('demonstrations:all'),
    'sft': SFTConfig(steps=2).stage(
      init_from='pretrain',
      shares={'demonstrations:all': 1.0},
      tokenizer=DataConfig().tokenizer,
    ),
  }
  return SFTRunConfig(
    model=MODEL,
    stages=stages,
    order=tuple(stages),
    demonstrations={'all': (DemonstrationConfig(source=SOURCE, count=5),)},
  )


def test_sft_run_with_own_data_and_start_is_its_last_stage_alone():
  changed = sft_run().with_start(
    init_from='runs/base', conversations='mine.jsonl'
  )
  assert changed.order == ('sft',)
  stage = changed.run('written').stages['sft']
  assert stage.init_from == 'runs/base'
  assert [source.path for source in stage.data.sources] == ['mine.jsonl']
  assert sft_run().with_start(init_from=None, conversations=None) == sft_run()


def test_sft_run_with_demonstrations_that_no_one_writes_is_refused():
  with pytest.raises(ValueError, match=r'stages\.pretrain\.data\.sources: got'):
    dataclasses.replace(sft_run(), demonstrations={})
