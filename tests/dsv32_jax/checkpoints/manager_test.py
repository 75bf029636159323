import os
import pathlib
import resource
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsv32_jax.checkpoints import integrity, manager, reading

PartitionSpec = jax.sharding.PartitionSpec


def _state(fill: float = 0.0) -> dict:
  """Everything that a TrainState may hold, and a few values that round."""
  params = {
    'main': {
      'w': jnp.arange(12.0).reshape(3, 4) / 7 + fill,
      'none': jnp.zeros((0, 4)),
      'odd': jnp.array([-0.0, jnp.nan, jnp.inf, 1e-45]),
    },
    'indexer': {'b': jnp.full((5,), 1 / 3, jnp.bfloat16)},
  }
  tx = optax.partition(
    {
      'main': optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.constant_schedule(1e-3)),
      ),
      'frozen': optax.set_to_zero(),
    },
    {
      'main': {'w': 'main', 'none': 'main', 'odd': 'main'},
      'indexer': {'b': 'frozen'},
    },
  )
  return {
    'step': jnp.int32(7),
    'params': params,
    'router_bias': {'moe_layers': {'bias': jnp.ones((2, 3)) * fill}},
    'opt_state': tx.init(params),
    'host': np.arange(3, dtype=np.int64) << 40,
  }


def _assert_same_bits(actual, desired):
  assert jax.tree.structure(actual) == jax.tree.structure(desired)
  for (path, a), d in zip(
    jax.tree_util.tree_leaves_with_path(actual),
    jax.tree.leaves(desired),
    strict=True,
  ):
    name = jax.tree_util.keystr(path)
    assert isinstance(a, np.ndarray) == isinstance(d, np.ndarray), name
    assert (a.dtype, a.shape) == (d.dtype, d.shape), name
    assert np.asarray(a).tobytes() == np.asarray(d).tobytes(), name


def _saved(directory, steps, lines=None, **options):
  """Saves a state a step, with w shifted by the step."""
  report = (lines if lines is not None else []).append
  with manager.CheckpointManager(
    directory, report=report, **options
  ) as checkpoints:
    for step in steps:
      checkpoints.save(step, _state(step), {'at': step})


def _largest_file(path: pathlib.Path) -> pathlib.Path:
  return max(
    (p for p in path.rglob('*') if p.is_file() and p.name != 'manifest.json'),
    key=lambda p: p.stat().st_size,
  )


def _restore(directory, template=None):
  lines: list[str] = []
  with manager.CheckpointManager(directory, report=lines.append) as checkpoints:
    return checkpoints.restore_latest(template or _state()), lines


def test_manager_round_trip_is_bit_exact(tmp_path):
  extra = {
    'data': {'grain': b'\x00\xff', 'next': [3, (4, None)]},
    'stage': 'dense_warmup',
  }
  with manager.CheckpointManager(tmp_path / 'new' / 'folder') as checkpoints:
    assert checkpoints.restore_latest(_state()) is None
    checkpoints.save(7, _state(1.5), extra)
    checkpoints.wait()
    step, state, restored_extra = checkpoints.restore_latest(_state())
  assert step == 7
  _assert_same_bits(state, _state(1.5))
  assert restored_extra == {
    'data': {'grain': b'\x00\xff', 'next': [3, [4, None]]},
    'stage': 'dense_warmup',
  }


def test_manager_restore_places_leaves_as_the_template_does(
  tmp_path, data_mesh
):
  values = np.arange(64, dtype=np.float32).reshape(16, 4)
  whole = jax.sharding.NamedSharding(data_mesh, PartitionSpec())
  split = jax.sharding.NamedSharding(data_mesh, PartitionSpec('data'))
  with manager.CheckpointManager(tmp_path) as checkpoints:
    checkpoints.save(
      1, {'a': jax.device_put(values, split), 'b': jnp.asarray(values)}, {}
    )
    checkpoints.wait()
    template = {
      'a': jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=whole),
      'b': jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=split),
    }
    state = checkpoints.restore_latest(template).state
  for name, sharding in (('a', whole), ('b', split)):
    assert state[name].sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(state[name], values)


def test_manager_save_is_not_changed_by_what_follows(tmp_path):
  shift = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = shift(jnp.zeros((500, 500)))
  host = np.ones((500, 500))
  with manager.CheckpointManager(tmp_path) as checkpoints:
    checkpoints.save(1, {'x': x, 'host': host}, {})
    for _ in range(5):
      x = shift(x)
    host[:] = 9
    checkpoints.wait()
    state = checkpoints.restore_latest({'x': x, 'host': host}).state
  assert np.all(np.asarray(state['x']) == 1)
  assert np.all(state['host'] == 1)


def test_manager_keeps_the_newest_and_at_least_two(tmp_path):
  _saved(tmp_path / 'a', [1, 2, 3, 4], keep=3)
  _saved(tmp_path / 'b', [1, 2, 3], keep=1)
  assert sorted(p.name for p in (tmp_path / 'a').iterdir()) == [
    'step_00000002',
    'step_00000003',
    'step_00000004',
  ]
  assert sorted(p.name for p in (tmp_path / 'b').iterdir()) == [
    'step_00000002',
    'step_00000003',
  ]


def _truncate(path):
  file = _largest_file(path)
  os.truncate(file, file.stat().st_size - 1)


def _flip_bit(path):
  file = _largest_file(path)
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)


def _remove_file(path):
  _largest_file(path).unlink()


def _spoil_manifest(path):
  os.truncate(path / integrity.MANIFEST, 10)


def _unseal(path):
  (path / integrity.MANIFEST).unlink()


DAMAGES = {
  _truncate: 'bytes, expected',
  _flip_bit: 'SHA-256 differs',
  _remove_file: 'cannot be read',
  _spoil_manifest: 'manifest.json is not readable',
  _unseal: 'unfinished',
}


@pytest.mark.parametrize('damage', DAMAGES, ids=lambda f: f.__name__)
def test_manager_damaged_newest_falls_back_and_says_so(tmp_path, damage):
  _saved(tmp_path, [10, 20])
  damage(tmp_path / 'step_00000020')
  restored, lines = _restore(tmp_path)
  assert restored.step == 10
  _assert_same_bits(restored.state, _state(10))
  assert len(lines) == 1
  assert '\n' not in lines[0]
  for part in (
    str(tmp_path / 'step_00000020'),
    DAMAGES[damage],
    'step_00000010 is used instead',
  ):
    assert part in lines[0]


def test_integrity_any_flipped_bit_or_lost_byte_is_found(tmp_path):
  _saved(tmp_path, [10])
  path = tmp_path / 'step_00000010'
  assert integrity.damage(path) is None
  files = [p for p in path.rglob('*') if p.is_file()]
  assert len(files) > 5
  for file in files:
    content = file.read_bytes()
    if file.name == integrity.MANIFEST or not content:
      continue
    for place in (0, len(content) // 2, len(content) - 1):
      flipped = bytearray(content)
      flipped[place] ^= 0x10
      file.write_bytes(flipped)
      assert file.relative_to(path).as_posix() in integrity.damage(path)
    file.write_bytes(content[:-1])
    assert file.relative_to(path).as_posix() in integrity.damage(path)
    file.write_bytes(content)
  assert integrity.damage(path) is None


def test_manager_all_damaged_is_an_error_and_no_fresh_start(tmp_path):
  _saved(tmp_path, [10, 20])
  _flip_bit(tmp_path / 'step_00000010')
  _truncate(tmp_path / 'step_00000020')
  with (
    manager.CheckpointManager(tmp_path) as checkpoints,
    pytest.raises(reading.CheckpointError) as caught,
  ):
    checkpoints.restore_latest(_state())
  assert 'step_00000020 damaged' in str(caught.value)
  assert 'step_00000010 damaged' in str(caught.value)
  assert '\n' not in str(caught.value)


def test_manager_first_save_cut_short_starts_at_zero_and_says_so(tmp_path):
  _saved(tmp_path, [10])
  _unseal(tmp_path / 'step_00000010')
  restored, lines = _restore(tmp_path)
  assert restored is None
  assert 'unfinished' in lines[0]
  assert 'starts at step 0' in lines[0]


def test_manager_leftovers_are_replaced_and_sound_ones_never_lost(tmp_path):
  _saved(tmp_path, [10, 20])
  _flip_bit(tmp_path / 'step_00000020')
  (tmp_path / 'step_00000030.orbax-checkpoint-tmp-0').mkdir()
  with manager.CheckpointManager(
    tmp_path, report=lambda line: None
  ) as checkpoints:
    assert checkpoints.restore_latest(_state()).step == 10
    checkpoints.save(15, _state(15), {})
    checkpoints.wait()
    # The damaged one counts for nothing, so 10 stays.
    assert (tmp_path / 'step_00000010').exists()
    checkpoints.save(20, _state(20.5), {})
    checkpoints.wait()
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    'step_00000015',
    'step_00000020',
  ]
  restored, lines = _restore(tmp_path)
  assert lines == []
  _assert_same_bits(restored.state, _state(20.5))


def test_manager_save_of_a_saved_step_is_refused(tmp_path):
  _saved(tmp_path, [10])
  with (
    manager.CheckpointManager(tmp_path) as checkpoints,
    pytest.raises(reading.CheckpointError, match='step_00000010: exists'),
  ):
    checkpoints.save(10, _state(11), {})
  restored, _ = _restore(tmp_path)
  _assert_same_bits(restored.state, _state(10))


def _wider(state):
  state['params']['main']['w'] = jnp.zeros((3, 6))


def _other_dtype(state):
  state['params']['indexer']['b'] = jnp.zeros((5,), jnp.float32)


def _one_more(state):
  state['params']['main']['more'] = jnp.zeros((2,))


def _one_less(state):
  del state['router_bias']['moe_layers']


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (_wider, r'params/main/w is \[3, 4\] float32, expected \[3, 6\] float32'),
    (
      _other_dtype,
      r'params/indexer/b is \[5\] bfloat16, expected \[5\] float32',
    ),
    (_one_more, r'params/main/more is missing, expected \[2\] float32'),
    (
      _one_less,
      r'router_bias/moe_layers/bias \[2, 3\] float32 is not part of',
    ),
  ],
  ids=lambda value: getattr(value, '__name__', ''),
)
def test_manager_other_shape_is_refused_before_reading(
  tmp_path, monkeypatch, change, message
):
  _saved(tmp_path, [10])
  template = _state()
  change(template)

  def fail(*_, **__):
    pytest.fail('arrays were read')

  monkeypatch.setattr(reading.ocp.AsyncCheckpointer, 'restore', fail)
  with manager.CheckpointManager(tmp_path) as checkpoints:
    with pytest.raises(ValueError, match=message) as caught:
      checkpoints.restore_latest(template)
  assert '\n' not in str(caught.value)


def test_load_params_reads_only_what_is_asked_for(tmp_path):
  _saved(tmp_path / 'stage' / 'checkpoints', [10, 20])
  template = {key: _state()[key] for key in ('params', 'router_bias')}
  want = {key: _state(20)[key] for key in template}
  for path in (
    tmp_path / 'stage',
    tmp_path / 'stage' / 'checkpoints',
    tmp_path / 'stage' / 'checkpoints' / 'step_00000020',
  ):
    restored = reading.load_params(path, template)
    assert (restored.step, restored.kept) == (20, ())
    _assert_same_bits(restored.state, want)
  older = tmp_path / 'stage' / 'checkpoints' / 'step_00000010'
  assert reading.read_extra(older) == (10, {'at': 10})
  _flip_bit(older)
  with pytest.raises(reading.CheckpointError, match='SHA-256'):
    reading.load_params(older, template)
  with pytest.raises(reading.CheckpointError, match='no finished checkpoint'):
    reading.load_params(tmp_path / 'nothing', template)


def test_load_params_partial_trees_keep_what_the_checkpoint_lacks(tmp_path):
  with manager.CheckpointManager(tmp_path) as checkpoints:
    checkpoints.save(
      3,
      {'params': {'w': jnp.ones(2)}, 'opt_state': {'main': jnp.ones(2)}},
      {},
    )
  template = {
    'params': {'w': jnp.zeros(2)},
    'opt_state': {'main': jnp.zeros(2), 'indexer': jnp.full(3, 5.0)},
  }
  with pytest.raises(ValueError, match='opt_state/indexer is missing'):
    reading.load_params(tmp_path, template)
  restored = reading.load_params(tmp_path, template, partial=('opt_state',))
  assert restored.kept == ('opt_state/indexer',)
  _assert_same_bits(
    restored.state,
    {
      'params': {'w': jnp.ones(2)},
      'opt_state': {'main': jnp.ones(2), 'indexer': jnp.full(3, 5.0)},
    },
  )


def test_manager_too_little_space_is_refused_with_numbers(
  tmp_path, monkeypatch
):
  state = {'w': jax.ShapeDtypeStruct((1000, 1000), jnp.float32)}
  free = {'MB': 15}

  def disk_usage(path):
    assert os.path.exists(path)
    return shutil._ntuple_diskusage(10**9, 0, free['MB'] * 10**6)

  monkeypatch.setattr(shutil, 'disk_usage', disk_usage)
  checkpoints = manager.CheckpointManager(tmp_path / 'not' / 'there')
  with pytest.raises(reading.CheckpointError) as caught:
    checkpoints.check_space(state)
  # 4 MB of weights, 1 MiB of file overhead, three at a time.
  assert '15.0 MB free, expected at least 15.1 MB for 3 checkpoints' in str(
    caught.value
  )
  free['MB'] = 16
  checkpoints.check_space(state)
  checkpoints.close()
  # With two on disk already, only the third needs room.
  _saved(tmp_path / 'old', [1, 2])
  free['MB'] = 6
  with manager.CheckpointManager(tmp_path / 'old') as checkpoints:
    checkpoints.check_space(state)


def _noise(megabytes: int) -> dict:
  bits = np.random.default_rng(0).integers(0, 256, megabytes << 20, np.uint8)
  return {'w': jnp.asarray(bits)}


def _poll_until_it_raises(checkpoints):
  while True:
    checkpoints.poll()


def _assert_failed_save_loses_nothing(checkpoints, error):
  message = str(error)
  assert '\n' not in message
  assert 'step_00000002: could not be saved' in message
  assert 'step 1 is intact' in message
  assert checkpoints.sealed_steps() == [1]
  assert sorted(p.name for p in checkpoints.directory.iterdir()) == [
    'step_00000001'
  ]


def test_manager_failed_write_is_one_error_and_loses_nothing(tmp_path, caplog):
  small, large = {'w': jnp.zeros(8, jnp.uint8)}, _noise(2)
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  with manager.CheckpointManager(tmp_path) as checkpoints:
    checkpoints.save(1, small, {})
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, before[1]))
    try:
      checkpoints.save(2, large, {})
      with pytest.raises(reading.CheckpointError) as caught:
        _poll_until_it_raises(checkpoints)
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, before)
    _assert_failed_save_loses_nothing(checkpoints, caught.value)
    assert not [r for r in caplog.records if r.exc_info]
    # The manager is still of use once there is room.
    checkpoints.save(3, large, {})
    checkpoints.wait()
    _assert_same_bits(checkpoints.restore_latest(large).state, large)


def test_manager_full_disk_is_one_error_and_loses_nothing(tmp_path):
  if os.geteuid() != 0:
    pytest.skip('needs root to mount a small disk')
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', str(tmp_path)]
  if subprocess.run(mount, capture_output=True, check=False).returncode:
    pytest.skip('needs the right to mount a small disk')
  try:
    with manager.CheckpointManager(tmp_path / 'run') as checkpoints:
      checkpoints.save(1, {'w': jnp.zeros(8, jnp.uint8)}, {})
      checkpoints.save(2, _noise(2), {})
      with pytest.raises(reading.CheckpointError) as caught:
        checkpoints.wait()
      _assert_failed_save_loses_nothing(checkpoints, caught.value)
      assert 'No space left' in str(caught.value)
  finally:
    subprocess.run(['umount', str(tmp_path)], check=True)


def test_manager_leaf_that_is_no_array_is_refused_by_name(tmp_path):
  with (
    manager.CheckpointManager(tmp_path) as checkpoints,
    pytest.raises(ValueError, match='a/b: got str, expected a numeric array'),
  ):
    checkpoints.save(1, {'a': {'b': 'text'}}, {})
