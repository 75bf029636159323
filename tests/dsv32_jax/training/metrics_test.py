import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.training import metrics, progress


def _writer(directory, **options):
  options = {'tensorboard': False, 'display': None} | options
  return metrics.MetricsWriter(directory, **options)


def test_metrics_write_is_one_flushed_json_line_a_step(tmp_path):
  with _writer(tmp_path) as writer:
    writer.start(step=0, total_steps=2)
    writer.write(
      1,
      {
        'loss/lm': np.float32(0.5),
        'indexer/kl': jnp.array([0.25, 0.125]),
        'count': np.int32(3),
      },
    )
    # Read while the writer is open: a killed process loses no line.
    lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
      {'step': 1, 'loss/lm': 0.5, 'indexer/kl': [0.25, 0.125], 'count': 3}
    ]
    writer.write(2, {'loss/lm': 0.25})
  assert [line['step'] for line in metrics.read(tmp_path)] == [1, 2]


def test_metrics_values_that_json_lacks_stay_readable(tmp_path):
  with _writer(tmp_path) as writer:
    writer.start(step=0, total_steps=1)
    writer.write(1, {'a': jnp.nan, 'b': [1.0, -np.inf]})

  def refuse(name):
    pytest.fail(f'{name} is not JSON')

  text = (tmp_path / 'metrics.jsonl').read_text()
  line = json.loads(text, parse_constant=refuse)
  assert line == {'step': 1, 'a': 'NaN', 'b': [1.0, '-Infinity']}
  assert np.isnan(float(line['a']))


def test_metrics_resume_drops_later_lines_and_mends_a_torn_one(tmp_path):
  with _writer(tmp_path) as writer:
    writer.start(step=0, total_steps=5)
    for step in (1, 2, 3, 4):
      writer.write(step, {'loss/lm': 1 / step})
  path = tmp_path / 'metrics.jsonl'
  whole = path.read_bytes()
  path.write_bytes(whole + b'{"step": 5, "loss/lm": 0.')
  assert [line['step'] for line in metrics.read(tmp_path)] == [1, 2, 3, 4]
  with _writer(tmp_path) as writer:
    writer.start(step=2, total_steps=5)
    writer.write(3, {'loss/lm': 7.0})
  lines = metrics.read(tmp_path)
  assert [line['step'] for line in lines] == [1, 2, 3]
  assert lines[2]['loss/lm'] == 7.0
  assert path.read_bytes().startswith(b''.join(whole.splitlines(True)[:2]))
  # A line whose step is known but whose end is missing was not finished.
  path.write_bytes(whole[:-1])
  with _writer(tmp_path) as writer:
    writer.start(step=4, total_steps=5)
    writer.write(5, {})
  assert [line['step'] for line in metrics.read(tmp_path)] == [1, 2, 3, 5]


def test_metrics_start_at_zero_empties_the_file(tmp_path):
  for _ in range(2):
    with _writer(tmp_path) as writer:
      writer.start(step=0, total_steps=1)
      writer.write(1, {'loss/lm': 1.0})
  assert [line['step'] for line in metrics.read(tmp_path)] == [1]


def test_metrics_tensorboard_gets_scalars_and_layers(tmp_path):
  pytest.importorskip('tensorboardX')
  with _writer(tmp_path, tensorboard=True) as writer:
    writer.start(step=0, total_steps=1)
    writer.write(1, {'loss/lm': 0.5, 'indexer/kl': [0.25, 0.125]})
  (file,) = (tmp_path / 'tensorboard').iterdir()
  events = file.read_bytes()
  for tag in (b'loss/lm', b'indexer/kl/0', b'indexer/kl/1'):
    assert tag in events


def test_metrics_tensorboard_missing_is_silent_unless_insisted_on(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(metrics.importlib.util, 'find_spec', lambda name: None)
  with _writer(tmp_path, tensorboard=None) as writer:
    writer.start(step=0, total_steps=1)
    writer.write(1, {'loss/lm': 0.5})
  assert not (tmp_path / 'tensorboard').exists()
  with pytest.raises(ValueError, match='tensorboard: got True'):
    _writer(tmp_path, tensorboard=True)


def test_summarise_names_layers_and_measures_sparsity():
  # Two documents of 3 and 2 tokens and padding, then one of 6: 6 + 3 + 21.
  segment_ids_BT = np.array([[1, 1, 1, 2, 2, 0], [4, 4, 4, 4, 4, 4]])
  assert metrics.causal_pairs(segment_ids_BT) == 30
  values = {
    'loss/lm': np.float32(2),
    'indexer_kl_L': np.array([0.5, 0.25]),
    'num_pairs_L': np.array([30, 15]),
    'expert_load_LE': np.array([[2.0, 2.0], [4.0, 0.0]]),
  }
  summary = metrics.summarise(values, {'segment_ids': segment_ids_BT})
  assert sorted(summary) == [
    'indexer/kl',
    'loss/lm',
    'moe/load_max',
    'moe/load_min',
    'sparsity/realised',
  ]
  np.testing.assert_array_equal(summary['sparsity/realised'], [0, 0.5])
  np.testing.assert_array_equal(summary['moe/load_max'], [1, 2])
  np.testing.assert_array_equal(summary['moe/load_min'], [1, 0])
  assert 'indexer_kl_L' in values


def test_parameter_overview_counts_by_group():
  params = {
    'embedding': jax.ShapeDtypeStruct((8, 4), jnp.float32),
    'layers': {
      'mla': {
        'w_o': jnp.zeros((2, 3), jnp.bfloat16),
        'norm': {'scale': jnp.zeros(2, jnp.bfloat16)},
      },
      'moe': {'w': jnp.zeros((5, 2))},
    },
  }
  rows = [
    line.split() for line in metrics.parameter_overview(params).splitlines()
  ]
  assert rows == [
    ['group', 'arrays', 'parameters', 'share', 'MB'],
    ['embedding', '1', '32', '64.0%', '0.0'],
    ['layers/mla', '2', '8', '16.0%', '0.0'],
    ['layers/moe', '1', '10', '20.0%', '0.0'],
    ['total', '4', '50', '100.0%', '0.0'],
  ]


def test_progress_lines_come_every_few_seconds_and_at_the_end():
  now = [0.0]
  stream = io.StringIO()
  lines = progress.Lines(
    title='warmup',
    step=0,
    total_steps=10,
    stream=stream,
    every_s=5.0,
    clock=lambda: now[0],
  )
  for step in range(1, 11):
    lines.update(
      step,
      {
        'loss/lm': 2.0,
        'loss/indexer_kl': 0.5,
        'time/step_s': 2.0,
        'time/tokens_per_s': 1234.5,
      },
    )
    now[0] += 2
  printed = stream.getvalue().splitlines()
  assert [line.split()[1] for line in printed] == [
    '1/10',
    '4/10',
    '7/10',
    '10/10',
  ]
  assert printed[0] == (
    'warmup 1/10 loss 2.0000  KL 0.5000  1,234 tokens/s  ETA 0:00:18'
  )
  assert printed[-1].endswith('ETA 0:00:00')


class _Terminal(io.StringIO):
  def isatty(self):
    return True


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch):
  monkeypatch.setenv('TERM', 'xterm')
  stream = _Terminal()
  bar = progress.open_display(
    title='sparse', step=3, total_steps=10, stream=stream
  )
  bar.update(5, {'loss/lm': 1.25, 'time/step_s': 60.0})
  bar.close()
  assert isinstance(bar, progress.Bar)
  text = stream.getvalue()
  for part in ('sparse', '5/10', 'loss 1.2500', 'ETA 0:05:00'):
    assert part in text
  assert isinstance(
    progress.open_display(
      title='', step=0, total_steps=1, stream=io.StringIO()
    ),
    progress.Lines,
  )
