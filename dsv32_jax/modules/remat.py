"""What the backward pass keeps and what it computes again."""

from collections.abc import Callable

import jax

# Integers, k a token. Every policy keeps them: choosing is the dearest thing to
# do again, and the backward pass must see the set that the forward pass chose.
_SELECTION = 'selected_indices'
_SAVED = {
  'full': (_SELECTION,),
  'save_attention': (
    _SELECTION,
    'attention_out',
    'attention_lse',
    'indexer_kl_grads',
  ),
}


def policy(name: str) -> Callable[..., bool]:
  """The `jax.checkpoint` policy of a `ModelConfig.remat` other than 'none'."""
  return jax.checkpoint_policies.save_only_these_names(*_SAVED[name])
