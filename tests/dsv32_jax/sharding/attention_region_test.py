"""Attention on eight devices against one: float64, so that only meaning counts.

Letters: B batch, T query tokens, S key tokens, H heads, K selected tokens.
"""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.config.model import (
  DENSE_WARMUP,
  SPARSE_TRAINING,
  AttentionMode,
  ModelConfig,
  Precision,
)
from dsv32_jax.functional import masking
from dsv32_jax.modules import mla, remat
from dsv32_jax.modules.attention_core import (
  AttentionContext,
  AttentionCore,
  Keys,
  Queries,
)
from dsv32_jax.sharding import (
  attention_region,
  attention_traffic,
  axes,
  mesh,
  parallel,
  rules,
  zigzag,
)
from dsv32_jax.sharding.planning import hlo
from tests.support import tiny_configs
from tests.support.double_precision import double_precision

pytestmark = pytest.mark.multidevice

# Every axis at once, which no rule set of the library has.
RULES = rules.RuleSet(
  'everything',
  {
    axes.BATCH: ('data', 'fsdp', 'expert'),
    axes.SEQUENCE: ('context',),
    axes.HEADS: ('tensor',),
    axes.EMBED: ('fsdp', 'context'),
    axes.Q_LATENT: ('fsdp', 'context'),
    axes.KV_LATENT: ('fsdp', 'context'),
  },
)
MESHES = {
  'context8': {'context': 8},
  'data2-context2-tensor2': {'data': 2, 'context': 2, 'tensor': 2},
  'fsdp2-tensor4': {'fsdp': 2, 'tensor': 4},
  'fsdp2-context4': {'fsdp': 2, 'context': 4},
}
STAGES = {'warmup': DENSE_WARMUP, 'sparse': SPARSE_TRAINING}
# Four rows of 32: whole, packed, padded, almost empty.
LENGTH = 32
DOCUMENTS = ([32], [9, 14, 9], [3, 20], [1])


def _config(precision: Precision = Precision(), **changes) -> ModelConfig:  # noqa: B008
  sizes = {'num_attention_heads': 4, 'q_lora_rank': 16, 'index_topk': 5}
  return tiny_configs.config(precision=precision, **(sizes | changes))


def _parallel(sizes):
  sizes = dict.fromkeys(rules.MESH_AXES, 1) | sizes
  count = int(np.prod(list(sizes.values())))
  return parallel.Parallel(mesh.make_mesh(sizes, jax.devices()[:count]), RULES)


def _operands(cfg, documents=DOCUMENTS, length=LENGTH):
  """Weights, queries and keys of a layer, in natural order."""
  generator = np.random.default_rng(0)
  B, T = len(documents), length

  def normal(*shape):
    x = generator.standard_normal(shape)
    return jnp.asarray(x, cfg.precision.compute)

  segments_BT = tiny_configs.rows(documents, length=length)['segment_ids']
  start_BT, end_BT = masking.key_ranges(jnp.asarray(segments_BT))
  valid_BT = jnp.asarray(segments_BT > 0, jnp.float32)
  H, Q, C = cfg.num_attention_heads, cfg.q_lora_rank, cfg.kv_lora_rank
  N, R, U = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
  J, I = cfg.index_n_heads, cfg.index_head_dim
  weights = mla.MLAWeights(
    w_uq=normal(Q, H, N),
    w_qr=normal(Q, H, R),
    w_uk=normal(C, H, N),
    w_uv=normal(C, H, U),
    w_o=normal(H, U, cfg.hidden_size),
  )
  context = AttentionContext(
    positions_BT=jnp.maximum(end_BT - 1 - start_BT, 0),
    key_start_BT=start_BT,
    key_end_BT=end_BT,
    row_weight_BT=valid_BT / jnp.sum(valid_BT),
  )
  queries = Queries(
    q_in_BTQ=normal(B, T, Q),
    q_index_BTJI=normal(B, T, J, I),
    w_index_BTJ=normal(B, T, J).astype(jnp.float32),
    number_BT=jnp.arange(B * T, dtype=jnp.int32).reshape(B, T),
    context=context,
  )
  return weights, queries, Keys(normal(B, T, C + R), normal(B, T, I))


def _attend(cfg, mode, shards, weights, queries, keys):
  return attention_region.attend(
    functools.partial(AttentionCore, cfg=cfg, mode=mode),
    weights,
    queries,
    keys,
    jax.random.key(3),
    weight_axes=mla.weight_axes(cfg),
    num_heads=cfg.num_attention_heads,
    sequence_shards=shards,
    policy=remat.policy('save_attention') if cfg.remat == 'none' else None,
  )


def _gradient(attend, policy=None):
  """(weights, queries, keys) -> results and all gradients."""

  def loss(differentiated, queries, keys):
    weights, values, key_values = differentiated
    attended = attend(
      weights,
      dataclasses.replace(queries, **values),
      dataclasses.replace(keys, **key_values),
    )
    swing = jnp.cos(jnp.arange(attended.u_BTD.size, dtype=jnp.float32))
    swing_BTD = swing.reshape(attended.u_BTD.shape)
    total = jnp.sum(jnp.tanh(attended.u_BTD / 30) * swing_BTD)
    return total + 3 * attended.indexer_kl, attended

  if policy is not None:
    loss = jax.checkpoint(loss, policy=policy)

  def run(weights, queries, keys):
    def values(tree, names):
      return {name: getattr(tree, name) for name in names}

    differentiated = (
      weights,
      values(queries, ('q_in_BTQ', 'q_index_BTJI', 'w_index_BTJ')),
      values(keys, ('latent_BSX', 'k_index_BSI')),
    )
    gradient = jax.value_and_grad(loss, has_aux=True)
    return gradient(differentiated, queries, keys)

  return run


def _run(cfg, mode, layout, shards, operands):
  """Everything given and returned in natural order."""

  def attend(weights, queries, keys):
    arranged = jax.tree.map(
      lambda x_BT: zigzag.to_zigzag(x_BT, shards), (queries, keys)
    )
    attended = _attend(cfg, mode, shards, weights, *arranged)
    u_BTD, indices_BTK = jax.tree.map(
      lambda x_BT: zigzag.to_natural(x_BT, shards),
      (attended.u_BTD, attended.indices_BTK),
    )
    return dataclasses.replace(attended, u_BTD=u_BTD, indices_BTK=indices_BTK)

  with parallel.use(layout):
    results = tiny_configs.jit(_gradient(attend))(*operands)
    return jax.tree.map(np.asarray, results)


@functools.cache
def _one_device(mode, **changes):
  with double_precision() as precision:
    cfg = _config(precision, **changes)
    return _run(cfg, mode, None, 1, _operands(cfg))


def _sets(indices_BTK):
  return [
    frozenset(row[row >= 0].tolist())
    for row in indices_BTK.reshape(-1, indices_BTK.shape[-1])
  ]


def _assert_equal(actual, desired, tolerance=1e-9):
  """Result and every gradient; integers, so selections, exactly."""
  paths = jax.tree_util.tree_leaves_with_path(desired)
  found = jax.tree.leaves(actual)
  assert len(found) == len(paths)
  for x, (path, y) in zip(found, paths, strict=True):
    name = jax.tree_util.keystr(path)
    if np.issubdtype(y.dtype, np.integer):
      assert _sets(x) == _sets(y), name
      continue
    assert x.dtype == y.dtype == np.float64, name
    scale = np.abs(y).max()
    np.testing.assert_allclose(
      x, y, rtol=0, atol=tolerance * max(scale, 1), err_msg=name
    )


@pytest.mark.parametrize('stage', STAGES)
@pytest.mark.parametrize(
  'name',
  [
    name if 'data' in name else pytest.param(name, marks=pytest.mark.slow)
    for name in MESHES
  ],
)
def test_region_equals_one_device_in_float64(name, stage):
  """Packed and padded rows; output, losses, every gradient, selections."""
  mode = STAGES[stage]
  desired = _one_device(mode)
  layout = _parallel(MESHES[name])
  with double_precision() as precision:
    cfg = _config(precision)
    actual = _run(
      cfg, mode, layout, layout.shards(axes.SEQUENCE), _operands(cfg)
    )
  _assert_equal(actual, desired)
  (_, attended), gradients = desired
  assert attended.indexer_kl > 0.01
  assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
  ('changes', 'mode'),
  [
    ({'query_chunk': 5}, SPARSE_TRAINING),
    ({}, AttentionMode(selector='random', indexer_kl='selected')),
    ({}, AttentionMode(selector='oracle', indexer_kl='selected')),
    ({}, AttentionMode(selector='window', absorbed=False)),
    ({}, dataclasses.replace(DENSE_WARMUP, absorbed=True)),
  ],
  ids=['in-chunks', 'random', 'oracle', 'window-mha', 'dense-absorbed'],
)
@pytest.mark.slow
def test_region_equals_one_device_in_every_mode(changes, mode):
  """Chunks of local queries, controls, both forms of MLA."""
  desired = _one_device(mode, **changes)
  layout = _parallel(MESHES['data2-context2-tensor2'])
  with double_precision() as precision:
    cfg = _config(precision, **changes)
    _assert_equal(_run(cfg, mode, layout, 2, _operands(cfg)), desired)


@pytest.mark.slow
@pytest.mark.parametrize('stage', STAGES)
def test_region_losses_in_float32_are_near(stage):
  cfg, mode = _config(), STAGES[stage]
  layout = _parallel(MESHES['data2-context2-tensor2'])
  one = _run(cfg, mode, None, 1, _operands(cfg))
  many = _run(cfg, mode, layout, 2, _operands(cfg))
  (loss, attended), _ = many
  np.testing.assert_allclose(loss, one[0][0], rtol=2e-5)
  np.testing.assert_allclose(
    attended.indexer_kl, one[0][1].indexer_kl, rtol=2e-5
  )
  assert attended.num_pairs == one[0][1].num_pairs


def test_region_lays_whole_what_does_not_divide():
  """Three rows, an odd length, over two by two by two: all do everything."""
  documents, length = ([7], [3, 4], [5]), 7
  layout = _parallel(MESHES['data2-context2-tensor2'])
  mode = SPARSE_TRAINING
  with double_precision() as precision:
    cfg = _config(precision, num_attention_heads=3)
    operands = _operands(cfg, documents, length)
    one = _run(cfg, mode, None, 1, operands)
    _assert_equal(_run(cfg, mode, layout, 1, operands), one)


@pytest.mark.slow
def test_region_takes_zigzag_order_on_one_device():
  """As a test on a laptop would: the order alone changes nothing."""
  mode = SPARSE_TRAINING
  with double_precision() as precision:
    cfg = _config(precision)
    actual = _run(cfg, mode, None, 4, _operands(cfg))
  _assert_equal(actual, _one_device(mode))


def test_region_refuses_another_order_than_the_mesh_has():
  cfg = _config()
  with pytest.raises(ValueError, match=r'sequence_shards: got 4, expected 2'):
    _run(
      cfg,
      SPARSE_TRAINING,
      _parallel(MESHES['data2-context2-tensor2']),
      4,
      _operands(cfg),
    )


def _compiled(cfg, mode, layout, operands):
  """The region with its gradients, on inputs that lie as training has them."""

  def place(x, *logical):
    spec = layout.fitting_spec(x.shape, *logical)
    return jax.device_put(x, jax.sharding.NamedSharding(layout.mesh, spec))

  weights, queries, keys = operands
  weights = jax.tree.map(
    lambda x, logical: place(x, *logical), weights, mla.weight_axes(cfg)
  )
  queries, keys = jax.tree.map(
    lambda x: place(x, axes.BATCH, axes.SEQUENCE, *[None] * (x.ndim - 2)),
    (queries, keys),
  )
  attend = functools.partial(_attend, cfg, mode, layout.shards(axes.SEQUENCE))
  policy = None if cfg.remat == 'none' else remat.policy(cfg.remat)
  with parallel.use(layout):
    program = tiny_configs.jit(_gradient(attend, policy))
    # Training has forward and backward passes in loops of their own; here they
    # are one computation, where jax 0.10 merges what remat makes again.
    return program.lower(weights, queries, keys).compile(
      compiler_options={'xla_disable_hlo_passes': 'cse'}
    )


def _messages(compiled, layout):
  """Bytes by kind and axes, of more than a few numbers."""
  found = hlo.collectives(
    compiled.as_text(), dict(layout.mesh.shape), unknown_trips=1
  )
  total = collections.Counter()
  for message in found:
    print(message)
    if 'gather_weights' not in message.scope and message.bytes > 64:
      total[message.kind, message.axes] += message.total
  return total


@pytest.mark.parametrize(
  ('stage', 'policy'),
  [
    ('warmup', 'save_attention'),
    ('sparse', 'full'),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in (
        ('warmup', 'none'),
        ('warmup', 'full'),
        ('sparse', 'none'),
        ('sparse', 'save_attention'),
      )
    ),
  ],
)
def test_region_sends_what_the_arithmetic_says(stage, policy):
  """In particular: over `context` keys are gathered and nothing else.

  So the policies see the names inside of the region: what they keep is not
  gathered again.
  """
  # One block of keys, and the form that reads selected rows.
  cfg, mode = _config(index_topk=4, remat=policy), STAGES[stage]
  layout = _parallel(MESHES['data2-context2-tensor2'])
  compiled = _compiled(cfg, mode, layout, _operands(cfg))
  traffic = attention_traffic.layer_traffic(
    cfg, layout, mode=mode, batch_size=len(DOCUMENTS), seq_len=LENGTH
  )
  expected = collections.Counter()
  for message in (*traffic.forward, *traffic.backward):
    expected[message.kind, message.axis_names] += message.bytes * message.count
  found = _messages(compiled, layout)
  # Gradients of the matrices, of which the arithmetic leaves parameters out.
  del found['all-reduce', ('data',)]
  assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize('stage', STAGES)
def test_region_memory_falls_with_the_devices_of_a_sequence(stage):
  """With heads in plenty: nothing of all tokens and all heads is anywhere."""
  cfg, mode = _config(num_attention_heads=64, remat='full'), STAGES[stage]

  def bytes_a_token(num_devices):
    layout = _parallel({'context': num_devices})

    def temporary(length):
      operands = _operands(cfg, ([length],), length)
      compiled = _compiled(cfg, mode, layout, operands)
      return compiled.memory_analysis().temp_size_in_bytes

    return (temporary(4096) - temporary(2048)) / 2048

  assert bytes_a_token(8) < bytes_a_token(1) / 6
