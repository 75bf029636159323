"""SwiGLU feed-forward network of the dense layers and the shared experts.

Letters: B batch, T tokens, D hidden_size, F inner width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv32_jax.config.model import ModelConfig
from dsv32_jax.modules.weights import product, weight
from dsv32_jax.sharding import axes
from dsv32_jax.sharding.parallel import constrain


def swiglu(gate: Array, up: Array) -> Array:
  """silu(gate) * up in float32, cast back (spec 3.1)."""
  hidden = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
  return hidden.astype(gate.dtype)


class SwiGLU(nn.Module):
  """down(silu(gate(x)) * up(x)), without biases.

  Attributes:
    cfg: the model.
    width: F; dense layers and shared experts differ in it.
  """

  cfg: ModelConfig
  width: int

  @nn.compact
  def __call__(self, x_BTD: Float[Array, 'B T D']) -> Float[Array, 'B T D']:
    cfg, F = self.cfg, self.width
    D = cfg.hidden_size
    w_gate = weight(self, cfg, 'w_gate', (D, F), (axes.EMBED, axes.MLP))
    w_up = weight(self, cfg, 'w_up', (D, F), (axes.EMBED, axes.MLP))
    w_down = weight(self, cfg, 'w_down', (F, D), (axes.MLP, axes.EMBED))
    gate_BTF, up_BTF = (
      constrain(
        product('btd,df->btf', x_BTD, w),
        axes.BATCH,
        axes.SEQUENCE,
        axes.MLP,
      )
      for w in (w_gate, w_up)
    )
    return product('btf,fd->btd', swiglu(gate_BTF, up_BTF), w_down)
