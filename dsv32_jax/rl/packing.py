"""Where responses stand in packed rows, and their records at those places.

Letters: B rows, T tokens, K most ids of a kept set or most selected keys, L
layers, A experts a token.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from dsv32_jax.config.model import ModelConfig
from dsv32_jax.rl.types import Response


@dataclasses.dataclass(frozen=True, kw_only=True)
class Places:
  """Where each of some documents stands.

  Attributes:
    num_rows: B.
    row_tokens: T.
    row: of each document.
    start: its first place in the row.
    size: its places.
    segment: its number in the row, from 1.
  """

  num_rows: int
  row_tokens: int
  row: tuple[int, ...]
  start: tuple[int, ...]
  size: tuple[int, ...]
  segment: tuple[int, ...]

  def of(self, number: int) -> tuple[int, slice]:
    """Index of a document's places in a [B, T, ...] array."""
    start = self.start[number]
    return self.row[number], slice(start, start + self.size[number])


def pack(
  sizes: Sequence[int],
  row_tokens: int,
  rows: int | None = None,
  row_multiple: int = 1,
) -> Places:
  """First fit, longest first.

  Args:
    sizes: of the documents.
    row_tokens: T.
    rows: B; None takes as few as are needed, rounded up to `row_multiple`.
    row_multiple: see `rows`.

  Raises:
    ValueError: a document that is longer than a row, or too few rows.
  """
  longest = max(range(len(sizes)), key=sizes.__getitem__)
  if sizes[longest] > row_tokens:
    raise ValueError(
      f'row_tokens: got {row_tokens} for response {longest} of '
      f'{sizes[longest] + 1} tokens, expected at least {sizes[longest]} (all '
      'but its last token are fed)'
    )
  free: list[int] = []
  count: list[int] = []
  row, start, segment = ([0] * len(sizes) for _ in range(3))
  for number in sorted(range(len(sizes)), key=lambda n: (-sizes[n], n)):
    size = sizes[number]
    fitting = (r for r, left in enumerate(free) if left >= size)
    found = next(fitting, len(free))
    if found == len(free):
      free.append(row_tokens)
      count.append(0)
    count[found] += 1
    row[number], start[number] = found, row_tokens - free[found]
    segment[number] = count[found]
    free[found] -= size
  num_rows = -(-len(free) // row_multiple) * row_multiple
  if rows is not None:
    if rows < len(free):
      raise ValueError(
        f'rows: got {rows} of {row_tokens} tokens, expected at least '
        f'{len(free)} for {len(sizes)} responses of {sum(sizes)} tokens in all'
      )
    num_rows = rows
  return Places(
    num_rows=num_rows,
    row_tokens=row_tokens,
    row=tuple(row),
    start=tuple(start),
    size=tuple(sizes),
    segment=tuple(segment),
  )


def kept_sets(
  responses: Sequence[Response],
  places: Places,
  *,
  cap: int | None,
  vocab_size: int,
) -> np.ndarray | None:
  """int32 [B, T, K] at the places whose targets were drawn from the sets.

  Args:
    responses: with their kept sets recorded, or without: nothing was truncated
      then, and all are over the whole vocabulary.
    places: of the responses.
    cap: K; None takes the largest set.
    vocab_size: ids are below it.

  Returns:
    The sets, filled up with -1; None if `cap` is None and no set is limited.

  Raises:
    ValueError: sets that are recorded for some responses only, or not at all
      though they have a cap; that are larger than K, or have an id outside the
      vocabulary.
  """
  missing = [n for n, response in enumerate(responses) if response.kept is None]
  if missing and (cap is not None or len(missing) < len(responses)):
    raise ValueError(
      f'kept: got none recorded for response {missing[0]}, expected the '
      'sampled sets (Record(kept=True)) with keep_sampling_mask and truncated '
      'draws'
    )
  if missing:
    return None
  largest, where = 0, 0
  for number, response in enumerate(responses):
    assert response.kept is not None
    sizes = [ids.size for ids in response.kept if ids is not None]
    if max(sizes, default=0) > largest:
      largest, where = max(sizes), number
  if cap is None and not largest:
    return None
  K = largest if cap is None else cap
  if largest > K:
    raise ValueError(
      f'kept_cap: got {K} for a set of {largest} ids in response {where}, '
      'expected at least as many; sample with a top_k that bounds the sets'
    )
  kept_BTK = np.full((places.num_rows, places.row_tokens, K), -1, np.int32)
  for number, response in enumerate(responses):
    assert response.kept is not None
    limited = [
      (n, ids) for n, ids in enumerate(response.kept) if ids is not None
    ]
    if not limited:
      continue
    at, sets = zip(*limited, strict=True)
    flat = np.concatenate(sets)
    _check_range('kept', number, flat, 0, vocab_size - 1)
    # The target of the place before a sampled token is that token.
    place = np.flatnonzero(response.is_policy[1:])[list(at)]
    size = np.array([ids.size for ids in sets])
    column = np.arange(flat.size) - np.repeat(np.cumsum(size) - size, size)
    kept_BTK[places.of(number)][np.repeat(place, size), column] = flat
  return kept_BTK


def experts(
  responses: Sequence[Response],
  places: Places,
  model: ModelConfig,
  *,
  needed: bool,
) -> np.ndarray | None:
  """int [B, T, L, A] of every token that is fed; -1 in padding.

  Raises:
    ValueError: records that are needed and missing, or do not fit the model.
  """
  if not model.num_moe_layers or not _all_have(
    'experts', 'keep_routing', responses, needed
  ):
    return None
  L, A, E = (
    model.num_moe_layers,
    model.num_experts_per_tok,
    model.n_routed_experts,
  )
  shape = (places.num_rows, places.row_tokens, L, A)
  packed = np.full(shape, -1, _narrow(E))
  for number, response in enumerate(responses):
    record = response.experts
    assert record is not None
    if record.shape[1:] != (L, A):
      raise ValueError(
        f'experts: got a record of {record.shape[1]} layers with '
        f'{record.shape[2]} experts a token for response {number}, expected '
        f'{L} and {A}: every layer with experts replays its own'
      )
    # A token whose experts are not known cannot replay them.
    _check_range('experts', number, record, 0 if needed else -1, E - 1)
    packed[places.of(number)] = record
  return packed


def selections(
  responses: Sequence[Response],
  places: Places,
  model: ModelConfig,
  *,
  needed: bool,
) -> np.ndarray | None:
  """int [B, T, L, K] of every token that is fed, as places in the row.

  K is min(index_topk, T), as many as the model selects in such rows.

  Raises:
    ValueError: records that are needed and missing, do not fit the model, or
      name keys that a token cannot see.
  """
  if model.q_lora_rank is None or not _all_have(
    'selected', 'keep_selection', responses, needed
  ):
    return None
  L, T = model.num_hidden_layers, places.row_tokens
  K = min(model.index_topk, T)
  packed = np.full((places.num_rows, T, L, K), -1, _narrow(T))
  for number, response in enumerate(responses):
    record = response.selected
    assert record is not None
    if record.shape[1] != L:
      raise ValueError(
        f'selected: got a record of {record.shape[1]} layers for response '
        f'{number}, expected {L}'
      )
    own = np.arange(record.shape[0])[:, None, None]
    if np.any(record > own) or np.any(record < -1):
      raise ValueError(
        f'selected: got a key after its query, or below -1, in response '
        f'{number}, expected positions from 0 to the own one'
      )
    if needed and not np.all(np.any(record >= 0, axis=-1)):
      raise ValueError(
        f'selected: got no key for a token of response {number}, expected at '
        'least one for each that is fed'
      )
    width = min(record.shape[2], K)
    if record.shape[2] > K:
      # The members first, in their order.
      first = np.argsort(record < 0, axis=-1, kind='stable')
      record = np.take_along_axis(record, first, axis=-1)
      if np.any(record[:, :, K:] >= 0):
        raise ValueError(
          f'selected: got more than {K} keys of a token in response {number}, '
          f'expected at most index_topk {model.index_topk}'
        )
    row, place = places.of(number)
    record = record[:, :, :width]
    moved = np.where(record >= 0, record + place.start, -1)
    packed[row, place, :, :width] = moved
  return packed


def _all_have(
  name: str, switch: str, responses: Sequence[Response], needed: bool
) -> bool:
  missing = [
    number
    for number, response in enumerate(responses)
    if getattr(response, name) is None
  ]
  if missing and needed:
    raise ValueError(
      f'{name}: got none recorded for response {missing[0]}, expected them '
      f'(Record({name}=True)) with {switch}'
    )
  return not missing


def _check_range(
  name: str, number: int, values: np.ndarray, low: int, high: int
) -> None:
  if values.size and (values.min() < low or values.max() > high):
    raise ValueError(
      f'{name}: got ids from {values.min()} to {values.max()} in response '
      f'{number}, expected {low} to {high}'
    )


def _narrow(count: int) -> type:
  """The least type for -1 .. count."""
  return np.int16 if count < 2**15 else np.int32
