"""Recorded experts and selections of a whole model.

Keep Routing (arXiv:2512.02556, section 3.1; spec section 2.4): the experts that
were chosen while sampling are forced in training, their gates are live. The
indexer's top-k is a second discrete choice, with the same remedy.

Letters: B batch, T tokens, L layers, A experts a token, K selected keys.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dsv32_jax.config.model import AttentionMode, ModelConfig
from dsv32_jax.functional.recorded import Recorded


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Replay:
  """What a forward pass takes from sampling; either may be None.

  Attributes:
    experts: index is int [L, B, T, A], over the layers with experts.
    selected: index is int [L, B, T, K], over all main layers: keys as places in
      the row, counted in natural order; K = min(index_topk, T).
  """

  experts: Recorded | None = None
  selected: Recorded | None = None

  def check(
    self, cfg: ModelConfig, mode: AttentionMode, batch: int, length: int
  ) -> None:
    """Sees that every record has its layer and every layer its record.

    Raises:
      ValueError: naming the record, its shape and what was expected.
    """
    choices = min(cfg.index_topk, length)
    if self.experts is not None and not cfg.num_moe_layers:
      raise ValueError(
        'replay.experts: got a record for a model without experts, expected '
        'None'
      )
    if self.selected is not None and not mode.is_sparse:
      raise ValueError(
        'replay.selected: got a record with dense attention, expected an '
        'attention mode that selects'
      )
    for name, recorded, layers, width in (
      ('experts', self.experts, cfg.num_moe_layers, cfg.num_experts_per_tok),
      ('selected', self.selected, cfg.num_hidden_layers, choices),
    ):
      if recorded is None:
        continue
      expected = (layers, batch, length, width)
      if recorded.index.shape != expected:
        raise ValueError(
          f'replay.{name}: got shape {tuple(recorded.index.shape)}, expected '
          f'{expected}: {layers} layers, {batch} rows of {length} tokens, '
          f'{width} choices each'
        )

  def of_layers(self, first: int, count: int, num_dense: int) -> 'Replay':
    """The records of some consecutive layers, which are of one kind."""

    def cut(recorded: Recorded | None, start: int) -> Recorded | None:
      if recorded is None:
        return None
      return jax.tree.map(lambda x: x[start : start + count], recorded)

    has_experts = first >= num_dense
    return Replay(
      experts=cut(self.experts, first - num_dense) if has_experts else None,
      selected=cut(self.selected, first),
    )

  def of_layer(self, number: int) -> 'Replay':
    """The records of one layer."""
    return jax.tree.map(lambda x: x[number], self)


def stacked(reports: Any) -> Any:
  """Mismatches of several stacks, joined along the layer dim; None if none."""
  parts = [report for report in reports if report is not None]
  if not parts:
    return None
  return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
