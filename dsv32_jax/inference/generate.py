"""Whole generations: prompts in, tokens and their log-probabilities out.

Letters: B requests, T tokens of the longest prompt, N new tokens, E tokens
that end a request, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from dsv32_jax.config.model import SPARSE, AttentionMode, ModelConfig
from dsv32_jax.inference import cached
from dsv32_jax.inference import sampling as sampling_lib
from dsv32_jax.inference.cached import DecodeState
from dsv32_jax.inference.sampling import GREEDY, Sampling, SamplingParams
from dsv32_jax.inference.unroll import unroll
from dsv32_jax.modules.transformer import DeepSeekV32

_NO_TOKEN = -1


@dataclasses.dataclass(frozen=True)
class Generation:
  """New tokens of a batch of requests; host arrays.

  Attributes:
    tokens_BN: int32; past a request's end, its last token repeated.
    logprobs_BN: log-probability of each token under the model (temperature 1,
      the whole vocabulary); 0 past the end.
    sampling_logprobs_BN: log-probability under the truncated distribution it
      was drawn from; 0 past the end.
    num_tokens_B: tokens up to and with the end-of-sequence token.
  """

  tokens_BN: np.ndarray
  logprobs_BN: np.ndarray
  sampling_logprobs_BN: np.ndarray
  num_tokens_B: np.ndarray

  def sequences(self) -> list[list[int]]:
    """Each request's new tokens."""
    return [
      row[:count].tolist()
      for row, count in zip(self.tokens_BN, self.num_tokens_B, strict=True)
    ]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Loop:
  """What one step of decoding hands to the next."""

  step: Any
  state: DecodeState
  done_B: Any
  tokens_BN: Any
  logprobs_BN: Any
  sampling_logprobs_BN: Any
  num_tokens_B: Any


@functools.partial(
  jax.jit,
  static_argnames=('model', 'num_tokens', 'attention'),
  donate_argnames=('state',),
)
def decode(
  model: DeepSeekV32,
  variables: dict,
  state: DecodeState,
  logits_BV: Float[Array, 'B V'],
  seed_B: Integer[Array, ' B'],
  eos_E: Int[Array, ' E'],
  *,
  num_tokens: int,
  params: SamplingParams | None = None,
  attention: AttentionMode = SPARSE,
) -> tuple[Array, Array, Array, Array, DecodeState]:
  """Draws up to `num_tokens` tokens in one program, without leaving the device.

  Args:
    model: an unrolled model.
    variables: its variables.
    state: caches after the prompts; given up (donated).
    logits_BV: logits after the prompts.
    seed_B: each request's seed.
    eos_E: a request ends after any of these, and decoding when all have; -1
      is no token.
    num_tokens: N.
    params: how to draw each request's tokens; None is greedy.
    attention: dense or sparse.

  Returns:
    The four fields of `Generation` as device arrays, and the state. The last
    token of a request is not in its cache yet.
  """
  B = logits_BV.shape[0]
  if params is None:
    params = sampling_lib.stack([GREEDY] * B)
  key_B = sampling_lib.request_keys(seed_B)

  def draw(loop: _Loop, logits_BV: Array) -> _Loop:
    """Records the step-th token."""
    drawn = sampling_lib.sample(
      logits_BV, sampling_lib.step_keys(key_B, loop.step), params
    )
    latest_B = loop.tokens_BN[:, jnp.maximum(loop.step - 1, 0)]
    token_B = jnp.where(loop.done_B, latest_B, drawn.token_B)
    is_eos_B = jnp.any(token_B[:, None] == eos_E[None, :], axis=-1)

    def record(rows_BN, value_B):
      return jax.lax.dynamic_update_slice_in_dim(
        rows_BN, value_B[:, None], loop.step, axis=1
      )

    return dataclasses.replace(
      loop,
      step=loop.step + 1,
      done_B=loop.done_B | is_eos_B,
      tokens_BN=record(loop.tokens_BN, token_B),
      logprobs_BN=record(
        loop.logprobs_BN, jnp.where(loop.done_B, 0.0, drawn.logprob_B)
      ),
      sampling_logprobs_BN=record(
        loop.sampling_logprobs_BN,
        jnp.where(loop.done_B, 0.0, drawn.sampling_logprob_B),
      ),
      num_tokens_B=loop.num_tokens_B + ~loop.done_B,
    )

  def advance(loop: _Loop) -> _Loop:
    tokens_B1 = jax.lax.dynamic_slice_in_dim(
      loop.tokens_BN, loop.step - 1, 1, axis=1
    )
    logits_BV, state = cached.extend(
      model,
      variables,
      loop.state,
      tokens_B1,
      (~loop.done_B).astype(jnp.int32),
      attention=attention,
    )
    return draw(dataclasses.replace(loop, state=state), logits_BV)

  loop = draw(
    _Loop(
      step=jnp.zeros((), jnp.int32),
      state=state,
      done_B=jnp.zeros((B,), jnp.bool),
      tokens_BN=jnp.zeros((B, num_tokens), jnp.int32),
      logprobs_BN=jnp.zeros((B, num_tokens), jnp.float32),
      sampling_logprobs_BN=jnp.zeros((B, num_tokens), jnp.float32),
      num_tokens_B=jnp.zeros((B,), jnp.int32),
    ),
    logits_BV,
  )
  loop = jax.lax.while_loop(
    lambda loop: (loop.step < num_tokens) & ~jnp.all(loop.done_B),
    advance,
    loop,
  )
  # Columns that were never reached repeat each request's last token.
  column_N = jnp.arange(num_tokens)[None, :]
  last_B1 = jnp.take_along_axis(
    loop.tokens_BN, loop.num_tokens_B[:, None] - 1, axis=1
  )
  tokens_BN = jnp.where(column_N < loop.step, loop.tokens_BN, last_B1)
  return (
    tokens_BN,
    loop.logprobs_BN,
    loop.sampling_logprobs_BN,
    loop.num_tokens_B,
    loop.state,
  )


def generate(
  model: DeepSeekV32,
  variables: dict,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  sampling: Sampling = GREEDY,
  seeds: Sequence[int] | None = None,
  eos: Sequence[int] = (),
  attention: AttentionMode = SPARSE,
  prefill_chunk: int = cached.CHUNK,
) -> Generation:
  """Continues a batch of prompts, which may differ in length.

  Example:
    >>> from dsv32_jax import checkpoints, inference
    >>> model, variables = checkpoints.load_hf('tests/fixtures/hf_tiny_v32')
    >>> new = inference.generate(
    ...   model, variables, [[5, 6, 7], [8]], max_new_tokens=4
    ... )
    >>> new.tokens_BN.shape
    (2, 4)

  Args:
    model: the model; a scanned one is unrolled at every call (a copy of the
      parameters), so unroll it before if there are several.
    variables: its variables.
    prompts: token ids, at least one a prompt.
    max_new_tokens: N.
    sampling: how to draw; greedy unless said otherwise.
    seeds: one a request; None counts from 0. A request's tokens depend on its
      own seed, not on its place in the batch.
    eos: tokens that end a request.
    attention: dense or sparse.
    prefill_chunk: run the prompts at most this many tokens at a time.

  Returns:
    A `Generation`.

  Raises:
    ValueError: no prompt, an empty one, ids outside the vocabulary, not one
      seed a prompt, or more tokens than max_position_embeddings.
  """
  cfg = model.cfg
  _check_request(cfg, prompts, max_new_tokens)
  if seeds is None:
    seeds = range(len(prompts))
  if len(seeds) != len(prompts):
    raise ValueError(
      f'seeds: got {len(seeds)}, expected one a prompt ({len(prompts)})'
    )
  model, variables = unroll(model, variables)
  lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
  tokens_BT = np.zeros((len(prompts), int(lengths_B.max())), np.int32)
  for row_T, prompt in zip(tokens_BT, prompts, strict=True):
    row_T[: len(prompt)] = prompt
  # Rounded, so that prompts of about the same length share a program.
  capacity = cached.bucket(tokens_BT.shape[1] + max_new_tokens)
  state = cached.init_state(cfg, batch=len(prompts), capacity=capacity)
  logits_BV, state = cached.prefill(
    model,
    variables,
    state,
    tokens_BT,
    lengths_B=lengths_B,
    attention=attention,
    chunk=prefill_chunk,
  )
  *fields, _ = decode(
    model,
    variables,
    state,
    logits_BV,
    np.asarray(seeds, np.uint32),
    np.array([*eos] or [_NO_TOKEN], np.int32),
    num_tokens=max_new_tokens,
    params=sampling_lib.stack([sampling] * len(prompts)),
    attention=cached.resolved(attention, num_queries=1),
  )
  return Generation(*(np.asarray(field) for field in fields))


def _check_request(
  cfg: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
  if max_new_tokens < 1:
    raise ValueError(
      f'max_new_tokens: got {max_new_tokens}, expected at least 1'
    )
  if not prompts:
    raise ValueError('prompts: got none, expected at least one')
  for index, prompt in enumerate(prompts):
    where = f'prompts[{index}]'
    if len(prompt) == 0:
      raise ValueError(f'{where}: got no token, expected at least one')
    if min(prompt) < 0 or max(prompt) >= cfg.vocab_size:
      raise ValueError(
        f'{where}: got ids from {min(prompt)} to {max(prompt)}, expected 0 to '
        f'{cfg.vocab_size - 1}'
      )
    total = len(prompt) + max_new_tokens
    if total > cfg.max_position_embeddings:
      raise ValueError(
        f'{where}: got {len(prompt)} tokens and {max_new_tokens} new ones, '
        'expected at most max_position_embeddings '
        f'{cfg.max_position_embeddings} together'
      )
