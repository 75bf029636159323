"""The whole model with every activation laid out, against one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.config.model import SPARSE_TRAINING
from dsv32_jax.functional import masking
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.sharding import axes, mesh, parallel, rules, zigzag
from tests.support import tiny_configs
from tests.support.double_precision import double_precision

pytestmark = pytest.mark.multidevice

RULES = rules.RuleSet(
  'everything',
  {
    axes.BATCH: ('data', 'fsdp'),
    axes.SEQUENCE: ('context',),
    axes.HEADS: ('tensor',),
    axes.MLP: ('tensor',),
    axes.VOCAB: ('tensor',),
    axes.EMBED: ('fsdp', 'context'),
  },
)
LENGTH = 16
ROWS = tiny_configs.rows([[16], [5, 9], [7], [3, 13]], length=LENGTH)


def _run(cfg, layout, shards):
  """Loss, logits and gradients; all in natural order."""
  model = DeepSeekV32(cfg)
  tokens_BT, segments_BT = (
    jnp.asarray(ROWS[name]) for name in ('tokens', 'segment_ids')
  )
  start_BT, end_BT = masking.key_ranges(segments_BT)
  given = {
    'positions_BT': jnp.maximum(end_BT - 1 - start_BT, 0),
    'key_range_BT': (start_BT, end_BT),
    'next_tokens_BT': jnp.pad(tokens_BT[:, 1:], ((0, 0), (0, 1))),
  }
  if shards == 1:
    given = {'segment_ids_BT': segments_BT}
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens_BT)
  variables = tiny_configs.random_tree(
    jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.value.shape, leaf.value.dtype),
      shapes,
      is_leaf=lambda leaf: hasattr(leaf, 'names'),
    )
  )

  def loss(params, tokens_BT, given):
    tokens_BT, given = jax.tree.map(
      lambda x_BT: zigzag.to_zigzag(x_BT, shards), (tokens_BT, given)
    )
    output = model.apply(
      variables | {'params': params},
      tokens_BT,
      **given,
      attention=SPARSE_TRAINING,
      compute_mtp=True,
      sequence_shards=shards,
    )
    logits, mtp_logits = (
      zigzag.to_natural(x, shards)
      for x in (output.logits_BTV, output.mtp_logits_BTV)
    )
    swing_BTV = jnp.sin(jnp.arange(logits.size, dtype=jnp.float32))
    swing_BTV = swing_BTV.reshape(logits.shape)
    total = jnp.sum(swing_BTV * (jnp.tanh(logits) + jnp.tanh(2 * mtp_logits)))
    total += jnp.sum(output.indexer_kl_L)
    return total, (logits, mtp_logits, output.indexer_kl_L, output.num_pairs_L)

  with parallel.use(layout):
    run = tiny_configs.jit(jax.value_and_grad(loss, has_aux=True))
    return jax.tree.map(np.asarray, run(variables['params'], tokens_BT, given))


@pytest.mark.slow
def test_model_over_three_axes_equals_one_device_in_float64():
  """Tied embedding, MTP, zigzag order; outputs and every gradient."""
  sizes = dict.fromkeys(rules.MESH_AXES, 1)
  sizes |= {'fsdp': 2, 'context': 2, 'tensor': 2}
  layout = parallel.Parallel(mesh.make_mesh(sizes, jax.devices()), RULES)
  with double_precision() as precision:
    cfg = tiny_configs.config(
      precision=precision,
      num_nextn_predict_layers=1,
      tie_word_embeddings=True,
      remat='full',
      query_chunk=3,
    )
    one, many = _run(cfg, None, 1), _run(cfg, layout, 2)
  paths = jax.tree_util.tree_leaves_with_path(one)
  for (path, desired), actual in zip(paths, jax.tree.leaves(many), strict=True):
    assert desired.dtype == actual.dtype == np.float64
    np.testing.assert_allclose(
      actual,
      desired,
      rtol=0,
      atol=1e-9 * max(np.abs(desired).max(), 1),
      err_msg=jax.tree_util.keystr(path),
    )


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'positions_BT': None}, 'got 2 without positions_BT'),
    ({'key_range_BT': None}, 'got 2 without key_range_BT'),
    ({'next_tokens_BT': None}, 'got 2 without next_tokens_BT'),
    ({'sequence_shards': 3}, 'got 3 for rows of 16 tokens.* multiple of 6'),
  ],
)
def test_model_in_zigzag_order_refuses_what_it_cannot_tell(changes, message):
  model = DeepSeekV32(tiny_configs.config(num_nextn_predict_layers=1))
  tokens_BT = jnp.zeros((1, LENGTH), jnp.int32)
  given = {
    'positions_BT': tokens_BT,
    'key_range_BT': (tokens_BT, tokens_BT + 1),
    'next_tokens_BT': tokens_BT,
    'sequence_shards': 2,
  } | changes
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(
      lambda key: model.init(key, tokens_BT, compute_mtp=True, **given),
      jax.random.key(0),
    )
