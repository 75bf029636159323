"""Tests of dense attention of a few queries in MQA mode, over pages too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dense_mla_decode, mosaic
from pallas_kernels.sparse_mla_attention import config
from tests.pallas_kernels import stored_keys_cases

needs_api = pytest.mark.skipif(
  not mosaic.has_api(), reason='Mosaic GPU kernels need jax 0.11'
)


def make(batch, queries, heads, num_keys, width, dtype=jnp.float32):
  names = jax.random.split(jax.random.key(0))
  q = jax.random.normal(names[0], (batch, queries, heads, width), dtype)
  kv = jax.random.normal(names[1], (batch, num_keys, width), dtype)
  return q, kv


def numpy_attention(q, kv, start, end, *, latent_dim, scale):
  """Output and normaliser in float64."""
  q, kv = (
    np.asarray(x.astype(jnp.float32)).astype(np.float64) for x in (q, kv)
  )
  s = np.arange(kv.shape[1])
  start, end = (np.asarray(x)[:, :, None, None] for x in (start, end))
  scores = np.einsum('bthx,bsx->bths', q, kv) * scale
  scores = np.where((s >= start) & (s < end), scores, -np.inf)
  highest = np.max(scores, axis=-1, keepdims=True)
  p = np.exp(scores - np.where(np.isfinite(highest), highest, 0))
  total = np.sum(p, axis=-1, keepdims=True)
  p /= np.where(total == 0, 1, total)
  with np.errstate(divide='ignore'):
    lse = (np.log(total) + highest)[..., 0]
  return np.einsum('bths,bsc->bthc', p, kv[..., :latent_dim]), lse


def assert_attention(attended, desired, *, limit):
  out, lse = desired
  error = np.linalg.norm(np.asarray(attended.out_BTHC, np.float32) - out)
  assert error <= limit * np.linalg.norm(out)
  np.testing.assert_allclose(attended.lse_BTH, lse, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('page', [0, 16])
def test_dense_decode_is_softmax_attention_over_the_range(page):
  q, kv = make(2, 2, 4, 96, 24)
  start, end = stored_keys_cases.decode_ranges(2, 2, 96)
  rows, pages = kv, None
  if page:
    pages, rows = stored_keys_cases.to_pages(kv, page=page, garbage=99)
  attended = dense_mla_decode(
    q,
    rows,
    key_start_BT=start,
    key_end_BT=end,
    latent_dim=16,
    scale=0.3,
    pages_BN=pages,
  )
  desired = numpy_attention(q, kv, start, end, latent_dim=16, scale=0.3)
  assert_attention(attended, desired, limit=1e-5)


def test_sixteen_requests_split_their_keys_as_one_batch_entry_of_16_queries():
  """Splits depend on the number of queries, however they are arranged."""
  sizes = config.mosaic_config(
    num_rows=16, num_heads=128, topk=2048, num_multiprocessors=132
  )
  assert sizes.splits == 4
  sizes = config.mosaic_config(
    num_rows=16, num_heads=128, topk=131072, num_multiprocessors=132
  )
  assert sizes.splits == 4


@pytest.mark.gpu
@needs_api
@pytest.mark.parametrize('page', [0, 64])
def test_dense_decode_on_gpu_matches_float64(page):
  q, kv = make(3, 1, 128, 4096, 576, jnp.bfloat16)
  start, end = stored_keys_cases.decode_ranges(3, 1, 4096)
  rows, pages = kv, None
  if page:
    pages, rows = stored_keys_cases.to_pages(kv, page=page)
  attended = dense_mla_decode(
    q,
    rows,
    key_start_BT=start,
    key_end_BT=end,
    latent_dim=512,
    scale=0.05,
    pages_BN=pages,
    implementation='mosaic_gpu',
  )
  desired = numpy_attention(q, kv, start, end, latent_dim=512, scale=0.05)
  assert_attention(attended, desired, limit=4e-3)
