import dataclasses
import json
import os
import sys

import pytest

from dsv32_jax.config.data import DataConfig, SourceConfig
from dsv32_jax.config.problems import (
  DEMONSTRATIONS,
  DemonstrationConfig,
  DomainConfig,
  ProblemSourceConfig,
)
from dsv32_jax.config.rewards import RewardConfig
from dsv32_jax.config.rl import (
  GRPOConfig,
  RLConfig,
  RLEvaluationConfig,
  UpdateConfig,
)
from dsv32_jax.config.rollout import RolloutConfig
from dsv32_jax.config.training import (
  MeshConfig,
  OptimizerConfig,
  StageConfig,
)
from dsv32_jax.rl import ablation_runner, ablations, trainer
from dsv32_jax.rl.ablations import Cell, Regime, cells, config_of
from tests.support import tiny_configs


def base(**update):
  source = ProblemSourceConfig(
    name='speciale/proof',
    options={'kinds': ('compute',), 'numbers': 2, 'largest': 4},
  )
  # Decay moves it, though no response earns anything.
  adam = OptimizerConfig(peak_learning_rate=1e-2, weight_decay=1.0)
  return RLConfig(
    model=tiny_configs.config(vocab_size=272),
    batches=3,
    domains={'mathematics': DomainConfig(sources=(source,))},
    demonstrations={'d': (DemonstrationConfig(source=source, count=20),)},
    stages={
      'base': StageConfig(
        kind='pretrain',
        steps=1,
        data=DataConfig(
          seq_len=48,
          batch_size=2,
          sources=(
            SourceConfig(kind='conversations', path=DEMONSTRATIONS + 'd'),
          ),
          held_out_fraction=0.0,
        ),
      )
    },
    order=('base',),
    rollout=RolloutConfig(
      prompts_per_batch=2,
      group_size=2,
      top_k=8,
      max_new_tokens=4,
      max_batch=4,
      prefill_rows=4,
      prefill_chunk=32,
      page_size=16,
      decode_steps=3,
    ),
    rewards=RewardConfig(workers=0),
    grpo=GRPOConfig(kl_strength=0.05),
    update=UpdateConfig(
      **{
        'minibatches': 1,
        'row_tokens': 32,
        'rows': 4,
        'max_prompt_tokens': 28,
        'optimizer': adam,
        'indexer_optimizer': adam,
        'reference_every': 0,
        **update,
      }
    ),
    evaluation=RLEvaluationConfig(problems=2, every_batches=0, greedy=False),
    mesh=MeshConfig(data=1),
  )


def test_cells_are_all_that_differ_seed_by_seed():
  found = cells(['stale', 'top_p', 'stale_strong_kl'], [3, 4])
  assert len(found) == len({cell.key for cell in found}) == 2 * (6 + 3 + 2)
  assert [cell.seed for cell in found] == [3] * 11 + [4] * 11
  keys = {cell.key for cell in found}
  assert 'top_p/no_keep_sampling_mask/3' in keys
  # Nothing is kept where nothing is cut off.
  assert 'stale/no_keep_sampling_mask/3' not in keys
  with pytest.raises(ValueError, match="regimes: got 'warm'"):
    cells(['warm'], [0])
  with pytest.raises(ValueError, match='variants: got'):
    Regime(variants=('no_dropout',))


def test_cell_changes_what_it_names_and_nothing_else():
  start = base()
  for regime in ablations.REGIMES:
    for variant, off in ablations.VARIANTS.items():
      config = config_of(start, Cell(regime=regime, variant=variant, seed=5))
      settings = ablations.REGIMES[regime]
      assert config.rollout.staleness == settings.staleness
      assert config.rollout.precision == settings.precision
      assert config.rollout.top_p == settings.top_p
      assert config.rollout.truncates == (settings.top_p < 1)
      for switch in ablations.SWITCHES:
        assert getattr(config.grpo, switch) == (switch not in off)
      back = dataclasses.replace(
        config, seed=0, rollout=start.rollout, grpo=start.grpo
      )
      assert back == start


def test_base_with_several_minibatches_is_refused():
  with pytest.raises(ValueError, match=r'update\.minibatches: got 2'):
    config_of(
      base(minibatches=2, rows=2),
      Cell(regime='stale', variant='all_on', seed=0),
    )


class FakeLab:
  """Runs nothing, and dies at one cell."""

  def __init__(self, dies_at=''):
    self.ran, self._dies_at = [], dies_at

  def run(self, cell):
    if cell.key == self._dies_at:
      raise KeyboardInterrupt
    self.ran.append(cell.key)
    return {
      'cell': cell.key,
      'before': {'pass@1': 0.1},
      'after': {'pass@1': 0.5},
      'seconds': 1.0,
      'diverged': None,
    }


def test_cells_are_shared_out_once_and_survive_a_kill(tmp_path):
  todo = cells(['fp8'], [0, 1])
  first = FakeLab(dies_at='fp8/no_keep_selection/0')
  with pytest.raises(KeyboardInterrupt):
    ablation_runner.work(
      first.run, todo, tmp_path, worker=1, report=lambda line: None
    )
  # Begins with the variant of its own number, within the first seed.
  assert first.ran[0] == 'fp8/no_unbiased_kl/0'
  path = tmp_path / 'worker_1.jsonl'
  path.write_text(path.read_text() + '{"cell": "on_pol')
  second = FakeLab()
  ablation_runner.work(
    second.run, todo, tmp_path, worker=0, report=lambda line: None
  )
  # The cell at which the first died is claimed until the next start.
  assert len(first.ran) + len(second.ran) == len(todo) - 1
  ablation_runner.clear_claims(tmp_path)
  third = FakeLab()
  ablation_runner.work(
    third.run, todo, tmp_path, worker=1, report=lambda line: None
  )
  assert third.ran == ['fp8/no_keep_selection/0']
  rows = ablation_runner.read(tmp_path)
  assert [row['cell'] for row in rows] == sorted(cell.key for cell in todo)
  assert all(json.loads(line) for line in path.read_text().splitlines())


def test_processes_get_cores_of_their_own(tmp_path):
  program = tmp_path / 'program.py'
  program.write_text(
    'import sys\n'
    'number = sys.argv[1].removeprefix("--worker=")\n'
    f'open({str(tmp_path)!r} + "/cores_" + number, "w").write(sys.argv[2])\n'
    'sys.exit(int(number))\n'
  )
  mine = sorted(os.sched_getaffinity(0))
  workers = min(2, len(mine))
  codes = ablation_runner.run_all(
    [str(program)],
    tmp_path,
    workers=workers,
    cores=mine,
    report=lambda line: None,
  )
  assert codes == list(range(workers))
  share = len(mine) // workers
  for number in range(workers):
    expected = ','.join(map(str, mine[number * share : (number + 1) * share]))
    assert (tmp_path / f'cores_{number}').read_text() == f'--cores={expected}'
  with pytest.raises(ValueError, match='workers: got'):
    ablation_runner.run_all(
      [sys.executable], tmp_path, workers=len(mine) + 1, cores=mine
    )


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_cell_equals_a_run_of_the_trainer(tmp_path, monkeypatch):
  # Stale, in FP8 and from a nucleus; shorter than the regime's staleness.
  short = dataclasses.replace(ablations.REGIMES['all_three'], staleness=1)
  monkeypatch.setitem(ablations.REGIMES, 'short', short)
  cell = Cell(regime='short', variant='no_keep_routing', seed=1)
  lab = ablations.Lab(base(), tmp_path / 'lab', report=lambda line: None)
  row = lab.run(cell)
  config = config_of(base(), cell)
  trainer.Run(config, tmp_path / 'run', report=lambda line: None).run()
  text = (tmp_path / 'run' / 'metrics.jsonl').read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  assert len(lines) == 3
  for name in ('reward/mean', 'kl/all', 'grad_norm/main', 'grpo/ratio_max'):
    expected = [line[name] for line in lines]
    assert row['series'][name] == pytest.approx(expected, rel=1e-3), name
