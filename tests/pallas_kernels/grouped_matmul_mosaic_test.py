"""The Hopper kernels of grouped_matmul: interpreted, lowered, and on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic
from pallas_kernels.grouped_matmul import (
  api,
  config,
  mosaic_rows,
  pallas_mosaic_gpu,
  reference,
  row_tiles,
)
from tests.support import tolerances

needs_mosaic = pytest.mark.skipif(
  not mosaic.has_api(), reason='needs the Mosaic GPU API of jax 0.11'
)


def _arrays(key, num_rows, dim, width, num_experts):
  keys = jax.random.split(key, 3)
  shapes = (num_rows, dim), (num_experts, dim, width), (num_rows, width)
  return tuple(
    jax.random.normal(k, shape, jnp.bfloat16)
    for k, shape in zip(keys, shapes, strict=True)
  )


def _value_and_gradients(function, x, w, dy, group_sizes):
  y, pullback = jax.vjp(lambda x, w: function(x, w, group_sizes), x, w)
  return y, *pullback(dy)


def _definition(x, w, dy, group_sizes):
  """Values and gradients of the definition, garbage rows made zero."""
  is_used = (jnp.arange(x.shape[0]) < jnp.sum(group_sizes))[:, None]
  return _value_and_gradients(
    reference.grouped_matmul,
    jnp.where(is_used, x, 0),
    w,
    jnp.where(is_used, dy, 0),
    group_sizes,
  )


def _with_garbage(x, dy, group_sizes):
  is_used = (jnp.arange(x.shape[0]) < jnp.sum(group_sizes))[:, None]
  return jnp.where(is_used, x, jnp.nan), jnp.where(is_used, dy, jnp.nan)


@pytest.mark.parametrize(
  'sizes', [(70, 0, 35, 37), (0, 0, 0, 0), (0, 152, 0, 0), (1, 2, 3, 140)]
)
@pytest.mark.parametrize('num_rows', [152, 160])
def test_row_tiles_cover_every_row_once(sizes, num_rows):
  height, num_columns = 32, 3
  tiles = row_tiles.row_tiles(
    jnp.array(sizes, jnp.int32),
    num_rows,
    height=height,
    num_columns=num_columns,
    band=2,
  )
  group_of_cell = np.full((num_rows, num_columns), -1)
  for n in range(int(tiles.count_1[0])):
    first = int(tiles.first_N[n])
    assert first % row_tiles.ALIGNMENT == 0
    rows = slice(first + int(tiles.low_N[n]), first + int(tiles.high_N[n]))
    cells = rows, int(tiles.column_N[n])
    assert rows.stop > rows.start
    assert (group_of_cell[cells] == -1).all()
    group_of_cell[cells] = tiles.expert_N[n]
  rest = num_rows - sum(sizes)
  expected = np.repeat(np.arange(len(sizes) + 1), [*sizes, rest])
  for column in group_of_cell.T:
    np.testing.assert_array_equal(column, expected)


@needs_mosaic
@pytest.mark.parametrize(
  ('sizes', 'target'),
  [
    pytest.param(
      *((70, 0, 35, 37), mosaic.Target.INTERPRET_RACES), marks=pytest.mark.slow
    ),
    pytest.param(
      *((0, 150, 0, 0), mosaic.Target.INTERPRET), marks=pytest.mark.slow
    ),
  ],
)
def test_grouped_matmul_interpreted_matches_definition(key, sizes, target):
  group_sizes = jnp.array(sizes, jnp.int32)
  x, w, dy = _arrays(key, 150, 128, 128, len(sizes))
  function = functools.partial(pallas_mosaic_gpu.grouped_matmul_for, target)
  dirty_x, dirty_dy = _with_garbage(x, dy, group_sizes)
  actual = _value_and_gradients(function, dirty_x, w, dirty_dy, group_sizes)
  desired = _definition(x, w, dy, group_sizes)
  tolerances.assert_close(actual, desired, dtype=jnp.bfloat16)
  total = int(group_sizes.sum())
  for rows in actual[:2]:
    np.testing.assert_array_equal(rows[total:], 0)


@needs_mosaic
def test_grouped_matmul_persistent_blocks_match_definition(key):
  group_sizes = jnp.array((50, 3, 70), jnp.int32)
  x, w, _ = _arrays(key, 136, 128, 128, 3)
  y = mosaic_rows.product(
    x,
    w,
    group_sizes,
    transpose_w=False,
    block=config.MosaicConfig(block_columns=64, is_persistent=True, band=1),
    target=mosaic.Target.INTERPRET,
  )
  desired = reference.grouped_matmul(x, w, group_sizes)
  tolerances.assert_close(y, desired, dtype=jnp.bfloat16)


@needs_mosaic
@pytest.mark.parametrize(
  ('num_rows', 'dim', 'width', 'num_experts'),
  [(32768, 7168, 2048, 64), (4096, 2048, 7168, 256), (70, 384, 256, 8)],
)
def test_grouped_matmul_lowers_for_cuda(num_rows, dim, width, num_experts):
  arguments = jax.eval_shape(
    lambda: _arrays(jax.random.key(0), num_rows, dim, width, num_experts)
  )
  function = functools.partial(
    pallas_mosaic_gpu.grouped_matmul_for, mosaic.Target.LOWER
  )
  trace = jax.jit(functools.partial(_value_and_gradients, function)).trace(
    *arguments, jax.ShapeDtypeStruct((num_experts,), jnp.int32)
  )
  text = trace.lower(lowering_platforms=('cuda',)).as_text()
  assert text.count('mosaic_gpu') >= 3


@pytest.mark.parametrize(
  ('dtype', 'dim', 'message'),
  [('float32', 128, 'takes bfloat16'), ('bfloat16', 96, 'multiples of 128')],
)
def test_grouped_matmul_unsupported_arguments_say_what_is(dtype, dim, message):
  x, w = jnp.zeros((8, dim), dtype), jnp.zeros((2, dim, 128), dtype)
  with pytest.raises(NotImplementedError, match=message):
    pallas_mosaic_gpu.grouped_matmul_for(
      mosaic.Target.LOWER, x, w, jnp.zeros(2, jnp.int32)
    )


def _split(how, num_rows, num_experts):
  rng = np.random.default_rng(num_rows)
  sizes = np.zeros(num_experts, np.int32)
  if how == 'ragged':
    share = rng.dirichlet(np.ones(num_experts))
    share[num_experts // 2] = 0
    sizes[:] = rng.multinomial(num_rows * 2 // 3, share / share.sum())
  elif how == 'even':
    sizes[:] = num_rows // num_experts
  elif how == 'last':
    sizes[-1] = num_rows
  return jnp.asarray(sizes)


def _relative(actual, desired):
  actual, desired = (jnp.float32(a).ravel() for a in (actual, desired))
  return jnp.linalg.norm(actual - desired) / jnp.maximum(
    jnp.linalg.norm(desired), 1e-30
  )


@pytest.mark.gpu
@pytest.mark.parametrize(
  'shape', [(3000, 512, 384, 16), (70, 128, 256, 5), (1024, 7168, 2048, 4)]
)
def test_grouped_matmul_on_gpu_matches_definition(key, shape):
  function = functools.partial(api.grouped_matmul, implementation='mosaic_gpu')
  run = jax.jit(functools.partial(_value_and_gradients, function))
  definition = jax.jit(_definition)
  x, w, dy = _arrays(key, *shape)
  for how, factor in (
    ('ragged', 1),
    ('even', 1),
    ('last', 1),
    ('none', 1),
    ('ragged', 2.0**40),
    ('ragged', 0),
  ):
    group_sizes = _split(how, shape[0], shape[3])
    # What the outputs' memory held before must not show.
    jax.block_until_ready(jnp.full((2**25,), jnp.nan, jnp.bfloat16))
    dirty_x, dirty_dy = _with_garbage(factor * x, dy, group_sizes)
    actual = run(dirty_x, w, dirty_dy, group_sizes)
    desired = definition(factor * x, w, dy, group_sizes)
    for a, d, limit in zip(actual, desired, (4e-3, 1e-2, 1e-2), strict=True):
      assert _relative(a, d) < limit, how
    again = run(dirty_x, w, dirty_dy, group_sizes)
    jax.tree.map(np.testing.assert_array_equal, actual, again)
