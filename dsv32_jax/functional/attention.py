"""Dense attention: blocked with its own backward pass, and a plain oracle.

The dense half of MLA (MHA mode), of the warm-up stage and of the dense
control. Online softmax over key blocks and recomputed probabilities are flash
attention's (arXiv:2205.14135, arXiv:2307.08691): in plain XLA, or in the
kernels of `pallas_kernels.dense_attention` on a GPU that they run on.

Letters: B batch, T query tokens, S key tokens, H heads, X query and key width,
U value width, N steps, P queries of a step, M keys of a block.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from dsv32_jax.functional import masking
from pallas_kernels.dense_attention import pallas_mosaic_gpu

# Elements of a block of scores over the whole batch: 2 MiB in float32, so
# that it stays in a core's cache; an accelerator wants fewer, larger steps.
_CPU_ELEMENTS = 2**19
_ACCELERATOR_ELEMENTS = 2**24


def dense_attention(
  q_BTHX: Float[Array, 'B T H X'],
  k_BSHX: Float[Array, 'B S H X'],
  v_BSHU: Float[Array, 'B S H U'],
  *,
  scale: int | float,
  key_start_BT: Int[Array, 'B T'] | None = None,
  key_end_BT: Int[Array, 'B T'] | None = None,
  block: int | None = None,
) -> tuple[Float[Array, 'B T H U'], Float[Array, 'B T H']]:
  """Softmax attention over a range of keys, in memory linear in T and S.

  Scores, softmax and sums are float32. Key blocks outside the ranges of a
  block of queries are skipped, so causal attention costs half, and packed
  documents less. Differentiable in q, k and v; the residuals are named
  'attention_out' and 'attention_lse' for `jax.checkpoint` policies.

  Args:
    q_BTHX: float32 or bfloat16 queries.
    k_BSHX: keys, of q's type.
    v_BSHU: values, of q's type.
    scale: factor of the scores, a Python number.
    key_start_BT: int32 first valid key of each query; None means 0.
    key_end_BT: int32, one past the last; None means causal, aligned at the
      end: t + 1 + S - T.
    block: queries and keys of a block of the XLA program; None takes the GPU
      kernels where they run, else a block fitted to the cache.

  Returns:
    out_BTHU of q's type, 0 in a row with no valid key, and the float32 log of
    the sum of exponentials, -inf in such a row, without gradient.

  Raises:
    ValueError: sizes or types that do not fit.

  Example:
    >>> q = k = v = jnp.ones((1, 8, 2, 4))
    >>> out, lse = dense_attention(q, k, v, scale=0.5)
    >>> out.shape, lse.shape
    ((1, 8, 2, 4), (1, 8, 2))
  """
  batch, num_queries, heads, width = q_BTHX.shape
  num_keys = k_BSHX.shape[1]
  if k_BSHX.shape != (batch, num_keys, heads, width):
    raise ValueError(
      f'k_BSHX.shape={k_BSHX.shape} must be (B, S, H, X) = '
      f'{(batch, num_keys, heads, width)}'
    )
  if v_BSHU.shape[:3] != (batch, num_keys, heads):
    raise ValueError(
      f'v_BSHU.shape={v_BSHU.shape} must begin with (B, S, H) = '
      f'{(batch, num_keys, heads)}'
    )
  if not q_BTHX.dtype == k_BSHX.dtype == v_BSHU.dtype:
    raise ValueError(
      f'dtypes of q, k and v must be equal, got {q_BTHX.dtype}, '
      f'{k_BSHX.dtype} and {v_BSHU.dtype}'
    )
  default_start, default_end = masking.causal_ranges(
    batch, num_queries, num_keys
  )
  key_start_BT = default_start if key_start_BT is None else key_start_BT
  key_end_BT = default_end if key_end_BT is None else key_end_BT
  for name, x in (('key_start_BT', key_start_BT), ('key_end_BT', key_end_BT)):
    if x.shape != (batch, num_queries):
      raise ValueError(
        f'{name}.shape={x.shape} must be (B, T) = {(batch, num_queries)}'
      )
  if block is None:
    try:
      return pallas_mosaic_gpu.dense_attention(
        q_BTHX, k_BSHX, v_BSHU, key_start_BT, key_end_BT, scale=scale
      )
    except NotImplementedError:
      pass  # Another device, type or width: XLA takes them all.
    on_cpu = jax.default_backend() == 'cpu'
    elements = _CPU_ELEMENTS if on_cpu else _ACCELERATOR_ELEMENTS
    side = max(math.isqrt(elements // (batch * heads)), 32)
    block = min(1 << (side.bit_length() - 1), 256 if on_cpu else 1024)
  if block < 1:
    raise ValueError(f'block={block} must be positive')
  blocks = (min(block, num_queries), min(block, num_keys))
  out_BTHU, lse_BTH = _attention(
    q_BTHX, k_BSHX, v_BSHU, key_start_BT, key_end_BT, float(scale), blocks
  )
  return out_BTHU, lax.stop_gradient(lse_BTH)


def masked_attention(
  q_BTHX: Float[Array, 'B T H X'],
  k_BSHX: Float[Array, 'B S H X'],
  v_BSHU: Float[Array, 'B S H U'],
  mask_BTS: Bool[Array, 'B T S'],
  *,
  scale: int | float,
) -> tuple[Float[Array, 'B T H U'], Float[Array, 'B T H']]:
  """The oracle: any mask, whole score tensor; see `dense_attention`.

  Args:
    q_BTHX: queries.
    k_BSHX: keys.
    v_BSHU: values.
    mask_BTS: True at the keys that a query sees.
    scale: factor of the scores.

  Returns:
    (out_BTHU, lse_BTH) as `dense_attention`.
  """
  mask_B1TS = mask_BTS[:, None]
  row_B1T1 = jnp.any(mask_B1TS, axis=-1, keepdims=True)
  scores_BHTS = scale * jnp.einsum(
    'bthx,bshx->bhts',
    q_BTHX.astype(jnp.float32),
    k_BSHX.astype(jnp.float32),
    precision='highest',
  )
  # A row with no key keeps finite scores, so that its gradient is 0, not NaN.
  scores_BHTS = jnp.where(mask_B1TS | ~row_B1T1, scores_BHTS, -jnp.inf)
  p_BHTS = jnp.where(row_B1T1, jax.nn.softmax(scores_BHTS, axis=-1), 0.0)
  out_BTHU = jnp.einsum(
    'bhts,bshu->bthu', p_BHTS, v_BSHU.astype(jnp.float32), precision='highest'
  )
  lse_BHT = jax.nn.logsumexp(lax.stop_gradient(scores_BHTS), axis=-1)
  lse_BHT = jnp.where(row_B1T1[..., 0], lse_BHT, -jnp.inf)
  return out_BTHU.astype(q_BTHX.dtype), jnp.swapaxes(lse_BHT, 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(q_BTHX, k_BSHX, v_BSHU, start_BT, end_BT, scale, blocks):
  queries, keys = blocks
  batch, num_queries, heads, _ = q_BTHX.shape
  k_BHSX = _pad(jnp.swapaxes(k_BSHX, 1, 2), 2, keys)
  v_BHSU = _pad(jnp.swapaxes(v_BSHU, 1, 2), 2, keys)
  rows = (batch, heads, queries)

  def step(inputs):
    q_BPHX, start_BP, end_BP, first, end = inputs
    q_BHPX = jnp.swapaxes(q_BPHX, 1, 2)

    def visit(block, carry):
      out_BHPU, highest_BHP, total_BHP = carry
      v_BHMU = _block_of(v_BHSU, block, keys)
      scores_BHPM = scale * _product(
        'bhpx,bhmx->bhpm', q_BHPX, _block_of(k_BHSX, block, keys)
      )
      mask_B1PM = _range_block(start_BP, end_BP, block, keys)
      scores_BHPM = jnp.where(mask_B1PM, scores_BHPM, -jnp.inf)
      new_BHP = jnp.maximum(highest_BHP, jnp.max(scores_BHPM, axis=-1))
      finite_BHP = jnp.where(new_BHP == -jnp.inf, 0.0, new_BHP)
      p_BHPM = jnp.exp(scores_BHPM - finite_BHP[..., None])
      shrink_BHP = jnp.exp(highest_BHP - finite_BHP)
      out_BHPU = shrink_BHP[..., None] * out_BHPU + _product(
        'bhpm,bhmu->bhpu', p_BHPM.astype(v_BHMU.dtype), v_BHMU
      )
      total_BHP = shrink_BHP * total_BHP + jnp.sum(p_BHPM, axis=-1)
      return out_BHPU, new_BHP, total_BHP

    out_BHPU, highest_BHP, total_BHP = lax.fori_loop(
      first,
      end,
      visit,
      (
        jnp.zeros((*rows, v_BSHU.shape[3]), jnp.float32),
        jnp.full(rows, -jnp.inf, jnp.float32),
        jnp.zeros(rows, jnp.float32),
      ),
    )
    out_BHPU /= jnp.where(total_BHP == 0, 1.0, total_BHP)[..., None]
    lse_BHP = highest_BHP + jnp.log(total_BHP)
    return (
      jnp.swapaxes(out_BHPU, 1, 2).astype(q_BTHX.dtype),
      jnp.swapaxes(lse_BHP, 1, 2),
    )

  out, lse = lax.map(
    step,
    (
      _split(q_BTHX, queries),
      *_split_ranges(start_BT, end_BT, blocks, k_BHSX.shape[2]),
    ),
  )
  return _join(out, num_queries), _join(lse, num_queries)


def _attention_forward(q_BTHX, k_BSHX, v_BSHU, start_BT, end_BT, scale, blocks):
  out_BTHU, lse_BTH = _attention(
    q_BTHX, k_BSHX, v_BSHU, start_BT, end_BT, scale, blocks
  )
  out_BTHU = checkpoint_name(out_BTHU, 'attention_out')
  lse_BTH = checkpoint_name(lse_BTH, 'attention_lse')
  residuals = (q_BTHX, k_BSHX, v_BSHU, start_BT, end_BT, out_BTHU, lse_BTH)
  return (out_BTHU, lse_BTH), residuals


def _attention_backward(scale, blocks, residuals, cotangents):
  q_BTHX, k_BSHX, v_BSHU, start_BT, end_BT, out_BTHU, lse_BTH = residuals
  d_out_BTHU = cotangents[0]
  queries, keys = blocks
  dtype = q_BTHX.dtype
  # sum_s p dp = out . d_out, without a second pass over the keys.
  delta_BTH = jnp.sum(
    out_BTHU.astype(jnp.float32) * d_out_BTHU.astype(jnp.float32), axis=-1
  )
  # exp(score - lse) of an empty row: masked, so any finite stand-in does.
  lse_BTH = jnp.where(lse_BTH == -jnp.inf, 0.0, lse_BTH)
  k_BHSX = _pad(jnp.swapaxes(k_BSHX, 1, 2), 2, keys)
  v_BHSU = _pad(jnp.swapaxes(v_BSHU, 1, 2), 2, keys)

  def step(carry, inputs):
    q_BPHX, d_out_BPHU, lse_BPH, delta_BPH = inputs[:4]
    start_BP, end_BP, first, end = inputs[4:]
    q_BHPX = jnp.swapaxes(q_BPHX, 1, 2)
    d_out_BHPU = jnp.swapaxes(d_out_BPHU, 1, 2)
    lse_BHP1 = jnp.swapaxes(lse_BPH, 1, 2)[..., None]
    delta_BHP1 = jnp.swapaxes(delta_BPH, 1, 2)[..., None]
    # With the key gradients transposed, no product reads the scores by
    # columns, which is about six times slower on CPU.
    q_BHXP = jnp.swapaxes(q_BHPX, 2, 3)
    d_out_BHUP = jnp.swapaxes(d_out_BHPU, 2, 3)

    def visit(block, carry):
      d_q_BHPX, d_k_BHXS, d_v_BHUS = carry
      k_BHMX = _block_of(k_BHSX, block, keys)
      scores_BHPM = scale * _product('bhpx,bhmx->bhpm', q_BHPX, k_BHMX)
      mask_B1PM = _range_block(start_BP, end_BP, block, keys)
      p_BHPM = jnp.where(mask_B1PM, jnp.exp(scores_BHPM - lse_BHP1), 0.0)
      d_p_BHPM = _product(
        'bhpu,bhmu->bhpm', d_out_BHPU, _block_of(v_BHSU, block, keys)
      )
      d_scores_BHPM = (scale * p_BHPM * (d_p_BHPM - delta_BHP1)).astype(dtype)
      d_q_BHPX += _product('bhpm,bhmx->bhpx', d_scores_BHPM, k_BHMX)
      d_k_BHXM = _product('bhxp,bhpm->bhxm', q_BHXP, d_scores_BHPM)
      d_v_BHUM = _product('bhup,bhpm->bhum', d_out_BHUP, p_BHPM.astype(dtype))
      return (
        d_q_BHPX,
        _add_block(d_k_BHXS, d_k_BHXM, block, keys),
        _add_block(d_v_BHUS, d_v_BHUM, block, keys),
      )

    d_q_BHPX, *carry = lax.fori_loop(
      first, end, visit, (jnp.zeros(q_BHPX.shape, jnp.float32), *carry)
    )
    return tuple(carry), jnp.swapaxes(d_q_BHPX, 1, 2).astype(dtype)

  (d_k_BHXS, d_v_BHUS), d_q = lax.scan(
    step,
    tuple(
      jnp.zeros(jnp.swapaxes(x, 2, 3).shape, jnp.float32)
      for x in (k_BHSX, v_BHSU)
    ),
    (
      *(_split(x, queries) for x in (q_BTHX, d_out_BTHU, lse_BTH, delta_BTH)),
      *_split_ranges(start_BT, end_BT, blocks, k_BHSX.shape[2]),
    ),
  )
  num_keys = k_BSHX.shape[1]
  d_k_BSHX = jnp.transpose(d_k_BHXS, (0, 3, 1, 2))[:, :num_keys]
  d_v_BSHU = jnp.transpose(d_v_BHUS, (0, 3, 1, 2))[:, :num_keys]
  d_q_BTHX = _join(d_q, q_BTHX.shape[1])
  return d_q_BTHX, d_k_BSHX.astype(dtype), d_v_BSHU.astype(dtype), None, None


_attention.defvjp(_attention_forward, _attention_backward)


def _split_ranges(start_BT, end_BT, blocks, num_keys):
  """Ranges by step, with each step's first key block and one past its last."""
  queries, keys = blocks
  start_NBP, end_NBP = _split(start_BT, queries), _split(end_BT, queries)
  empty_NBP = start_NBP >= end_NBP
  first_N = jnp.min(jnp.where(empty_NBP, num_keys, start_NBP), axis=(1, 2))
  end_N = jnp.max(jnp.where(empty_NBP, 0, end_NBP), axis=(1, 2))
  end_N = jnp.minimum(end_N, num_keys)
  return start_NBP, end_NBP, first_N // keys, -(-end_N // keys)


def _range_block(start_BP, end_BP, block, size):
  """Mask [B, 1, P, M] of one key block."""
  key_11M = block * size + jnp.arange(size, dtype=jnp.int32)[None, None]
  mask_BPM = key_11M >= start_BP[..., None]
  mask_BPM &= key_11M < end_BP[..., None]
  return mask_BPM[:, None]


def _pad(x, axis, multiple):
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % multiple)
  return jnp.pad(x, widths)


def _split(x, size):
  """[B, T, ...] to [N, B, P, ...], zeros (empty ranges) at the end."""
  x = _pad(x, 1, size)
  return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _join(x, num_queries):
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :num_queries]


def _block_of(x, block, size):
  """Key block of [B, H, S, ...]."""
  return lax.dynamic_slice_in_dim(x, block * size, size, 2)


def _add_block(total, update, block, size):
  """Adds to a key block of [B, H, ..., S]."""
  update += lax.dynamic_slice_in_dim(total, block * size, size, 3)
  return lax.dynamic_update_slice_in_dim(total, update, block * size, 3)


def _product(equation, x, y):
  return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)
