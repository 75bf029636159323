import json
import math

import pytest

from dsv32_jax.evaluation import rl_ablations


def row(regime, variant, seed, *, after, reward=0.5, steps=20, diverged=None):
  def series(value):
    return [value] * steps

  return {
    'cell': f'{regime}/{variant}/{seed}',
    'regime': regime,
    'variant': variant,
    'seed': seed,
    'before': {'pass@1': 0.2, 'n': 10},
    'after': None if after is None else {'pass@1': after, 'n': 10},
    'diverged': diverged,
    'series': {
      'reward/mean': series(reward),
      'kl/all': series(0.1),
      'grpo/ratio_mean': series(1.0),
      'grpo/ratio_max': [*series(1.5)[:-1], 3.0],
      'grpo/log_ratio_abs_mean': series(0.01),
      'grpo/clip_fraction': series(0.0),
      'grpo/masked_fraction': series(0.25),
      'grad_norm/main': series(0.7),
      'entropy': series(1.0),
      'mismatch/routing': series(0.02),
      'mismatch/selection': series(None),
      'sampler/log_ratio_abs_mean': [0.1, *series(None)[1:]],
    },
  }


ROWS = [
  row('stale', 'all_on', 0, after=0.5),
  row('stale', 'all_on', 1, after=0.7),
  row('stale', 'all_off', 0, after=0.4),
  row('stale', 'all_off', 1, after=None, steps=7, diverged=7),
  row('on_policy', 'all_on', 0, after=0.6),
]


def test_summary_pairs_runs_by_seed():
  found = rl_ablations.summary(ROWS)
  assert list(found) == ['on_policy', 'stale']
  on, off = found['stale']['all_on'], found['stale']['all_off']
  assert on['accuracy']['mean'] == pytest.approx(0.6)
  # Student's t of one degree of freedom: 12.706 s / sqrt(2), s = 0.1 sqrt(2).
  assert on['accuracy']['half'] == pytest.approx(12.706 * 0.1)
  assert off['diverged'] == 1
  assert off['accuracy'] == {'mean': pytest.approx(0.4), 'half': None}
  # Seed 0 against seed 0 alone.
  assert off['against_all_on']['accuracy']['mean'] == pytest.approx(-0.1)
  assert on['ratio_max']['mean'] == 3.0
  assert on['selection_mismatch']['mean'] is None
  assert on['sampler_log_ratio']['mean'] == pytest.approx(0.1)


def test_interval_of_three_is_students():
  found = rl_ablations.interval([1.0, 2.0, None, 3.0])
  assert found['mean'] == pytest.approx(2.0)
  assert found['half'] == pytest.approx(4.303 / math.sqrt(3))
  assert rl_ablations.interval([None]) == {'mean': None, 'half': None}


def test_band_is_of_the_runs_that_go_on():
  steps, low, mean, high = rl_ablations.band([[1.0] * 12, [3.0] * 6])
  assert steps == [3, 9]
  assert (low, mean, high) == ([1.0, 1.0], [2.0, 1.0], [3.0, 1.0])


def test_report_has_a_figure_and_a_table_of_each_regime(tmp_path):
  rl_ablations.write(tmp_path, ROWS)
  for name in ('stale', 'on_policy', 'effects'):
    assert (tmp_path / 'figures' / f'{name}.png').stat().st_size > 5000
  values = json.loads((tmp_path / 'figures' / 'stale.json').read_text())
  # Rewards stand still at 0.5: nothing since the start.
  assert values['all_on']['reward/mean']['mean'] == [0.0] * 4
  text = (tmp_path / 'tables.md').read_text()
  assert '## stale' in text
  assert '| all_off | 2 (1 diverged) | 40.0 % | -10.0 % |' in text
  widths = {line.count('|') for line in text.splitlines() if line[:1] == '|'}
  assert len(widths) == 1
  assert json.loads((tmp_path / 'summary.json').read_text())['stale']


def test_series_since_the_start_is_less_its_first_steps():
  run = [0.2, 0.4] * 3 + [0.5, None]
  found = rl_ablations.since_start(run)
  assert found[-1] is None
  assert found[-2] == pytest.approx(0.2)
  assert sum(found[:6]) == pytest.approx(0.0)
  assert rl_ablations.since_start([None] * 8) == []


def test_report_of_nothing_writes_nothing(tmp_path):
  rl_ablations.write(tmp_path, [])
  assert not list(tmp_path.iterdir())
