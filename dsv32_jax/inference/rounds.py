"""What the engine runs on the device: one piece of prompts, a few new tokens.

Both are one jitted program for a number of rows (requests, or free places).
The big arrays, caches and draft probabilities, stay on the device and are
donated; what the host knows of every row is small and comes with each call.

With the MTP module as draft (speculative decoding, arXiv:2211.17192 and
DeepSeek-V3 report section 2.2), every step feeds the last token and one drafted
token, and gives one or two new ones. A rejected draft leaves its row in the
caches past the request's length, where the next token is written.

Letters: B rows, T tokens fed, E most tokens a step gives (1, or 2 with a
draft), N pages of a row, V vocabulary, Y stop ids, M most likely tokens
reported, W steps.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv32_jax.config.model import AttentionMode, ModelConfig
from dsv32_jax.functional.latent_cache import LatentCache
from dsv32_jax.inference import sampling, speculative
from dsv32_jax.modules.mtp import MultiTokenPrediction
from dsv32_jax.modules.transformer import (
  DeepSeekV32,
  attention_context,
  embeddings_of,
  logits_of,
)

_VERIFY, _DRAFT = 1, 2
"""What a step's random numbers are for, beside its own draw."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Memory:
  """What stays on the device between calls.

  Attributes:
    caches: of the main layers.
    draft_cache: of the MTP block, or None without speculation.
    draft_token_B: the token drafted for each place.
    draft_BV: log-weights it was drawn from.
  """

  caches: tuple[LatentCache, ...]
  draft_cache: LatentCache | None = None
  draft_token_B: Any = None
  draft_BV: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """What the host knows of the rows of a call.

  Attributes:
    place_B: place of each row in `Memory`; one past the last for a row that is
      not in use.
    pages_BN: its pages, -1 for none.
    length_B: tokens in its caches.
    count_B: new tokens so far; numbers the draws.
    remaining_B: new tokens it may still get; 0 for a row that rests.
    seed_B: uint32.
    params: how its tokens are drawn.
    stop_BY: tokens that end it, -1 for none.
  """

  place_B: Any
  pages_BN: Any
  length_B: Any
  count_B: Any
  remaining_B: Any
  seed_B: Any
  params: sampling.SamplingParams
  stop_BY: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Emission:
  """What one step gives; W of them stacked by `decode`.

  Attributes:
    count_B: new tokens.
    finite_B: of a prefill, whether all of its tokens' hidden states are finite;
      the caches hold 0 in place of what is not.
    token_BE: they; what is past the count means nothing.
    logprob_BE: under the model itself.
    sampling_logprob_BE: under the distribution they were drawn from.
    accepted_B: drafted tokens that were accepted, of those that `drafted_B`
      says; None without a draft.
    drafted_B: see `accepted_B`.
    top_token_BEM: the most likely tokens, or None.
    top_logprob_BEM: theirs, or None.
    kept_BEV8: bits of the tokens that could have been drawn, or None.
    kept_BEM: their ids, ascending and filled up with -1, or None.
    expert_LBTA: experts of the tokens fed in, or None.
    selected_LBTK: keys selected for them, or None.
  """

  count_B: Any
  token_BE: Any
  logprob_BE: Any
  sampling_logprob_BE: Any
  finite_B: Any = None
  accepted_B: Any = None
  drafted_B: Any = None
  top_token_BEM: Any = None
  top_logprob_BEM: Any = None
  kept_BEV8: Any = None
  kept_BEM: Any = None
  expert_LBTA: Any = None
  selected_LBTK: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
  """What is returned beside tokens; static.

  Attributes:
    top: M, 0 for none.
    experts: the experts of tokens.
    kept: the tokens that could have been drawn; as ids where `most_kept` says
      how many there can be, else as bits.
    most_kept: of no row can more tokens be drawn; 0 if there is no such bound.
    selected: the selected keys.
  """

  top: int = 0
  experts: bool = False
  kept: bool = False
  most_kept: int = 0
  selected: bool = False


@functools.partial(
  jax.jit,
  static_argnames=('model', 'attention', 'wanted'),
  donate_argnames=('memory',),
)
def prefill(
  model: DeepSeekV32,
  variables: dict,
  memory: Memory,
  rows: Rows,
  tokens_BT: Int[Array, 'B T'],
  num_new_B: Int[Array, ' B'],
  follow_B: Int[Array, ' B'],
  *,
  attention: AttentionMode,
  wanted: Wanted,
) -> tuple[Emission, Memory]:
  """Appends a piece of each row's prompt; draws a token after the last piece.

  Args:
    model: unrolled.
    variables: its variables.
    memory: given up (donated).
    rows: `remaining_B` is 0 for rows whose prompt goes on.
    tokens_BT: the pieces, padded at their ends.
    num_new_B: their lengths.
    follow_B: the token after each piece; of no meaning after the last.
    attention: dense or sparse.
    wanted: what else to return.

  Returns:
    The first new token of the rows whose prompt is complete, and the memory.
  """
  cfg, params = model.cfg, variables['params']
  output = _extend(model, variables, memory, rows, tokens_BT, attention)
  last_B1 = jnp.maximum(num_new_B - 1, 0)[:, None]
  hidden_B1D = _at(output.hidden_BTD, last_B1)
  logits_B1V = logits_of(cfg, params, hidden_B1D)
  emission, token_B, target_B1V = _draw(rows, logits_B1V, wanted)
  emission = _with_wanted(emission, wanted, logits_B1V, target_B1V, output)
  emission, _ = _ended(emission, rows)
  is_new_BT = jnp.arange(tokens_BT.shape[1])[None, :] < num_new_B[:, None]
  is_finite_BT = jnp.all(jnp.isfinite(output.hidden_BTD), axis=-1)
  emission = dataclasses.replace(
    emission, finite_B=jnp.all(is_finite_BT | ~is_new_BT, axis=1)
  )
  memory = dataclasses.replace(memory, caches=output.caches)
  if memory.draft_cache is None:
    return emission, memory
  next_BT = jnp.roll(tokens_BT, -1, axis=1)
  follow_B = jnp.where(rows.remaining_B > 0, token_B, follow_B)
  next_BT = _put(next_BT, last_B1, follow_B)
  length_B, count_B = rows.length_B, rows.count_B + emission.count_B
  return emission, _drafted(
    model,
    variables,
    memory,
    dataclasses.replace(rows, count_B=count_B),
    output.hidden_BTD,
    next_BT,
    length_B,
    last_B1,
    attention,
    wanted,
  )


@functools.partial(
  jax.jit,
  static_argnames=('model', 'num_steps', 'attention', 'wanted'),
  donate_argnames=('memory',),
)
def decode(
  model: DeepSeekV32,
  variables: dict,
  memory: Memory,
  rows: Rows,
  token_B: Int[Array, ' B'],
  *,
  num_steps: int,
  attention: AttentionMode,
  wanted: Wanted,
) -> tuple[Emission, Memory, tuple[Rows, Int[Array, ' B']]]:
  """Continues every row by `num_steps` steps, or until all have ended.

  Args:
    model: unrolled.
    variables: its variables.
    memory: given up (donated).
    rows: one for each place of the memory, in order.
    token_B: each row's newest token, which is not in its caches yet.
    num_steps: W.
    attention: dense or sparse.
    wanted: what else to return.

  Returns:
    Emissions with a leading axis of W steps, of no tokens where none was
    needed any more; the memory; and `rows` and `token_B` of a call that goes on
    from there.
  """

  def step(memory, rows, token_B):
    return _decode_step(
      model, variables, memory, rows, token_B, attention, wanted
    )

  def goes_on(carry: Any) -> Array:
    number, _, (_, rows, _) = carry
    return (number < num_steps) & jnp.any(rows.remaining_B > 0)

  def advance(carry: Any) -> Any:
    number, emissions, state = carry
    emission, *state = step(*state)
    emissions = jax.tree.map(
      lambda all_W, one: all_W.at[number].set(one), emissions, emission
    )
    return number + 1, emissions, tuple(state)

  state: Any = jax.tree.map(jnp.asarray, (memory, rows, token_B))
  shapes = jax.eval_shape(step, *state)[0]
  emissions = jax.tree.map(
    lambda x: jnp.zeros((num_steps, *x.shape), x.dtype), shapes
  )
  _, emissions, (memory, *following) = jax.lax.while_loop(
    goes_on, advance, (jnp.zeros((), jnp.int32), emissions, state)
  )
  return emissions, memory, tuple(following)


def _decode_step(
  model: DeepSeekV32,
  variables: dict,
  memory: Memory,
  rows: Rows,
  token_B: Array,
  attention: AttentionMode,
  wanted: Wanted,
) -> tuple[Emission, Memory, Rows, Array]:
  cfg, params = model.cfg, variables['params']
  has_draft = memory.draft_cache is not None
  fed_BT = token_B[:, None]
  if has_draft:
    fed_BT = jnp.stack([token_B, memory.draft_token_B], axis=1)
  output = _extend(model, variables, memory, rows, fed_BT, attention)
  logits_BEV = logits_of(cfg, params, output.hidden_BTD)
  if has_draft:
    emission, new_B, target_BEV = _verify(rows, logits_BEV, memory, wanted)
  else:
    emission, new_B, target_BEV = _draw(rows, logits_BEV, wanted)
  emission = _with_wanted(emission, wanted, logits_BEV, target_BEV, output)
  # What the caches keep: the token fed, and the draft where it was accepted.
  kept_B = emission.count_B
  emission, remaining_B = _ended(emission, rows)
  memory = dataclasses.replace(memory, caches=output.caches)
  following = dataclasses.replace(
    rows,
    length_B=rows.length_B + kept_B,
    count_B=rows.count_B + emission.count_B,
    remaining_B=remaining_B,
  )
  if has_draft:
    memory = _drafted(
      model,
      variables,
      memory,
      following,
      output.hidden_BTD,
      emission.token_BE,
      rows.length_B,
      jnp.maximum(kept_B - 1, 0)[:, None],
      attention,
      wanted,
    )
  return emission, memory, following, new_B


def _extend(
  model: DeepSeekV32,
  variables: dict,
  memory: Memory,
  rows: Rows,
  tokens_BT: Array,
  attention: AttentionMode,
) -> Any:
  return model.apply(
    variables,
    tokens_BT,
    attention=attention,
    compute_logits=False,
    caches=memory.caches,
    cache_length_B=rows.length_B,
    pages_BN=rows.pages_BN,
  )


def _keys(rows: Rows) -> Array:
  return sampling.step_keys(sampling.request_keys(rows.seed_B), rows.count_B)


def _draw(
  rows: Rows, logits_B1V: Array, wanted: Wanted
) -> tuple[Emission, Array, Float[Array, 'B E V']]:
  """One token a row, with its key; rows that rest draw too, for nothing."""
  drawn = sampling.sample(
    logits_B1V[:, 0], _keys(rows), rows.params, most_kept=wanted.most_kept
  )
  emission = Emission(
    count_B=(rows.remaining_B > 0).astype(jnp.int32),
    token_BE=drawn.token_B[:, None],
    logprob_BE=drawn.logprob_B[:, None],
    sampling_logprob_BE=drawn.sampling_logprob_B[:, None],
  )
  return emission, drawn.token_B, drawn.target_BV[:, None]


def _verify(
  rows: Rows, logits_BEV: Array, memory: Memory, wanted: Wanted
) -> tuple[Emission, Array, Float[Array, 'B E V']]:
  """The drafted token if it is accepted, and one of the model's own."""
  target_BEV = sampling.target_logits(
    logits_BEV, rows.params, most_kept=wanted.most_kept
  )
  draft_B1 = memory.draft_token_B[:, None]
  verified = speculative.verify(
    target_BEV,
    memory.draft_BV[:, None],
    draft_B1,
    _for_purpose(_keys(rows), _VERIFY),
  )
  own_B1 = verified.token_B[:, None]
  accepted_B = verified.num_accepted_B
  token_BE = jnp.concatenate(
    [jnp.where(accepted_B[:, None] > 0, draft_B1, own_B1), own_B1], axis=1
  )
  runs_B = (rows.remaining_B > 0).astype(jnp.int32)
  emission = Emission(
    count_B=(accepted_B + 1) * runs_B,
    token_BE=token_BE,
    logprob_BE=sampling.logprobs_of(logits_BEV, token_BE),
    sampling_logprob_BE=sampling.logprobs_of(target_BEV, token_BE),
    accepted_B=accepted_B * runs_B,
    drafted_B=runs_B,
  )
  return emission, verified.token_B, target_BEV


def _ended(emission: Emission, rows: Rows) -> tuple[Emission, Array]:
  """Cuts a step's tokens after a stop id, and counts what may still come."""
  is_stop_BE = jnp.any(
    emission.token_BE[:, :, None] == rows.stop_BY[:, None, :], axis=-1
  )
  number_BE = jnp.arange(emission.token_BE.shape[1])[None, :]
  count_B = jnp.minimum(emission.count_B, rows.remaining_B)
  is_stop_BE = is_stop_BE & (number_BE < count_B[:, None])
  stops_B = jnp.any(is_stop_BE, axis=1)
  count_B = jnp.where(
    stops_B, jnp.argmax(is_stop_BE, axis=1).astype(jnp.int32) + 1, count_B
  )
  remaining_B = jnp.where(stops_B, 0, rows.remaining_B - count_B)
  return dataclasses.replace(emission, count_B=count_B), remaining_B


def _drafted(
  model: DeepSeekV32,
  variables: dict,
  memory: Memory,
  rows: Rows,
  hidden_BTD: Array,
  next_BT: Array,
  length_B: Array,
  last_B1: Array,
  attention: AttentionMode,
  wanted: Wanted,
) -> Memory:
  """Runs the MTP module over new tokens and drafts the one after the next."""
  cfg, params = model.cfg, variables['params']
  context = attention_context(
    next_BT, cache_length_B=length_B, pages_BN=rows.pages_BN
  )
  own = {name: tree['mtp'] for name, tree in variables.items() if 'mtp' in tree}
  hidden_BTD, aux = MultiTokenPrediction(cfg, attention).apply(
    own,
    hidden_BTD,
    embeddings_of(cfg, params, next_BT),
    context,
    memory.draft_cache,
  )
  logits_B1V = logits_of(cfg, params, _at(hidden_BTD, last_B1))
  draft_BV = sampling.target_logits(
    logits_B1V, rows.params, most_kept=wanted.most_kept
  )[:, 0]
  token_B = sampling.draw(draft_BV, _for_purpose(_keys(rows), _DRAFT))

  def put(old_B: Array, new_B: Array) -> Array:
    return old_B.at[rows.place_B].set(new_B.astype(old_B.dtype), mode='drop')

  return dataclasses.replace(
    memory,
    draft_cache=aux.attention.cache,
    draft_token_B=put(memory.draft_token_B, token_B),
    draft_BV=put(memory.draft_BV, draft_BV),
  )


def _with_wanted(
  emission: Emission,
  wanted: Wanted,
  logits_BEV: Array,
  target_BEV: Array,
  output: Any,
) -> Emission:
  """Adds what was asked for."""
  extra = {}
  if wanted.top:
    logprobs_BEV = jax.nn.log_softmax(logits_BEV.astype(jnp.float32), axis=-1)
    extra['top_logprob_BEM'], extra['top_token_BEM'] = jax.lax.top_k(
      logprobs_BEV, wanted.top
    )
  if wanted.kept and wanted.most_kept:
    extra['kept_BEM'] = sampling.most_likely_ids(target_BEV, wanted.most_kept)
  elif wanted.kept:
    extra['kept_BEV8'] = jnp.packbits(target_BEV > -jnp.inf, axis=-1)
  if wanted.experts and output.expert_index_LBTA is not None:
    extra['expert_LBTA'] = output.expert_index_LBTA
  if wanted.selected and output.selected_LBTK is not None:
    extra['selected_LBTK'] = output.selected_LBTK
  return dataclasses.replace(emission, **extra)


def _for_purpose(key_B: Array, purpose: int) -> Array:
  return jax.vmap(jax.random.fold_in, in_axes=(0, None))(key_B, purpose)


def _at(x_BTD: Array, at_B1: Array) -> Array:
  return jnp.take_along_axis(x_BTD, at_B1[:, :, None], axis=1)


def _put(x_BT: Array, at_B1: Array, value_B: Array) -> Array:
  number_BT = jnp.arange(x_BT.shape[1])[None, :]
  return jnp.where(number_BT == at_B1, value_B[:, None], x_BT)


def init_memory(
  cfg: ModelConfig,
  *,
  places: int,
  caches: tuple[LatentCache, ...],
  draft_cache: LatentCache | None,
) -> Memory:
  """The memory of an engine in which nothing has happened."""
  if draft_cache is None:
    return Memory(caches=caches)
  return Memory(
    caches=caches,
    draft_cache=draft_cache,
    draft_token_B=jnp.zeros((places,), jnp.int32),
    draft_BV=jnp.zeros((places, cfg.vocab_size), jnp.float32),
  )
