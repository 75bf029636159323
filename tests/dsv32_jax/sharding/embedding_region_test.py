"""Lookups in a table that is cut over devices: the rows of the whole table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.sharding import axes, embedding_region, mesh, parallel, rules
from dsv32_jax.sharding.planning import hlo
from tests.support import tiny_configs

pytestmark = pytest.mark.multidevice

RULES = rules.RuleSet(
  'everything',
  {
    axes.BATCH: ('data', 'fsdp'),
    axes.SEQUENCE: ('context',),
    axes.VOCAB: ('tensor',),
    axes.EMBED: ('fsdp', 'context'),
  },
)
MESHES = {
  'fsdp8': {'fsdp': 8},
  'tensor8': {'tensor': 8},
  'data2-fsdp2-tensor2': {'data': 2, 'fsdp': 2, 'tensor': 2},
  'fsdp2-context2-tensor2': {'fsdp': 2, 'context': 2, 'tensor': 2},
}
VOCAB, WIDTH = 64, 16


def _parallel(sizes):
  sizes = dict.fromkeys(rules.MESH_AXES, 1) | sizes
  return parallel.Parallel(mesh.make_mesh(sizes, jax.devices()), RULES)


def _program(layout, shape):
  """Rows and the table's gradient, compiled for arrays that lie as they do."""
  generator = np.random.default_rng(0)
  table_VD = jnp.asarray(generator.standard_normal((VOCAB, WIDTH)), jnp.float32)
  tokens_BT = jnp.asarray(generator.integers(0, VOCAB, shape), jnp.int32)
  # Whole numbers: gradients are sums of them, exact in any order.
  weight_BTD = jnp.asarray(
    generator.integers(-8, 8, (*shape, WIDTH)), jnp.float32
  )

  def run(table_VD, tokens_BT, weight_BTD):
    rows_BTD, pull = jax.vjp(
      lambda table_VD: embedding_region.lookup(table_VD, tokens_BT), table_VD
    )
    return rows_BTD, pull(weight_BTD)[0]

  def place(x, *logical):
    spec = layout.fitting_spec(x.shape, *logical)
    return jax.device_put(x, jax.sharding.NamedSharding(layout.mesh, spec))

  operands = (
    place(table_VD, axes.VOCAB, axes.EMBED),
    place(tokens_BT, axes.BATCH, axes.SEQUENCE),
    place(weight_BTD, axes.BATCH, axes.SEQUENCE, None),
  )
  with parallel.use(layout):
    compiled = tiny_configs.jit(run).lower(*operands).compile()
  rows_BTD = table_VD[tokens_BT]
  gradient_VD = jnp.zeros_like(table_VD).at[tokens_BT].add(weight_BTD)
  return compiled, operands, (rows_BTD, gradient_VD)


@pytest.mark.parametrize('shape', [(8, 12), (3, 5)], ids=str)
@pytest.mark.parametrize('name', MESHES)
def test_lookup_gives_the_rows_and_gradient_of_the_whole_table(name, shape):
  """(3, 5) divides by no axis."""
  compiled, operands, desired = _program(_parallel(MESHES[name]), shape)
  for actual, expected in zip(compiled(*operands), desired, strict=True):
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize('name', MESHES)
def test_lookup_moves_tokens_and_their_vectors_only(name):
  """No device ever holds more of the table than its share."""
  layout = _parallel(MESHES[name])
  compiled, operands, _ = _program(layout, (8, 12))
  table = operands[0].addressable_shards[0].data.nbytes
  vectors = operands[2].addressable_shards[0].data.nbytes
  tokens = operands[1].nbytes
  for message in hlo.collectives(compiled.as_text(), dict(layout.mesh.shape)):
    limit = {
      'all-gather': tokens,
      'all-to-all': vectors,
      # Vectors of a cut vocabulary and their gradients, which XLA may send as
      # one; the table's gradient over copies of it.
      'all-reduce': max(2 * vectors, table),
    }[message.kind]
    assert message.bytes <= limit, message


def test_lookup_is_plain_indexing_on_one_device():
  table_VD = jnp.arange(12.0).reshape(6, 2)
  rows_BTD = embedding_region.lookup(table_VD, jnp.array([[5, 0]]))
  np.testing.assert_array_equal(rows_BTD, [[[10, 11], [0, 1]]])
