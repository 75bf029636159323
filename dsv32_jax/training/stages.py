"""The stages of continued training and of SFT, as values.

A stage is which tokens are attended to, which losses are taken and which
parameters move. Sources: V3 report section 4 (pretrain, context extension);
arXiv:2512.02556 section 2.1 (dense warm-up, sparse training) and section 3
(post-training attends as sparse training does); spec section 5.
"""

import dataclasses
from typing import Literal

from dsv32_jax.config.model import (
  DENSE,
  DENSE_WARMUP,
  AttentionMode,
  ModelConfig,
)
from dsv32_jax.config.training import StageConfig

Group = Literal['main', 'indexer']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
  """What a training step does; hashable, so that it is static under jit.

  Attributes:
    attention: mode of the forward pass.
    trainable: parameter groups that move; the others leave the optimizer.
    lm_loss: take the LM loss (and the MTP and balance losses with it).
    indexer_kl_coefficient: weight of L^I; 0 takes none.
    mtp_loss_weight: lambda; 0 takes none.
    router_bias_update_rate: gamma; 0 freezes the router bias.
    micro_batches: gradient accumulation.
  """

  attention: AttentionMode
  trainable: tuple[Group, ...]
  lm_loss: bool
  indexer_kl_coefficient: float
  mtp_loss_weight: float
  router_bias_update_rate: float
  micro_batches: int = 1


def build(config: StageConfig, model: ModelConfig) -> Stage:
  """The stage that a config describes.

  Args:
    config: kind, selector, weights.
    model: the architecture it will train.

  Returns:
    The stage.

  Raises:
    ValueError: if the stage needs an indexer and the model has no q latent.
  """
  common = {
    'micro_batches': config.micro_batches,
    'mtp_loss_weight': (
      config.mtp_loss_weight if model.num_nextn_predict_layers else 0.0
    ),
  }
  match config.kind:
    case 'pretrain' | 'context_extension':
      return Stage(
        attention=DENSE,
        trainable=('main',),
        lm_loss=True,
        indexer_kl_coefficient=0.0,
        router_bias_update_rate=config.router_bias_update_rate,
        **common,
      )
    case 'dense_warmup':
      model.require_indexer()
      # "we keep dense attention and freeze all model parameters except for the
      # lightning indexer": the router bias stays too.
      return Stage(
        attention=DENSE_WARMUP,
        trainable=('indexer',),
        lm_loss=False,
        indexer_kl_coefficient=config.indexer_kl_coefficient,
        router_bias_update_rate=0.0,
        **common,
      )
    case 'sparse_training' | 'sft':
      # Post-training keeps to the sparse stage: the main model learns from its
      # task's loss alone, the indexers from their KL. What differs in SFT is
      # the data, whose loss weights leave out what the model does not write.
      if config.selector == 'all':
        # The dense control: same steps, same batches, no indexer.
        return Stage(
          attention=DENSE,
          trainable=('main',),
          lm_loss=True,
          indexer_kl_coefficient=0.0,
          router_bias_update_rate=config.router_bias_update_rate,
          **common,
        )
      model.require_indexer()
      learns = config.selector == 'indexer'
      return Stage(
        attention=AttentionMode(
          selector=config.selector, indexer_kl='selected' if learns else 'none'
        ),
        trainable=('main', 'indexer') if learns else ('main',),
        lm_loss=True,
        indexer_kl_coefficient=config.indexer_kl_coefficient if learns else 0.0,
        router_bias_update_rate=config.router_bias_update_rate,
        **common,
      )
  raise ValueError(f'kind: got {config.kind!r}')
