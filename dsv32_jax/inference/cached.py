"""The model with its caches: prefill and single decode steps.

Each new token runs the model on that token alone: its latent row and its
indexer key are appended to the caches, the indexer scores the cached keys and
attention reads the selected rows. The caches are values, donated to every
jitted function here, so XLA updates them in place.

Letters: B requests, T new tokens, V vocabulary.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv32_jax.config.model import SPARSE, AttentionMode, ModelConfig
from dsv32_jax.functional import latent_cache
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.sharding import parallel, specs

CHUNK = 512
_SMALLEST_CHUNK = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
  """What the model remembers of the requests of a batch.

  Attributes:
    caches: one `LatentCache` a layer.
    length_B: tokens cached so far, int32.
  """

  caches: tuple[latent_cache.LatentCache, ...]
  length_B: Any

  @property
  def capacity(self) -> int:
    return self.caches[0].area_size


def init_state(
  cfg: ModelConfig,
  *,
  batch: int,
  capacity: int,
  latent_format: str = 'compute',
  index_format: str = 'compute',
) -> DecodeState:
  """Empty caches for `batch` requests of at most `capacity` tokens each.

  Under a layout each device makes the caches of its own requests.

  Args:
    cfg: the model.
    batch: requests.
    capacity: tokens of each.
    latent_format: of the latent rows: the compute dtype, or 656 bytes.
    index_format: of the indexer keys: the compute dtype, or float8.

  Raises:
    ValueError: for a model without an indexer (its keys are cached too), or
      latent rows that the 656-byte format is not made for.
  """
  caches = init_caches(
    cfg,
    count=cfg.num_hidden_layers,
    areas=batch,
    area_size=capacity,
    latent_format=latent_format,
    index_format=index_format,
  )
  return DecodeState(caches=caches, length_B=jnp.zeros((batch,), jnp.int32))


def init_caches(
  cfg: ModelConfig,
  *,
  count: int,
  areas: int,
  area_size: int,
  latent_format: str,
  index_format: str,
) -> tuple[latent_cache.LatentCache, ...]:
  """Empty caches of `count` layers; see `functional.latent_cache`."""
  cfg.require_indexer()

  def init() -> tuple[latent_cache.LatentCache, ...]:
    return tuple(
      latent_cache.init(
        areas=areas,
        area_size=area_size,
        latent_dim=cfg.latent_dim,
        index_dim=cfg.index_head_dim,
        dtype=jnp.dtype(cfg.precision.compute),
        latent_format=latent_format,
        index_format=index_format,
      )
      for _ in range(count)
    )

  layout = parallel.active()
  if layout is None:
    return init()
  shardings = specs.cache(layout, jax.eval_shape(init))
  return jax.jit(init, out_shardings=shardings)()


def prefill(
  model: DeepSeekV32,
  variables: dict,
  state: DecodeState,
  tokens_BT: Int[np.ndarray, 'B T'] | Int[Array, 'B T'],
  *,
  lengths_B: Int[np.ndarray, ' B'] | None = None,
  attention: AttentionMode = SPARSE,
  chunk: int = CHUNK,
) -> tuple[Float[Array, 'B V'], DecodeState]:
  """Appends prompts, or further pieces of prompts, to the caches.

  Args:
    model: an unrolled model (`inference.unroll`).
    variables: its variables.
    state: caches from `init_state` or an earlier call; given up (donated).
    tokens_BT: new tokens, each row padded at its end.
    lengths_B: new tokens of each row without padding, 1 to T; None is T.
    attention: dense or sparse.
    chunk: run at most this many tokens at a time.

  Returns:
    Logits after each row's last token, and the longer state.

  Raises:
    ValueError: for a scanned model, lengths outside 1..T, or caches that are
      too small.
  """
  tokens_BT = np.asarray(tokens_BT, np.int32)
  B, T = tokens_BT.shape
  if lengths_B is None:
    lengths_B = np.full((B,), T, np.int32)
  if lengths_B.shape != (B,) or lengths_B.min() < 1 or lengths_B.max() > T:
    raise ValueError(
      f'lengths_B: got {lengths_B}, expected {B} numbers from 1 to {T}'
    )
  if chunk < 1:
    raise ValueError(f'chunk: got {chunk}, expected at least 1')
  offset_B = np.asarray(state.length_B)
  needed = int((offset_B + T).max())
  if needed > state.capacity:
    raise ValueError(
      f'capacity: got {state.capacity}, expected at least {needed} '
      f'({int(offset_B.max())} tokens cached, {T} new ones with padding)'
    )
  logits_BV = None
  for start in range(0, T, chunk):
    # Padding is cached too, past each row's length: never valid, overwritten
    # by the tokens to come.
    room = state.capacity - int(offset_B.max())
    width = min(bucket(min(chunk, T - start)), room)
    piece_BT = np.zeros((B, width), np.int32)
    real_BT = tokens_BT[:, start : start + chunk]
    piece_BT[:, : real_BT.shape[1]] = real_BT
    new_B = np.clip(lengths_B - start, 0, real_BT.shape[1])
    latest_BV, state = extend(
      model,
      variables,
      state,
      piece_BT,
      new_B,
      attention=resolved(attention, num_queries=width),
    )
    offset_B = offset_B + new_B
    if logits_BV is None:
      logits_BV = latest_BV
    else:
      logits_BV = jnp.where((new_B > 0)[:, None], latest_BV, logits_BV)
  assert logits_BV is not None
  return logits_BV, state


def decode_step(
  model: DeepSeekV32,
  variables: dict,
  state: DecodeState,
  tokens_B: Int[np.ndarray, ' B'] | Int[Array, ' B'],
  *,
  attention: AttentionMode = SPARSE,
) -> tuple[Float[Array, 'B V'], DecodeState]:
  """Appends one token a request and returns the logits after it.

  Args:
    model: an unrolled model.
    variables: its variables.
    state: caches; given up (donated).
    tokens_B: the tokens.
    attention: dense or sparse; absorbed unless it says otherwise.

  Returns:
    Logits and the longer state. Logits are NaN for a request whose cache is
    full, whose last row is then spoilt.
  """
  return extend(
    model,
    variables,
    state,
    tokens_B[:, None],
    np.ones(tokens_B.shape, np.int32),
    attention=resolved(attention, num_queries=1),
  )


def resolved(attention: AttentionMode, *, num_queries: int) -> AttentionMode:
  """The mode with `absorbed` settled, so that equal modes share a program.

  A single query is always absorbed unless it is forbidden: MHA mode would
  expand every cached latent for it.
  """
  if attention.absorbed is not None:
    return attention
  absorbed = attention.is_sparse or num_queries == 1
  return dataclasses.replace(attention, absorbed=absorbed)


@functools.partial(
  jax.jit,
  static_argnames=('model', 'attention'),
  donate_argnames=('state',),
)
def extend(
  model: DeepSeekV32,
  variables: dict,
  state: DecodeState,
  tokens_BT: Int[Array, 'B T'],
  num_new_B: Int[Array, ' B'],
  *,
  attention: AttentionMode,
) -> tuple[Float[Array, 'B V'], DecodeState]:
  """Runs the model on T more tokens, of which `num_new_B` count.

  One program; `prefill` and `decode_step` are made of it. The caller sees to
  it that length + T stays within the capacity.

  Returns:
    Logits after each row's last token that counts (of no meaning where none
    does), and the state.
  """
  output = model.apply(
    variables,
    tokens_BT,
    attention=resolved(attention, num_queries=tokens_BT.shape[1]),
    caches=state.caches,
    cache_length_B=state.length_B,
  )
  last_B = jnp.maximum(num_new_B - 1, 0)
  logits_BV = jnp.take_along_axis(
    output.logits_BTV, last_B[:, None, None], axis=1
  )[:, 0]
  length_B = state.length_B + num_new_B.astype(jnp.int32)
  # A write past the end would be clamped on to valid rows: better no answer
  # than a wrong one.
  logits_BV = jnp.where(
    (length_B <= state.capacity)[:, None], logits_BV, jnp.nan
  )
  return logits_BV, DecodeState(caches=output.caches, length_B=length_B)


def bucket(size: int) -> int:
  """`size` rounded up to a power of two, or to a multiple of 512 above that."""
  if size > CHUNK:
    return -(-size // CHUNK) * CHUNK
  return max(_SMALLEST_CHUNK, 1 << (size - 1).bit_length())
