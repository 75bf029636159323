"""The attention layer on a GPU, with kernels, against the xla implementations.

V3.2's heads and widths, bfloat16. Both sides select with the same kernels, so
that they attend to the same sets.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dsv32_jax import presets
from dsv32_jax.config.model import SPARSE_TRAINING
from dsv32_jax.functional import masking
from dsv32_jax.modules import dsa
from pallas_kernels.indexer_kl import api as indexer_kl
from pallas_kernels.sparse_mla_attention import api as sparse_mla_attention

pytestmark = pytest.mark.gpu

LENGTH, CHUNK = 1100, 256


def _run(cfg, params, x_BTD, d_BTD, *, layers):
  """Output, loss and gradients of `layers` equal layers in a scan."""
  segment_ids_BT = jnp.asarray([[1] * 700 + [2] * 390 + [0] * 10])
  start_BT, end_BT = masking.key_ranges(segment_ids_BT)
  valid_BT = (segment_ids_BT > 0).astype(jnp.float32)
  context = dsa.AttentionContext(
    positions_BT=jnp.maximum(end_BT - 1 - start_BT, 0),
    key_start_BT=start_BT,
    key_end_BT=end_BT,
    row_weight_BT=valid_BT / jnp.sum(valid_BT),
  )
  layer = dsa.DeepSeekSparseAttention(cfg, SPARSE_TRAINING)

  @jax.jit
  def run(params, x_BTD):
    def loss(params, x_BTD):
      def one(x_BTD, _):
        u_BTD, aux = layer.apply({'params': params}, x_BTD, context)
        return (x_BTD + u_BTD).astype(x_BTD.dtype), aux.indexer_kl

      y_BTD, kl_L = jax.lax.scan(one, x_BTD, None, length=layers)
      return jnp.sum(y_BTD * d_BTD) / LENGTH + jnp.sum(kl_L), y_BTD

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x_BTD)

  return jax.tree.map(lambda x: np.asarray(x, np.float32), run(params, x_BTD))


@pytest.mark.parametrize('layers', [1, 2])
def test_dsa_kernels_in_chunks_and_scans_match_xla(monkeypatch, layers):
  """Sums over chunks and layers too, which kernels add to in place."""
  cfg = dataclasses.replace(
    presets.get('deepseek_v32_671b'), index_topk=256, remat='full'
  )
  keys = jax.random.split(jax.random.key(0), 3)
  shape = (1, LENGTH, cfg.hidden_size)
  x_BTD = jax.random.normal(keys[0], shape, jnp.bfloat16)
  d_BTD = jax.random.normal(keys[1], shape, jnp.bfloat16)
  layer = dsa.DeepSeekSparseAttention(cfg, SPARSE_TRAINING)
  ones = jnp.ones((1, 8), jnp.int32)
  start_BT, end_BT = masking.key_ranges(ones)
  context = dsa.AttentionContext(end_BT - 1, start_BT, end_BT, ones / 8)
  params = nn.meta.unbox(
    jax.jit(layer.init)(keys[2], x_BTD[:, :8], context)['params']
  )

  chunked = dataclasses.replace(cfg, query_chunk=CHUNK)
  kernels = _run(chunked, params, x_BTD, d_BTD, layers=layers)
  for api in (sparse_mla_attention, indexer_kl):
    assert 'mosaic_gpu' in api.IMPLEMENTATIONS
    monkeypatch.setattr(
      api,
      'IMPLEMENTATIONS',
      {k: v for k, v in api.IMPLEMENTATIONS.items() if k != 'mosaic_gpu'},
    )
  desired = _run(cfg, params, x_BTD, d_BTD, layers=layers)

  for (path, ours), theirs in zip(
    jax.tree_util.tree_leaves_with_path(kernels),
    jax.tree.leaves(desired),
    strict=True,
  ):
    error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    print(jax.tree_util.keystr(path), error)
    assert np.all(np.isfinite(ours))
    # Two bfloat16 computations, each with its own rounding. A second layer
    # selects from inputs that already differ.
    assert error < (2e-2 if layers == 1 else 6e-2), jax.tree_util.keystr(path)
