"""Tests of the cost of a token by position."""

import json

import numpy as np
import pytest

from dsv32_jax.evaluation import cost_curve


def record(**changes):
  values = {
    'phase': 'decode',
    'mode': 'dense',
    'position': 1000,
    'attention_us': 30.0,
    'experts_us': 6.0,
    'finite': True,
  }
  return values | changes


def test_curves_are_layers_times_seconds_times_price():
  records = [
    record(position=2000, attention_us=54.0),
    record(attention_us=1e9),
    record(),  # The last measurement of a position counts.
    record(mode='sparse', experts_us=0.0),
  ]
  # 36 us a token and layer, 10 layers, 2 dollars an hour.
  found = cost_curve.curves(records, layers=10, price=2.0)
  expected = 36e-6 * 10 * 1e6 * 2 / 3600
  assert found['decode']['dense'] == [
    [1000, pytest.approx(expected)],
    [2000, pytest.approx(expected * 60 / 36)],
  ]
  assert found['decode']['sparse'] == [
    [1000, pytest.approx(expected * 30 / 36)]
  ]


@pytest.mark.parametrize(
  ('dense', 'sparse', 'expected'),
  [
    # 1 + x = 2 + x / 2 at x = 2.
    ([[0, 1], [10, 11]], [[0, 2], [10, 7]], 2),
    # Points at different positions.
    ([[0, 1], [10, 11]], [[0, 2], [4, 4], [10, 7]], 2),
    ([[0, 1], [10, 2]], [[0, 2], [10, 3]], None),
    ([[0, 3], [10, 4]], [[0, 2], [10, 3]], 0),
    # Cheaper, dearer, cheaper again: from the last crossing on.
    ([[0, 2], [4, 2], [8, 2]], [[0, 1], [4, 3], [8, 1]], 6),
  ],
)
def test_break_even_is_the_last_crossing(dense, sparse, expected):
  dense, sparse = ([[float(x) for x in p] for p in c] for c in (dense, sparse))
  found = cost_curve.break_even(dense, sparse)
  assert found == (None if expected is None else pytest.approx(expected))


def test_paper_curves_say_what_the_paper_says():
  summary = cost_curve.summarise(cost_curve.PAPER)
  assert summary['prefill']['ratio'] == pytest.approx(3.6, abs=0.1)
  assert summary['decode']['ratio'] == pytest.approx(8.6, abs=0.1)
  assert 8_000 < summary['prefill']['break_even'] < 12_000
  assert 3_000 < summary['decode']['break_even'] < 6_000
  for phase in cost_curve.PHASES:
    measured = summary[phase]
    assert measured['ratio'] == measured['paper_ratio']
  assert len(cost_curve.lines(summary)) == 2


def test_read_refuses_outputs_that_were_not_finite(tmp_path):
  path = tmp_path / 'curve.jsonl'
  with pytest.raises(ValueError, match='found none'):
    cost_curve.read(path)
  path.write_text(json.dumps(record()) + '\n')
  assert cost_curve.read(path) == [record()]
  path.write_text(json.dumps(record(finite=False)) + '\n')
  with pytest.raises(ValueError, match='not finite'):
    cost_curve.read(path)


def test_draw_writes_a_plot_of_every_phase(tmp_path):
  path = tmp_path / 'curve.png'
  cost_curve.draw(cost_curve.PAPER, path, 'a device')
  from matplotlib import image

  pixels = image.imread(path)
  height, width = pixels.shape[:2]
  assert width > 2 * height
  assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 20
