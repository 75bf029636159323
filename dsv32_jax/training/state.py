"""Everything a training step changes."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from dsv32_jax.config.model import DENSE
from dsv32_jax.modules.moe import ROUTER_BIAS
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.sharding import parallel as parallel_lib
from dsv32_jax.sharding import specs
from dsv32_jax.sharding.parallel import Parallel
from dsv32_jax.training import optimizer
from dsv32_jax.training.stages import Stage


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Parameters, router biases, optimizer state and position in a stage.

  Attributes:
    step: optimizer steps done in this stage, int32.
    params: all parameters, trainable or not.
    router_bias: selection biases, their own collection; {} without experts.
    opt_state: of the trainable groups only.
  """

  step: Any
  params: Any
  router_bias: Any
  opt_state: Any

  @property
  def variables(self) -> dict:
    """What `model.apply` takes."""
    return {'params': self.params, ROUTER_BIAS: self.router_bias}


def init_variables(
  model: DeepSeekV32, key: Array, parallel: Parallel | None = None
) -> dict:
  """Fresh variables without partitioning boxes.

  Args:
    model: the model.
    key: seeds every parameter; values do not depend on the layout.
    parallel: every device makes its own part of each array.

  Returns:
    {'params': ..., 'router_bias': ...}.
  """
  shardings = None
  if parallel is not None:
    shardings = specs.of_leaves(variable_shapes(model, parallel))
  # It runs once: optimising the code would take longer than running it.
  compiled = (
    jax.jit(
      lambda key: nn.meta.unbox(_init(model, key)), out_shardings=shardings
    )
    .lower(key)
    .compile(compiler_options={'xla_backend_optimization_level': 0})
  )
  return compiled(key)


def variable_shapes(
  model: DeepSeekV32, parallel: Parallel | None = None
) -> dict:
  """Shapes, dtypes and shardings of `init_variables`, without an array.

  Raises:
    ValueError: naming a parameter that its mesh axes cannot divide.
  """
  boxed = jax.eval_shape(functools.partial(_init, model), jax.random.key(0))
  return specs.with_shardings(boxed, parallel)


def _init(model: DeepSeekV32, key: Array) -> dict:
  # Dense attention has the same parameters and less to trace; one token a row
  # is not cut over devices.
  tokens_BT = jnp.zeros((1, 1), jnp.int32)
  with parallel_lib.use(None):
    variables = model.init(key, tokens_BT, attention=DENSE)
  return {ROUTER_BIAS: {}} | dict(variables)


def create(
  variables: dict,
  stage: Stage,
  tx: optax.GradientTransformation,
  parallel: Parallel | None = None,
) -> TrainState:
  """State at step 0 of a stage.

  Args:
    variables: from `init_variables`, a checkpoint or `load_hf`.
    stage: decides which parameters the optimizer holds.
    tx: the stage's optimizer.
    parallel: its moments are laid out as their parameters are.
  """
  trainable, _ = optimizer.split(variables['params'], stage)
  init = tx.init
  if parallel is not None:
    shardings = specs.mirrored(
      jax.eval_shape(tx.init, trainable), trainable, parallel
    )
    init = jax.jit(tx.init, out_shardings=shardings)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=variables['params'],
    router_bias=variables.get(ROUTER_BIAS, {}),
    opt_state=init(trainable),
  )
