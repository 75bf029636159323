"""Eight devices take the replayed steps that one device takes, in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsv32_jax.config.rl import GRPOConfig
from dsv32_jax.config.training import MeshConfig, OptimizerConfig
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.rl import batches, step
from dsv32_jax.sharding import mesh as mesh_lib
from dsv32_jax.sharding import parallel as parallel_lib
from dsv32_jax.sharding import specs
from dsv32_jax.training import compiled_step, optimizer
from dsv32_jax.training import state as state_lib
from tests.support import parity, rl_cases, tiny_configs
from tests.support.double_precision import double_precision

pytestmark = [
  pytest.mark.slow,
  pytest.mark.multidevice,
  pytest.mark.timeout(900),
]

GRPO = GRPOConfig(kl_strength=0.05, mask_delta=0.01, clip_epsilon=0.05)
LENGTHS = [[(10, 29), (10, 11), (10, 20)], [(5, 30), (5, 3), (5, 16), (5, 8)]]
MESHES = {
  'fsdp_expert_context': MeshConfig(
    rules='fsdp_expert_context', fsdp=2, expert=2, context=2
  ),
  'data_fsdp_expert': MeshConfig(rules='fsdp_expert', data=2, fsdp=2, expert=2),
  'fsdp_tensor_expert': MeshConfig(
    rules='fsdp_tensor_expert', fsdp=2, expert=2, tensor=2
  ),
}


def train(
  mesh, *, remat='none', micro_batches=1, logits_chunk=0, query_chunk=0
):
  """Two steps on one minibatch, the choices having moved since sampling."""
  with double_precision() as precision:
    cfg = parity.config(
      precision=precision, remat=remat, query_chunk=query_chunk
    )
    model = DeepSeekV32(cfg)
    parallel = None if mesh is None else mesh_lib.make_parallel(mesh)
    shapes = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float64),
      state_lib.variable_shapes(model),
    )
    sampler = tiny_configs.random_tree(shapes)
    groups = rl_cases.groups(
      dataclasses.replace(cfg, remat='none', query_chunk=0), sampler, LENGTHS
    )
    batch = batches.make_batch(
      batches.samples(groups, GRPO), model=cfg, grpo=GRPO, row_tokens=40, rows=8
    )
    batch = dataclasses.replace(
      batch, ref_logprob_BT=batch.sampling_logprob_BT - 0.1
    )
    variables = rl_cases.with_other_choices(sampler)
    if parallel is not None:
      variables = jax.tree.map(
        lambda leaf, shape: jax.device_put(leaf, shape.sharding),
        variables,
        state_lib.variable_shapes(model, parallel),
      )
    with parallel_lib.use(parallel):
      stage = step.rl_stage(GRPO, cfg)
      settings = OptimizerConfig(peak_learning_rate=2e-3)
      tx = optax.partition(
        {name: optimizer.adamw(settings, 10) for name in stage.trainable},
        optimizer.labels,
      )
      shardings = None
      if parallel is not None:
        shardings = specs.of_leaves(variables['params'])
      state = state_lib.create(variables, stage, tx, parallel)
      state = compiled_step.place_state(state, parallel)
      run = step.make_rl_step(
        model,
        GRPO,
        tx,
        micro_batches=micro_batches,
        logits_chunk=logits_chunk,
        shardings=shardings,
      )
      placed = jax.tree.map(lambda leaf: leaf.sharding, state)
      compiled = tiny_configs.jit(run, out_shardings=(placed, None))
      batch = batches.place(batch, parallel)
      lines = []
      for _ in range(2):
        state, metrics = compiled(state, batch)
        lines.append(jax.tree.map(np.asarray, metrics))
    return jax.tree.map(np.asarray, (state, lines))


one_device = functools.cache(functools.partial(train, None))


def assert_equal(many, one):
  for (path, actual), desired in zip(
    jax.tree_util.tree_leaves_with_path(many), jax.tree.leaves(one), strict=True
  ):
    np.testing.assert_allclose(
      actual,
      desired,
      rtol=1e-8,
      atol=1e-9,
      err_msg=jax.tree_util.keystr(path),
    )


ONE_AND_ALL = [
  name
  if name == 'fsdp_expert_context'
  else pytest.param(name, marks=pytest.mark.exhaustive)
  for name in MESHES
]


@pytest.mark.parametrize('name', ONE_AND_ALL)
def test_replayed_steps_on_eight_devices_are_those_of_one(name):
  """There with rematerialised blocks: choices are replayed backward too."""
  many, one = train(MESHES[name], remat='full'), one_device()
  assert_equal(many, one)
  first, second = one[1]
  assert first['grpo/log_ratio_abs_max'] < 5e-7
  assert first['mismatch/routing'] > 0.1
  assert first['mismatch/selection'] > 0.1
  fed = sum(prompt + new - 1 for group in LENGTHS for prompt, new in group)
  assert first['replayed/selection'] == 2 * fed
  # The second step is off-policy: something is clipped and masked.
  assert second['grpo/log_ratio_abs_mean'] > 1e-3
  assert second['grpo/clip_fraction'] > 0
  assert second['loss/policy'] < first['loss/policy']


@pytest.mark.exhaustive
@pytest.mark.parametrize('name', ['data_fsdp_expert', 'fsdp_expert_context'])
def test_micro_batches_and_chunks_on_eight_devices_add_up(name):
  many = train(MESHES[name], micro_batches=2, logits_chunk=10, query_chunk=10)
  assert_equal(many, one_device())
