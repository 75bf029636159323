import json
import os
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.checkpoints.manager import CheckpointManager
from dsv32_jax.config.training import MeshConfig
from dsv32_jax.sharding import mesh as mesh_lib
from dsv32_jax.training import compiled_step, loop, metrics

PartitionSpec = jax.sharding.PartitionSpec


class _Rows:
  """Rows whose contents tell their place."""

  def __init__(self, rows: int = 8):
    self._rows = rows
    self.place = 0
    self.on_next = lambda place: None

  def __next__(self):
    self.place += 1
    self.on_next(self.place)
    generator = np.random.default_rng(self.place)
    return {
      'tokens': generator.integers(0, 99, (self._rows, 4), dtype=np.int32),
      'scale': np.full((self._rows, 1), self.place, np.float32),
    }

  def get_state(self):
    return {'place': self.place}

  def set_state(self, state):
    self.place = state['place']


def _state():
  return {
    'step': jnp.int32(0),
    'w': jnp.linspace(-1, 1, 16).reshape(4, 4),
    'moment': jnp.zeros((4, 4)),
  }


def _step(state, batch, key):
  """Momentum on a quadratic that depends on batch, key and step."""
  # Not jax.random.fold_in, which compiles ten times as long as the rest.
  seed = jnp.sum(jax.random.key_data(key)) + state['step'].astype(jnp.uint32)
  noise = jnp.sin(jnp.arange(16.0).reshape(4, 4) * seed.astype(jnp.float32))
  x = batch['tokens'].astype(jnp.float32) / 99

  def loss_of(w):
    return jnp.mean((x @ w - 1) ** 2) + 0.01 * jnp.sum(noise * w)

  loss, gradient = jax.value_and_grad(loss_of)(state['w'])
  moment = 0.9 * state['moment'] + gradient
  return {
    'step': state['step'] + 1,
    'w': state['w'] - 0.1 * moment,
    'moment': moment,
  }, {'loss/lm': loss, 'grad_norm/main': jnp.linalg.norm(gradient)}


def _fit(directory, *, steps=10, data=None, step_fn=_step, **options):
  options = {
    'state': _state(),
    'checkpoint_every': 3,
    'make_batch': lambda arrays: arrays,
    'report': lambda line: None,
  } | options
  state = options.pop('state')
  with (
    CheckpointManager(directory / 'checkpoints') as checkpoints,
    metrics.MetricsWriter(directory, tensorboard=False, display=None) as writer,
  ):
    return loop.fit(
      step_fn,
      state,
      data or _Rows(),
      key=jax.random.key(1),
      steps=steps,
      directory=directory,
      checkpoints=checkpoints,
      metrics=writer,
      **options,
    )


def _same(actual, desired):
  for name in desired:
    assert actual[name].dtype == desired[name].dtype
    assert (
      np.asarray(actual[name]).tobytes() == np.asarray(desired[name]).tobytes()
    ), name


def _losses(directory):
  lines = metrics.read(directory)
  assert [line['step'] for line in lines] == list(range(1, len(lines) + 1))
  return [(line['loss/lm'], line['grad_norm/main']) for line in lines]


def _by_hand(steps):
  state, data, step = _state(), _Rows(), jax.jit(_step)
  found = []
  for _ in range(steps):
    state, values = step(state, next(data), jax.random.key(1))
    found.append((float(values['loss/lm']), float(values['grad_norm/main'])))
  return state, found


def test_fit_takes_the_steps_of_a_plain_loop(tmp_path):
  state = _fit(tmp_path)
  want, losses = _by_hand(10)
  assert int(state['step']) == 10
  np.testing.assert_allclose(state['w'], want['w'], rtol=1e-6)
  np.testing.assert_allclose(_losses(tmp_path), losses, rtol=1e-6)
  with CheckpointManager(tmp_path / 'checkpoints') as checkpoints:
    assert checkpoints.sealed_steps() == [9, 10]
    saved = checkpoints.restore_latest(state)
  _same(saved.state, state)
  assert saved.extra['data'] == {'place': 10}


def test_fit_traces_the_step_once(tmp_path):
  chex.clear_trace_counter()
  step = chex.assert_max_traces(n=1)(_step)
  _fit(
    tmp_path,
    step_fn=step,
    evaluate=lambda state, n: {'eval/w': jnp.sum(state['w'])},
    evaluate_every=2,
  )
  # A second batch shape is an error and not a second compilation.
  data = _Rows()
  data.on_next = lambda place: setattr(data, '_rows', 8 if place < 3 else 4)
  with pytest.raises(TypeError):
    _fit(tmp_path / 'other', data=data)


def test_fit_resumed_run_has_the_bits_of_one_that_went_through(tmp_path):
  through = _fit(tmp_path / 'through')
  seen = []

  def crash(place):
    seen.append(place)
    if place == 9 and seen.count(9) == 1:
      raise RuntimeError('power cut')

  data = _Rows()
  data.on_next = crash
  with pytest.raises(RuntimeError, match='power cut'):
    _fit(tmp_path / 'cut', data=data)
  again = _Rows()
  again.on_next = crash
  lines = []
  resumed = _fit(tmp_path / 'cut', data=again, report=lines.append)
  _same(resumed, through)
  # From the checkpoint of step 6: batch 7 is the first to be read again.
  assert seen[8:] == [9, 7, 8, 9, 10]
  assert 'resumed from step 6' in lines[0]
  assert _losses(tmp_path / 'cut') == _losses(tmp_path / 'through')
  # Once done there is nothing left to do.
  done = _Rows()
  _same(_fit(tmp_path / 'cut', data=done), through)
  assert done.place == 10


def test_fit_evaluates_in_the_line_of_the_step(tmp_path):
  seen = []

  def evaluate(state, step):
    seen.append((step, int(state['step'])))
    return {'eval/loss': float(jnp.sum(state['w']))}

  _fit(tmp_path, evaluate=evaluate, evaluate_every=4)
  assert seen == [(4, 4), (8, 8), (10, 10)]
  has = [line['step'] for line in metrics.read(tmp_path) if 'eval/loss' in line]
  assert has == [4, 8, 10]


def test_fit_no_silent_transfer_in_the_step(tmp_path):
  def transfers(arrays):
    return arrays | {'tokens': arrays['tokens'] + np.ones((8, 4), np.int32)}

  with pytest.raises(Exception, match='host-to-device'):
    _fit(tmp_path, make_batch=transfers)


def test_fit_on_a_mesh_cuts_the_batch_and_keeps_shardings(tmp_path):
  parallel = mesh_lib.make_parallel(MeshConfig(data=4, fsdp=2))
  split = jax.sharding.NamedSharding(
    parallel.mesh, PartitionSpec(('data', 'fsdp'))
  )
  state = _state() | {'big': jax.device_put(np.zeros((16, 2)), split)}
  cut = []

  def step(state, batch, key):
    big = state['big'] + 1
    jax.debug.inspect_array_sharding(batch['tokens'], callback=cut.append)
    new, values = _step(
      {name: state[name] for name in ('step', 'w', 'moment')}, batch, key
    )
    return new | {'big': big}, values

  out = _fit(tmp_path, state=state, step_fn=step, parallel=parallel)
  assert cut[0].shard_shape((8, 4)) == (1, 4)
  assert out['big'].sharding.is_equivalent_to(split, 2)
  assert out['w'].sharding.is_fully_replicated
  single = _fit(tmp_path / 'single')
  np.testing.assert_allclose(out['w'], single['w'], rtol=1e-5)
  with pytest.raises(ValueError, match=r'got 6 rows.*multiple of .* 8 devices'):
    _fit(tmp_path / 'odd', data=_Rows(6), parallel=parallel)


@pytest.mark.parametrize(
  ('bad_step', 'value'),
  [(2, np.nan), (3, np.inf), (10, np.nan)],
  ids=['between', 'save', 'end'],
)
def test_fit_non_finite_stops_and_leaves_what_reproduces_it(
  tmp_path, bad_step, value
):
  def step(state, batch, key):
    new, values = _step(state, batch, key)
    is_bad = batch['scale'][0, 0] == bad_step
    values['grad_norm/main'] = jnp.where(
      is_bad, value, values['grad_norm/main']
    )
    new['w'] = jnp.where(is_bad, value, new['w'])
    return new, values

  with pytest.raises(loop.NonFiniteError) as caught:
    _fit(tmp_path, step_fn=step, record={'stage': 'toy'}, checkpoint_every=3)
  assert caught.value.step == bad_step
  dump = tmp_path / f'nonfinite_step_{bad_step}'
  assert caught.value.dump == dump
  assert f'step {bad_step}: grad_norm/main is {value}' in str(caught.value)
  # The step that failed can be taken again from the dump alone.
  with CheckpointManager(dump / 'checkpoints') as checkpoints:
    before = checkpoints.restore_latest(_state())
  _same(before.state, _by_hand_bits(step, bad_step - 1))
  rows = dict(np.load(dump / 'batch.npz'))
  _, values = jax.jit(step)(before.state, rows, jax.random.key(1))
  np.testing.assert_equal(float(values['grad_norm/main']), value)
  assert json.loads((dump / 'config.json').read_text()) == {'stage': 'toy'}
  assert 'loss/lm' in json.loads((dump / 'metrics.json').read_text())
  # It was written down, and never became a checkpoint.
  assert metrics.read(tmp_path)[-1]['step'] == bad_step
  with CheckpointManager(tmp_path / 'checkpoints') as checkpoints:
    assert all(step < bad_step for step in checkpoints.sealed_steps())
  with pytest.raises(loop.NonFiniteError):
    _fit(tmp_path, step_fn=step, record={'stage': 'toy'}, checkpoint_every=3)


def _by_hand_bits(step, steps):
  carry = (_state(), jnp.asarray(True))
  data = _Rows()
  compiled = None
  for _ in range(steps):
    batch = jax.device_put(next(data))
    if compiled is None:
      compiled = compiled_step.compile_step(
        step, carry, batch, jax.random.key(1)
      )
    carry, _ = compiled(carry, batch, jax.random.key(1))
  return carry[0]


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_fit_signal_saves_and_says_how_to_resume(tmp_path, number):
  through = _fit(tmp_path / 'through')
  before = signal.getsignal(number)
  data = _Rows()
  data.on_next = lambda place: place == 5 and os.kill(os.getpid(), number)
  lines = []
  with pytest.raises(loop.Interrupted) as caught:
    _fit(tmp_path / 'cut', data=data, report=lines.append)
  assert caught.value.code == 128 + number
  assert caught.value.step == 5
  assert f'{number.name}: stopped after step 5 of 10' in lines[-1]
  assert 'same command continues' in lines[-1]
  assert signal.getsignal(number) == before
  assert len(_losses(tmp_path / 'cut')) == 5
  resumed = _fit(tmp_path / 'cut', report=lines.append)
  assert 'resumed from step 5' in lines[-1]
  _same(resumed, through)
  assert _losses(tmp_path / 'cut') == _losses(tmp_path / 'through')


def test_fit_data_that_ends_is_refused(tmp_path):
  def end(place):
    if place == 4:
      raise StopIteration

  data = _Rows()
  data.on_next = end
  with pytest.raises(ValueError, match='data: ended before step 4'):
    _fit(tmp_path, data=data)


def test_fit_times_steps_and_reports_tokens(tmp_path):
  _fit(tmp_path, steps=4)
  lines = metrics.read(tmp_path)
  assert [('time/compile_s' in line) for line in lines] == [True] + 3 * [False]
  for line in lines:
    assert line['time/tokens_per_s'] == pytest.approx(
      32 / line['time/step_s'], rel=1e-6
    )
