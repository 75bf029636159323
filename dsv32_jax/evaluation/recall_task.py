"""Accuracy of the synthetic recall task against distance.

The task is in `dsv32_jax.data.synthetic`: one look back at a token that lies an
exact distance away answers it, so it tells a selector that finds far tokens
from one that does not.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dsv32_jax.config.model import AttentionMode
from dsv32_jax.data import RecallBatch
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.sharding import parallel, sequences, specs
from dsv32_jax.sharding.parallel import Parallel


def recall_accuracy(
  model: DeepSeekV32,
  variables: dict,
  batches: Mapping[int, list[RecallBatch]],
  attention: AttentionMode,
  *,
  seed: int = 0,
) -> dict[int, float]:
  """Share of queries answered right, by distance.

  The answer is the arg max over the whole vocabulary; guessing among a key's
  values is right once in eight.

  Args:
    model: the model.
    variables: its variables.
    batches: distance in tokens -> recall rows at that distance.
    attention: which tokens are attended to.
    seed: of the random selector.

  Returns:
    Distance -> accuracy, 0 to 1.
  """
  accuracy = {}
  for distance, parts in batches.items():
    right = total = 0
    for index, part in enumerate(parts):
      key = jax.random.fold_in(jax.random.key(seed), index)
      best_BT = _best_tokens(
        variables,
        specs.padded_rows({'tokens': part.batch['tokens']})['tokens'],
        key,
        model=model,
        attention=attention,
        layout=parallel.active(),
      )
      found = np.asarray(best_BT)[part.row, part.position]
      right += int((found == part.answer).sum())
      total += len(part.answer)
    accuracy[distance] = right / total
  return accuracy


@functools.partial(jax.jit, static_argnames=('model', 'attention', 'layout'))
def _best_tokens(
  variables: dict,
  tokens_BT: Array,
  key: Array,
  *,
  model: DeepSeekV32,
  attention: AttentionMode,
  layout: Parallel | None,
) -> Array:
  """Arg max of the next-token logits, int32 [B, T]."""
  del layout
  inputs = sequences.model_inputs(
    tokens_BT,
    jnp.ones_like(tokens_BT),
    jnp.broadcast_to(
      jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape
    ),
  )
  output = model.apply(
    variables,
    inputs.tokens_BT,
    attention=attention,
    rngs={'selection': key},
    **inputs.arguments(),
  )  # pyrefly: ignore
  best_BT = sequences.natural(jnp.argmax(output.logits_BTV, axis=-1))
  return parallel.constrain(best_BT, None, None)
