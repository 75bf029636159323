"""Routed experts on eight virtual devices: layouts, routings, programs.

Letters: B batch, T tokens, D width, E experts, A experts a token.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax.config.model import ModelConfig
from dsv32_jax.functional import expert_dispatch
from dsv32_jax.functional.expert_exchange import Exchange
from dsv32_jax.modules import moe
from dsv32_jax.sharding import axes, expert_parallel, parallel, rules
from dsv32_jax.sharding import mesh as mesh_lib
from tests.support import tiny_configs
from tests.support.double_precision import double_precision

B, T = 8, 6
SIZES = {'n_routed_experts': 16, 'num_experts_per_tok': 3}
# No named rule set has context and tensor at once; a region must not care.
EVERYTHING = rules.RuleSet(
  'everything',
  {
    **rules.RULE_SETS['fsdp_expert_context'].mesh_axes,
    **rules.RULE_SETS['fsdp_tensor_expert'].mesh_axes,
    axes.EMBED: ('fsdp', 'expert', 'context'),
  },
)
ONE_ROUND, TINY = Exchange(factor=8.0), Exchange(capacity=2, chunk=7)


def layout(name: str = 'fsdp_expert', **sizes: int) -> parallel.Parallel:
  """The first devices as a mesh, under a rule set; other axes are 1."""
  rule_set = EVERYTHING if name == 'everything' else rules.RULE_SETS[name]
  sizes = {axis: sizes.get(axis, 1) for axis in rules.MESH_AXES}
  count = int(np.prod(list(sizes.values())))
  mesh = mesh_lib.make_mesh(sizes, jax.devices('cpu')[:count])
  return parallel.Parallel(mesh, rule_set)


@contextlib.contextmanager
def float64() -> Iterator[ModelConfig]:
  """Everything in float64; gives the model's config."""
  with double_precision() as precision:
    yield tiny_configs.config(**SIZES, precision=precision)


def boxed(cfg: ModelConfig) -> dict:
  """Shapes of a layer's variables, in boxes with their logical axes."""
  x_BTD = jnp.zeros((1, 1, cfg.hidden_size), cfg.precision.compute)
  layer = moe.MoE(cfg)
  return jax.eval_shape(
    lambda: layer.init(jax.random.key(0), x_BTD, jnp.ones((1, 1), bool))
  )


@functools.cache
def variables(cfg: ModelConfig, skew: str) -> dict:
  """Random weights and a bias that draws tokens; do not change in place.

  Args:
    cfg: the model.
    skew: 'none'; 'one_device' for experts 0 to 3; 'few' for three experts.
  """
  variables = tiny_configs.random_tree(nn.meta.unbox(boxed(cfg)))
  bias_E = variables['router_bias']['router']['e_score_correction_bias']
  favoured = {'none': [], 'one_device': [0, 1, 2, 3], 'few': [2, 14, 15]}
  bias_E = bias_E.at[jnp.asarray(favoured[skew], jnp.int32)].add(9.0)
  variables['router_bias']['router']['e_score_correction_bias'] = bias_E
  return variables


def inputs(cfg: ModelConfig, shape: tuple[int, int] = (B, T), seed: int = 0):
  """Tokens, a cotangent, and valid tokens."""
  rng = np.random.default_rng(seed)
  x, cotangent = (
    jnp.asarray(
      rng.standard_normal((*shape, cfg.hidden_size)), cfg.precision.compute
    )
    for _ in range(2)
  )
  return x, cotangent, jnp.asarray(rng.random(shape) < 0.8)


def gradients(cfg: ModelConfig, exchange: Exchange = ONE_ROUND) -> Callable:
  """Everything that a layer gives: output, load, loss, all gradients."""
  layer = moe.MoE(cfg, exchange)

  def loss(params, x_BTD, bias, cotangent_BTD, valid_BT):
    variables = {'params': params, 'router_bias': bias}
    y_BTD, aux = layer.apply(variables, x_BTD, valid_BT)
    # The balance loss is small: weighed up to be seen in the gradients.
    total = jnp.sum(y_BTD * cotangent_BTD) + 1e4 * aux.balance_loss
    return total, (y_BTD, aux)

  def run(variables, x_BTD, cotangent_BTD, valid_BT):
    (_, out), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(
      variables['params'],
      x_BTD,
      variables['router_bias'],
      cotangent_BTD,
      valid_BT,
    )
    return out, grads

  return tiny_configs.jit(run)


WEIGHT_AXES = (
  (axes.EXPERTS, axes.EMBED, axes.EXPERT_MLP),
  (axes.EXPERTS, axes.EMBED, axes.EXPERT_MLP),
  (axes.EXPERTS, axes.EXPERT_MLP, axes.EMBED),
)


def region(layout: parallel.Parallel, exchange: Exchange) -> Callable:
  """(weights, x, index, gate) -> y over a mesh."""

  def apply(weights, x_BTD, index_BTA, gate_BTA):
    return expert_parallel.routed_experts(
      layout,
      moe.swiglu_experts,
      weights,
      WEIGHT_AXES,
      x_BTD,
      index_BTA,
      gate_BTA,
      exchange=exchange,
    )

  return apply


def one_device_region(weights, x_BTD, index_BTA, gate_BTA) -> jax.Array:
  """What `region` computes, as the module does without a mesh."""
  x_ND, index_NA, gate_NA = (
    a.reshape(-1, a.shape[-1]) for a in (x_BTD, index_BTA, gate_BTA)
  )
  order = expert_dispatch.sort_by_expert(
    index_NA, num_experts=weights[0].shape[0]
  )
  x_MD = expert_dispatch.permute(x_ND, order)
  y_MD = moe.swiglu_experts(x_MD, weights, order.group_sizes_E)
  return expert_dispatch.combine(y_MD, gate_NA, order).reshape(x_BTD.shape)


def with_gradients(apply: Callable) -> Callable:
  """(weights, x, index, gate, dy) -> y and its gradients, compiled."""

  def run(weights, x_BTD, index_BTA, gate_BTA, dy_BTD):
    y_BTD, vjp = jax.vjp(
      lambda w, x, g: apply(w, x, index_BTA, g), weights, x_BTD, gate_BTA
    )
    return y_BTD, vjp(dy_BTD)

  return tiny_configs.jit(run)


def region_inputs(dtype, seed: int = 0, D: int = 16, F: int = 8):
  """Weights, tokens, gates, cotangent of sixteen experts."""
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), dtype)

  weights = tuple(
    0.4 * normal(16, *shape) for shape in ((D, F), (D, F), (F, D))
  )
  gate_BTA = jnp.asarray(rng.random((B, T, 3)), jnp.promote_types(dtype, 'f4'))
  return weights, normal(B, T, D), gate_BTA, normal(B, T, D)


KINDS = (
  'one_expert',
  'one_device',
  'skewed',
  'uniform',
  'empty_experts',
  'few_choices',
)


def routing(rng: np.random.Generator, kind: str) -> np.ndarray:
  """Experts [B, T, 3]: distinct, 16 where a token has fewer than three."""
  if kind == 'one_expert':
    index = np.full((B, T, 3), 16)
    index[..., rng.integers(3)] = rng.integers(16)
    return index
  chances = np.ones(16)
  if kind == 'skewed':
    chances = rng.dirichlet(np.full(16, 0.1)) + 1e-9
  elif kind == 'one_device':
    first = 4 * rng.integers(4)
    chances = np.where(np.arange(16) // 4 == first // 4, 1.0, 1e-30)
  elif kind == 'empty_experts':
    chances[rng.permutation(16)[:10]] = 1e-30
  order = np.log(chances) + rng.gumbel(size=(B, T, 16))
  index = np.argsort(-order, axis=-1)[..., :3]
  if kind == 'few_choices':
    index = np.where(rng.random(index.shape) < 0.6, 16, index)
  return index
