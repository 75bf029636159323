"""What a training stage looks at beside its losses: the indexer, held out.

The metrics go into the stage's `metrics.jsonl`, one list a key with an entry a
layer. `experiments/continued_training.py` hands the observer to the loop.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from dsv32_jax.config.model import AttentionMode
from dsv32_jax.evaluation import perplexity, selection_recall
from dsv32_jax.modules.transformer import DeepSeekV32


def observer(
  model: DeepSeekV32,
  attention: AttentionMode,
  *,
  text: Iterable[Mapping],
  recall: Iterable[Mapping],
  seed: int = 0,
) -> Callable[[Any, int], dict[str, Any]]:
  """Makes an `evaluate` callable for the training loop.

  Args:
    model: the architecture of the stage.
    attention: how the stage attends; the held-out loss is taken in this mode.
    text: held-out text batches.
    recall: recall-task batches, possibly none.
    seed: of the random selector.

  Returns:
    (state, step) -> metrics: `held_out/loss` and, for models with an indexer,
    `indexer/text/*` and `indexer/recall/*` as `selection_recall` names them.
  """
  text, recall = tuple(text), tuple(recall)
  plain = AttentionMode(selector=attention.selector)

  def evaluate(state: Any, step: int) -> dict[str, Any]:
    del step
    result = perplexity.held_out_loss(
      model, state.variables, text, plain, seed=seed
    )
    metrics: dict[str, Any] = {
      'held_out/loss': result.loss,
      'held_out/pairs_per_token': result.pairs_per_token,
    }
    if model.cfg.q_lora_rank is not None:
      for name, batches in (('text', text), ('recall', recall)):
        if batches:
          rated = quality(model, state.variables, batches, seed=seed)
          metrics |= {
            f'indexer/{name}/{key}': value
            for key, value in rated.means().items()
          }
    return metrics

  return evaluate


def quality(
  model: DeepSeekV32,
  variables: dict,
  batches: Iterable[Mapping],
  *,
  seed: int = 0,
) -> selection_recall.SelectionQuality:
  """Sums `selection_quality` over batches."""
  total = None
  for index, rows in enumerate(batches):
    key = jax.random.fold_in(jax.random.key(seed), index)
    part = selection_recall.selection_quality(
      model, variables, rows['tokens'], rows['segment_ids'], key
    )
    total = part if total is None else total + part
  if total is None:
    raise ValueError('batches: got none, expected at least one')
  return total
