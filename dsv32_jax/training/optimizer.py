"""AdamW for the parameters that train; nothing at all for those that do not.

Main model and indexer are separate groups with their own schedule and their
own gradient clipping: the indexer's loss has an arbitrary scale, and a shared
norm would let it throttle the main model (spec section 5.2).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsv32_jax.config.training import OptimizerConfig, StageConfig
from dsv32_jax.training.stages import Stage


def group_of(path: tuple) -> str:
  """'indexer' or 'main', by where the parameter stands in the tree."""
  names = [getattr(key, 'key', None) for key in path]
  return 'indexer' if 'indexer' in names else 'main'


def labels(params: Any) -> Any:
  """The group of every parameter, as a tree like `params`."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: group_of(path), params
  )


def schedule(config: OptimizerConfig, steps: int) -> Callable:
  """Learning rate against the step of the stage, linear warm-up included."""
  peak = config.peak_learning_rate
  rest = max(steps - config.warmup_steps, 1)
  match config.schedule:
    case 'constant':
      after = optax.constant_schedule(peak)
    case 'linear':
      after = optax.linear_schedule(peak, peak * config.final_fraction, rest)
    case _:
      after = optax.cosine_decay_schedule(peak, rest, config.final_fraction)
  if config.warmup_steps == 0:
    return after
  # Step 0 already moves: a first step of learning rate 0 would be lost work.
  rise = optax.linear_schedule(
    peak / config.warmup_steps, peak, max(config.warmup_steps - 1, 1)
  )
  return optax.join_schedules([rise, after], [config.warmup_steps])


def adamw(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  """Clip by the group's own norm, then AdamW; no decay on vectors."""
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    scale_by_adam(config),
    optax.add_decayed_weights(config.weight_decay, mask=_is_matrix),
    optax.scale_by_learning_rate(schedule(config, steps)),
  )


def scale_by_adam(config: OptimizerConfig) -> optax.GradientTransformation:
  """Adam, its moments kept in `config.moment_dtype` between steps.

  optax narrows the first moment alone, and that before it is used.
  """
  adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
  if config.moment_dtype == 'float32':
    return adam

  def cast(state: Any, dtypes: Any) -> Any:
    return state._replace(
      mu=jax.tree.map(lambda x, like: x.astype(like), state.mu, dtypes),
      nu=jax.tree.map(lambda x, like: x.astype(like), state.nu, dtypes),
    )

  def narrow(state: Any) -> Any:
    dtypes = jax.tree.map(lambda x: jnp.dtype(config.moment_dtype), state.mu)
    return cast(state, dtypes)

  def update(updates: Any, state: Any, params: Any = None):
    wide = cast(state, jax.tree.map(lambda x: x.dtype, updates))
    updates, new = adam.update(updates, wide, params)
    return updates, narrow(new)

  return optax.GradientTransformation(
    lambda params: narrow(adam.init(params)), update
  )


# Norm scales and biases, which decay would pull to 0. Scanned ones carry a
# layer axis, so the name decides and not the number of dims.
_VECTORS = ('scale', 'bias')


def _is_matrix(params: Any) -> Any:
  return jax.tree_util.tree_map_with_path(
    lambda path, _: getattr(path[-1], 'key', None) not in _VECTORS, params
  )


def build(config: StageConfig, stage: Stage) -> optax.GradientTransformation:
  """The optimizer of a stage of a recipe; see `for_groups`."""
  settings = {'main': config.optimizer, 'indexer': config.indexer_optimizer}
  return for_groups(settings, config.steps, stage)


def for_groups(
  settings: Mapping[str, OptimizerConfig], steps: int, stage: Stage
) -> optax.GradientTransformation:
  """The optimizer of a stage.

  Frozen groups are not in it: AdamW would decay a parameter whose gradient is
  zero, so freezing by zero gradients does not freeze (spec section 9, 24).

  Args:
    settings: by group of parameters.
    steps: of the whole stage, for schedules.
    stage: which groups train.

  Returns:
    A transformation over the trainable sub-tree, see `trainable`.
  """
  return optax.partition(
    {group: adamw(settings[group], steps) for group in stage.trainable},
    labels,
  )


def split(params: Any, stage: Stage) -> tuple[dict, dict]:
  """Cuts the parameters into (trainable, frozen) flat dicts by path.

  Differentiating the first alone is what keeps the warm-up's backward away
  from the main model.
  """
  flat, _ = jax.tree_util.tree_flatten_with_path(params)
  trainable, frozen = {}, {}
  for path, leaf in flat:
    target = trainable if group_of(path) in stage.trainable else frozen
    target[tuple(key.key for key in path)] = leaf
  return _nest(trainable), _nest(frozen)


def join(trainable: dict, frozen: dict) -> dict:
  """Undoes `split`."""
  merged = dict(frozen)
  for name, value in trainable.items():
    both = isinstance(value, dict) and isinstance(merged.get(name), dict)
    merged[name] = join(value, merged[name]) if both else value
  return merged


def _nest(flat: dict) -> dict:
  tree: dict = {}
  for path, leaf in flat.items():
    node = tree
    for name in path[:-1]:
      node = node.setdefault(name, {})
    node[path[-1]] = leaf
  return tree
