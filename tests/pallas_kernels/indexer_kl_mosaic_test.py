"""The Hopper kernels of the indexer's loss: interpreted, lowered, on a GPU."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels import mosaic, testing
from pallas_kernels.indexer_kl import (
  api,
  arg_specs,
  config,
  mosaic_gradients,
  mosaic_scores,
  mosaic_target,
  reference,
)
from pallas_kernels.indexer_kl import pallas_mosaic_gpu as mosaic_gpu

needs_api = pytest.mark.skipif(
  not mosaic.has_api(), reason='Mosaic GPU kernels need jax 0.11'
)

# bfloat16 operands, float32 sums.
_VALUE_ERROR = 4e-3
_GRADIENT_ERROR = 1e-2

_TINY = arg_specs.ArgSpec(
  batch=1,
  num_queries=5,
  num_keys=70,
  index_heads=4,
  index_dim=16,
  num_heads=4,
  num_key_heads=1,
  width=24,
  topk=9,
  dtype='bfloat16',
)
_V32 = arg_specs.ArgSpec(
  batch=1,
  num_queries=512,
  num_keys=8192,
  index_heads=64,
  index_dim=128,
  num_heads=128,
  num_key_heads=1,
  width=576,
  topk=2048,
  dtype='bfloat16',
)


def _case(seed, spec, form, *, logits=1.0):
  """Arrays, the choice of keys as keywords, and the mask of valid pairs."""
  rng = np.random.default_rng(zlib.crc32(seed.encode()))
  batch, queries, keys = spec.batch, spec.num_queries, spec.num_keys
  ends = np.arange(queries) + 1 + keys - queries

  def draw(*shape, size=1.0):
    return jnp.asarray(size * rng.normal(size=shape), spec.dtype)

  column = np.arange(keys)
  if form == 'ranges':
    end = np.broadcast_to(ends, (batch, queries)).astype(np.int32)
    start = (rng.integers(0, keys, end.shape) % end).astype(np.int32)
    start = np.where(rng.random(end.shape) < 0.2, end, start).astype(np.int32)
    start[:, : queries // 2] //= 4
    valid = (column >= start[..., None]) & (column < end[..., None])
    chosen = {'key_start_BT': start, 'key_end_BT': end}
  else:
    indices = np.full((batch, queries, spec.topk), -1, np.int32)
    valid = np.zeros((batch, queries, keys), bool)
    for b, t in np.ndindex(batch, queries):
      # Rows shorter than k, and one in thirteen without keys.
      count = 0 if t % 13 == 3 else min(ends[t], spec.topk - t % 3)
      row = rng.permutation(ends[t])[:count]
      places = rng.permutation(spec.topk)[:count]
      indices[b, t, places] = row
      valid[b, t, row] = True
    chosen = {'indices_BTK': indices}
  weight = rng.random((batch, queries)).astype(np.float32)
  weight[:, 4::9] = 0
  q = draw(batch, queries, spec.num_heads, spec.width, size=logits**0.5)
  k = draw(batch, keys, spec.num_key_heads, spec.width, size=logits**0.5)
  arrays = (
    draw(batch, queries, spec.index_heads, spec.index_dim),
    draw(batch, keys, spec.index_dim),
    draw(batch, queries, spec.index_heads, size=0.1),
    q,
    k,
    _normaliser(q, k, valid, spec.scale),
    jnp.asarray(weight),
  )
  return arrays, {n: jnp.asarray(x) for n, x in chosen.items()}, valid


@jax.jit
def _query_normaliser(q_HX, k_SGX, valid_S, scale):
  k_SHX = jnp.repeat(k_SGX, q_HX.shape[0] // k_SGX.shape[1], axis=1)
  scores_HS = scale * jnp.einsum(
    'hx,shx->hs', q_HX, k_SHX, preferred_element_type=jnp.float32
  )
  return jax.nn.logsumexp(
    scores_HS, axis=1, where=jnp.broadcast_to(valid_S, scores_HS.shape)
  )


def _normaliser(q, k, valid, scale):
  def batch_entry(arrays):
    q, k, valid = arrays

    def query(arrays):
      q_HX, valid_S = arrays
      return _query_normaliser(q_HX, k, valid_S[None], scale)

    return lax.map(query, (q, valid))

  return lax.map(batch_entry, (q, k, jnp.asarray(valid)))


def _run(function, arrays, **kwargs):
  """(loss, kl) and the three gradients."""

  def loss(*indexer):
    return function(*indexer, *arrays[3:], **kwargs)

  (value, kl), gradients = jax.jit(
    jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
  )(*arrays[:3])
  return value, kl, gradients


def _relative(actual, expected):
  actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
  assert np.all(np.isfinite(actual))
  norm = np.linalg.norm(expected)
  error = np.linalg.norm(actual - expected)
  return error if norm == 0 else error / norm


def _assert_close(actual, expected):
  assert _relative(actual[0], expected[0]) < _VALUE_ERROR
  assert _relative(actual[1], expected[1]) < _VALUE_ERROR
  for a, b in zip(actual[2], expected[2], strict=True):
    assert _relative(a, b) < _GRADIENT_ERROR


@needs_api
@pytest.mark.parametrize(
  ('form', 'races', 'changes'),
  [
    pytest.param('selected', True, {'batch': 2}, marks=pytest.mark.slow),
    pytest.param('ranges', True, {}, marks=pytest.mark.slow),
    ('ranges', False, {'num_heads': 2, 'num_key_heads': 2}),
  ],
)
def test_indexer_kl_mosaic_interpreted_matches_reference(form, races, changes):
  spec = dataclasses.replace(_TINY, **changes)
  arrays, chosen, _ = _case('interpreted', spec, form)
  kwargs = {'scale': spec.scale, **chosen}
  target = mosaic.Target.INTERPRET
  actual = _run(
    mosaic_gpu.indexer_kl,
    arrays,
    target=mosaic.Target.INTERPRET_RACES if races else target,
    **kwargs,
  )
  _assert_close(actual, _run(reference.indexer_kl, arrays, **kwargs))


def _plain_gradients(q_TJI, k_SI, w_TJ, g_TK, rows_TK, spans, dk_SI, **_):
  """`mosaic_gradients.gradients` without a kernel, but with its reference."""
  assert not spans
  k_TKI = k_SI[jnp.maximum(rows_TK, 0)]
  dots_TJK = jnp.einsum('tji,tki->tjk', q_TJI, k_TKI).astype(jnp.float32)
  m_TJK = g_TK[:, None] * w_TJ[..., None] * (dots_TJK > 0)
  dk_TKI = jnp.einsum('tjk,tji->tki', m_TJK, q_TJI.astype(jnp.float32))
  rows_TK = jnp.where(rows_TK < 0, k_SI.shape[0], rows_TK)

  @jax.custom_batching.custom_vmap  # As `plgpu.kernel` has it.
  def add(dk_TKI, rows_TK, ref):
    ref[...] = ref[...].at[rows_TK].add(dk_TKI, mode='drop')
    return jnp.sum(rows_TK)

  add.def_vmap(lambda *_: None)
  _, dk_SI = mosaic.in_place(add)(dk_TKI, rows_TK, dk_SI)
  dq_TJI = jnp.einsum('tjk,tki->tji', m_TJK, k_TKI.astype(jnp.float32))
  dw_TJ = jnp.sum(g_TK[:, None] * jax.nn.relu(dots_TJK), axis=-1)
  return dq_TJI.astype(jnp.bfloat16), dw_TJ, dk_SI


@needs_api
def test_indexer_kl_mosaic_key_gradient_survives_scan_and_checkpoint(
  monkeypatch,
):
  """jax must not take the sums that kernels add to out of their loop."""
  spec = dataclasses.replace(_TINY, num_queries=6, num_keys=64)
  arrays, chosen, _ = _case('loops', spec, 'selected')
  monkeypatch.setattr(mosaic, 'require', lambda target: None)
  monkeypatch.setattr(
    mosaic_target,
    'target',
    lambda q_PHX, k, lse, rows_PK, *_, **__: jnp.where(
      rows_PK >= 0, 1 / rows_PK.shape[1], 0.0
    ),
  )
  monkeypatch.setattr(
    mosaic_scores,
    'scores',
    lambda q_PJI, k_SI, w_PJ, valid, **_: jnp.einsum(
      'pj,pjk->pk',
      w_PJ,
      jax.nn.relu(
        jnp.einsum('pji,pki->pjk', q_PJI, k_SI[jnp.maximum(valid[0], 0)])
      ),
    ),
  )
  monkeypatch.setattr(mosaic_gradients, 'gradients', _plain_gradients)

  def call(q_index, k_index, w_index, rest, indices):
    q, k, lse, weight = rest
    return mosaic_gpu.indexer_kl(
      q_index, k_index, w_index, q, k, lse, weight,
      scale=spec.scale, indices_BTK=indices,
    )[0]  # fmt: skip

  def in_chunks(q_index, k_index, w_index):
    def split(x):
      return jnp.moveaxis(x.reshape(x.shape[0], 3, 2, *x.shape[2:]), 1, 0)

    rows = (q_index, w_index, *(arrays[i] for i in (3, 5, 6)))
    rows = jax.tree.map(split, (*rows, chosen['indices_BTK']))

    def chunk(_, rows):
      q_index, w_index, q, lse, weight, indices = rows
      rest = (q, arrays[4], lse, weight)
      return None, call(q_index, k_index, w_index, rest, indices)

    def layer(total, _):
      _, losses = lax.scan(jax.checkpoint(chunk), None, rows)
      return total + jnp.sum(losses), None

    return lax.scan(jax.checkpoint(layer), jnp.zeros(()), None, length=2)[0]

  def at_once(*indexer):
    rest = tuple(arrays[i] for i in (3, 4, 5, 6))
    return 2 * call(*indexer, rest, chosen['indices_BTK'])

  results = [
    jax.jit(jax.value_and_grad(f, (0, 1, 2)))(*arrays[:3])
    for f in (in_chunks, at_once)
  ]
  for actual, expected in zip(*map(jax.tree.leaves, results), strict=True):
    assert _relative(actual, expected) < _GRADIENT_ERROR


def _abstract(spec, form):
  def struct(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)

  batch, queries, keys = spec.batch, spec.num_queries, spec.num_keys
  real = functools.partial(struct, jnp.bfloat16)
  arrays = (
    real(batch, queries, spec.index_heads, spec.index_dim),
    real(batch, keys, spec.index_dim),
    struct(jnp.float32, batch, queries, spec.index_heads),
    real(batch, queries, spec.num_heads, spec.width),
    real(batch, keys, spec.num_key_heads, spec.width),
    struct(jnp.float32, batch, queries, spec.num_heads),
    struct(jnp.float32, batch, queries),
  )
  row = struct(jnp.int32, batch, queries)
  if form == 'ranges':
    return arrays, {'key_start_BT': row, 'key_end_BT': row}
  return arrays, {'indices_BTK': struct(jnp.int32, *row.shape, spec.topk)}


def _lower(spec, form):
  arrays, chosen = _abstract(spec, form)

  def gradient(arrays, chosen):
    def loss(*indexer):
      return mosaic_gpu.indexer_kl(
        *indexer,
        *arrays[3:],
        scale=spec.scale,
        target=mosaic.Target.LOWER,
        **chosen,
      )[0]

    return jax.grad(loss, (0, 1, 2))(*arrays[:3])

  traced = jax.jit(gradient).trace(arrays, chosen)
  return traced.lower(lowering_platforms=('cuda',)).as_text()


@needs_api
@pytest.mark.parametrize(
  ('form', 'changes'),
  [
    ('selected', {}),
    ('ranges', {}),
    ('ranges', {'num_key_heads': 128, 'width': 192}),
    ('selected', {'num_heads': 64, 'width': 288, 'index_heads': 32}),
    ('selected', {'num_heads': 8, 'width': 160, 'index_heads': 16, 'topk': 64}),
    ('ranges', {'num_heads': 16, 'width': 160, 'index_dim': 64}),
    ('selected', {'batch': 3, 'num_queries': 333}),
  ],
)
def test_indexer_kl_mosaic_lowers_for_cuda(form, changes):
  text = _lower(dataclasses.replace(_V32, **changes), form)
  assert text.count('mosaic_gpu') >= 3


@needs_api
@pytest.mark.parametrize(
  ('form', 'changes', 'message'),
  [
    ('selected', {'num_heads': 256}, 'up to 128 heads'),
    ('selected', {'num_key_heads': 128, 'width': 192}, 'one key head'),
    ('ranges', {'num_key_heads': 2}, 'one key head or'),
    ('selected', {'index_heads': 128}, 'up to 64 indexer heads'),
    ('selected', {'width': 1024}, 'shared memory'),
  ],
)
def test_indexer_kl_mosaic_unsupported_raises(form, changes, message):
  with pytest.raises(NotImplementedError, match=message):
    _lower(dataclasses.replace(_V32, **changes), form)


@needs_api
def test_indexer_kl_mosaic_takes_bfloat16_only():
  arrays, chosen, _ = _case('dtype', _TINY, 'selected')
  with pytest.raises(NotImplementedError, match='bfloat16'):
    mosaic_gpu.indexer_kl(
      arrays[0].astype(jnp.float32),
      *arrays[1:],
      scale=1.0,
      target=mosaic.Target.LOWER,
      **chosen,
    )


@needs_api
def test_indexer_kl_mosaic_config_fits_into_shared_memory():
  for heads, width in ((128, 576), (64, 320), (8, 192), (128, 192)):
    chosen = config.mosaic_config(num_heads=heads, width=width)
    tiles = 64 * chosen.target.stages
    assert chosen.target.stages in (1, 2, 4)
    assert 2 * width * (heads + tiles) < mosaic.SHARED_MEMORY_BYTES


def _float32(arrays, valid, scale):
  """Loss, kl and gradients in float32, one query at a time."""
  q_index, k_index, w, q, k, lse, weight = (
    x.astype(jnp.float32) for x in arrays
  )
  product = functools.partial(jnp.einsum, precision='highest')

  def entry(arrays):
    q_index, k_index, w, q, k, lse, weight, valid = arrays

    def query(dk_SI, arrays):
      q_index_JI, w_J, q_HX, lse_H, weight, valid_S = arrays
      k_SHX = jnp.repeat(k, q_HX.shape[0] // k.shape[1], axis=1)
      scores_HS = scale * product('hx,shx->hs', q_HX, k_SHX)
      p_S = jnp.mean(jnp.exp(scores_HS - lse_H[:, None]), axis=0)
      valid_S &= weight != 0
      p_S = jnp.where(valid_S, p_S, 0)
      dots_JS = product('ji,si->js', q_index_JI, k_index)
      i_S = product('j,js->s', w_J, jnp.maximum(dots_JS, 0))
      log_q_S = jax.nn.log_softmax(i_S, where=valid_S)
      log_q_S = jnp.where(valid_S, log_q_S, 0)
      kl = jnp.sum(jax.scipy.special.xlogy(p_S, p_S) - p_S * log_q_S)
      g_S = jnp.where(valid_S, weight * (jnp.exp(log_q_S) - p_S), 0)
      m_JS = jnp.where(dots_JS > 0, g_S[None], 0)
      a_JI = product('js,si->ji', m_JS, k_index)
      dk_SI += product('js,ji->si', m_JS, w_J[:, None] * q_index_JI)
      dw_J = jnp.sum(a_JI * q_index_JI, axis=1)
      return dk_SI, (kl, w_J[:, None] * a_JI, dw_J)

    dk, rows = lax.scan(
      query, jnp.zeros_like(k_index), (q_index, w, q, lse, weight, valid)
    )
    return dk, *rows

  inputs = (q_index, k_index, w, q, k, lse, weight, jnp.asarray(valid))
  dk, kl, dq, dw = jax.jit(lambda x: lax.map(entry, x))(inputs)
  return jnp.sum(weight * kl), kl, (dq, dk, dw)


def _poison():
  """Leaves NaN in memory that the next outputs are likely to take."""
  jax.block_until_ready(jnp.full((2**26,), jnp.nan))


@pytest.mark.gpu
@pytest.mark.parametrize(
  ('form', 'logits', 'changes'),
  [
    ('selected', 1.0, {}),
    ('selected', 40.0, {'num_queries': 133, 'batch': 2, 'topk': 192}),
    ('selected', 40.0, {'num_heads': 64, 'width': 288, 'index_heads': 32}),
    ('selected', 1.0, {'num_heads': 8, 'width': 160, 'index_heads': 16}),
    ('ranges', 1.0, {'num_keys': 1024}),
    ('ranges', 40.0, {'num_keys': 700, 'num_key_heads': 128, 'width': 192}),
    ('ranges', 1.0, {'num_queries': 333, 'num_keys': 501, 'index_dim': 64}),
  ],
)
def test_indexer_kl_mosaic_on_gpu_matches_float32(form, logits, changes):
  spec = dataclasses.replace(_V32, **({'num_queries': 256} | changes))
  arrays, chosen, valid = _case(f'{form}{logits}', spec, form, logits=logits)
  _poison()
  actual = _run(mosaic_gpu.indexer_kl, arrays, scale=spec.scale, **chosen)
  _assert_close(actual, _float32(arrays, valid, spec.scale))


@pytest.mark.gpu
@pytest.mark.parametrize('form', ['selected', 'ranges'])
def test_indexer_kl_mosaic_on_gpu_blocks_and_sequences_add_up(form):
  # The key gradient must survive the loop over them.
  spec = dataclasses.replace(
    _V32, num_queries=1100, num_keys=2048, topk=128, num_heads=16, batch=2
  )
  arrays, chosen, valid = _case(f'blocks {form}', spec, form)
  small = config.mosaic_config(num_heads=spec.num_heads, width=spec.width)
  small = dataclasses.replace(
    small,
    block_elements=512 * spec.num_keys,
    selected_elements=512 * spec.topk,
  )
  actual = _run(
    mosaic_gpu.indexer_kl, arrays, scale=spec.scale, config=small, **chosen
  )
  _assert_close(actual, _float32(arrays, valid, spec.scale))


@pytest.mark.gpu
@pytest.mark.parametrize('form', ['selected', 'ranges'])
def test_indexer_kl_mosaic_on_gpu_rows_without_keys_are_zero(form):
  spec = dataclasses.replace(_V32, num_queries=64, num_keys=2048)
  arrays, chosen, _ = _case('empty', spec, form)
  if form == 'selected':
    chosen = {'indices_BTK': jnp.full_like(chosen['indices_BTK'], -1)}
  else:
    chosen |= {'key_end_BT': chosen['key_start_BT']}
  lse = jnp.full_like(arrays[5], -jnp.inf)
  arrays = (*arrays[:5], lse, arrays[6])
  _poison()
  result = _run(mosaic_gpu.indexer_kl, arrays, scale=spec.scale, **chosen)
  for x in jax.tree.leaves(result):
    assert np.all(np.asarray(x) == 0)


@pytest.mark.gpu
@pytest.mark.parametrize('form', ['selected', 'ranges'])
@pytest.mark.parametrize('how', ['plateau', 'duplicates'])
def test_indexer_kl_mosaic_on_gpu_equal_scores_match_float32(form, how):
  spec = dataclasses.replace(_V32, num_queries=64, num_keys=4096)
  arrays, chosen, valid = _case(how, spec, form)
  q_index, k_index, w, q, k, _, weight = arrays
  if how == 'plateau':
    # Index scores that are all 0, as where every product is negative.
    q_index, k_index = -jnp.abs(q_index), jnp.abs(k_index)
  else:
    # Every key four times: of equal index scores, and of equal targets.
    copied = np.arange(spec.num_keys) // 4
    k_index, k = k_index[:, copied], k[:, copied]
  lse = _normaliser(q, k, valid, spec.scale)
  arrays = (q_index, k_index, w, q, k, lse, weight)
  _poison()
  actual = _run(mosaic_gpu.indexer_kl, arrays, scale=spec.scale, **chosen)
  _assert_close(actual, _float32(arrays, valid, spec.scale))


@pytest.mark.gpu
def test_indexer_kl_mosaic_on_gpu_is_what_the_api_takes():
  spec = dataclasses.replace(_V32, num_queries=64)
  arrays, chosen, _ = _case('api', spec, 'selected')
  named = api.indexer_kl(
    *arrays, scale=spec.scale, implementation='mosaic_gpu', **chosen
  )
  automatic = api.indexer_kl(*arrays, scale=spec.scale, **chosen)
  testing.assert_close(
    named.kl_BT, automatic.kl_BT, tolerance={1.0: 1e-6}, label='kl'
  )
