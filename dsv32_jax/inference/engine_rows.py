"""What a call of the device is told of the requests in it."""

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from dsv32_jax.config.model import DENSE, AttentionMode, ModelConfig
from dsv32_jax.functional.latent_cache import NO_PAGE
from dsv32_jax.inference import rounds, sampling
from dsv32_jax.inference.active import Active, truncates
from dsv32_jax.inference.engine_config import EngineConfig
from dsv32_jax.inference.requests import MAX_TOP_LOGPROBS
from dsv32_jax.inference.sampling import GREEDY

_NO_TOKEN = -1


def rows(
  actives: Sequence[Active | None],
  may_draw: Sequence[bool],
  *,
  num_pages: int,
  places: int,
) -> rounds.Rows:
  """The rows of a call; one of None rests and has no page.

  Args:
    actives: the requests.
    may_draw: false for a prompt that goes on.
    num_pages: width of the table of pages.
    places: of the engine; numbers a row that is not in use.
  """
  B = len(actives)
  pages_BN = np.full((B, num_pages), NO_PAGE, np.int32)
  Y = max((len(a.request.stop_ids) for a in actives if a), default=0)
  Y = 1 << (max(Y, 1) - 1).bit_length()
  stop_BY = np.full((B, Y), _NO_TOKEN, np.int32)
  numbers = {
    name: np.zeros((B,), np.int32)
    for name in ('place', 'length', 'count', 'remaining')
  }
  seed_B = np.zeros((B,), np.uint32)
  samplings = [GREEDY] * B
  for row, active in enumerate(actives):
    numbers['place'][row] = places
    if active is None:
      continue
    numbers['place'][row] = active.place
    numbers['length'][row] = active.length
    numbers['count'][row] = len(active.tokens)
    if may_draw[row]:
      numbers['remaining'][row] = active.remaining
    pages = active.pages[:num_pages]
    pages_BN[row, : len(pages)] = pages
    stop_BY[row, : len(active.request.stop_ids)] = active.request.stop_ids
    seed_B[row] = active.request.seed
    samplings[row] = active.request.sampling
  return rounds.Rows(
    place_B=numbers['place'],
    pages_BN=pages_BN,
    length_B=numbers['length'],
    count_B=numbers['count'],
    remaining_B=numbers['remaining'],
    seed_B=seed_B,
    params=sampling.stack(samplings),
    stop_BY=stop_BY,
  )


def wanted(actives: Sequence[Active], vocab_size: int) -> rounds.Wanted:
  """What a call has to return beside tokens, for any of its requests."""
  requests = [active.request for active in actives]
  top = any(request.top_logprobs for request in requests)
  limits = [
    1 if request.sampling.temperature == 0 else request.sampling.top_k
    for request in requests
    if truncates(request.sampling)
  ]
  # With a bound there is less to sort, to send and to read than a vocabulary.
  bounds = [limit for limit in limits if limit is not None]
  most = 0
  if bounds and len(bounds) == len(limits):
    most = 1 << (max(bounds) - 1).bit_length()
  return rounds.Wanted(
    top=min(MAX_TOP_LOGPROBS, vocab_size) if top else 0,
    experts=any(request.record.experts for request in requests),
    kept=any(
      request.record.kept and truncates(request.sampling)
      for request in requests
    ),
    most_kept=most if most < vocab_size else 0,
    selected=any(request.record.selected for request in requests),
  )


def count(running: Sequence[Active], config: EngineConfig, groups: int) -> int:
  """Rows that decode steps of these requests are run with."""
  if not running:
    return config.max_batch
  sizes = collections.Counter(active.group for active in running)
  return _count_of(max(sizes.values()), config, groups)


def counts(config: EngineConfig, groups: int) -> list[int]:
  """Every number of rows that `count` gives, the largest first."""
  sizes = range(1, config.max_batch // groups + 1)
  return sorted({_count_of(n, config, groups) for n in sizes}, reverse=True)


def _count_of(size: int, config: EngineConfig, groups: int) -> int:
  """Rows for so many requests in the fullest group of devices."""
  most, least = config.max_batch, config.least_rows
  if least is None:
    return most
  return min(max(least, _few_sizes(size)) * groups, most)


def arrange(
  running: Sequence[Active], total: int, config: EngineConfig, groups: int
) -> list[Active | None]:
  """A row for each of `total`, among those of its group of devices."""
  in_rows: list[Active | None] = [None] * total
  if total == config.max_batch:
    # At their places, where the drafts of each are.
    for active in running:
      in_rows[active.place] = active
    return in_rows
  width = total // groups
  used: collections.Counter[int] = collections.Counter()
  for active in sorted(running, key=lambda a: a.place):
    in_rows[active.group * width + used[active.group]] = active
    used[active.group] += 1
  return in_rows


def attention(
  config: EngineConfig,
  cfg: ModelConfig,
  rows: rounds.Rows,
  wanted: rounds.Wanted,
  *,
  prefill: bool,
) -> AttentionMode:
  """The mode of a call; with at most k keys, all are selected: dense."""
  mode = config.attention
  num_keys = rows.pages_BN.shape[1] * config.page_size
  selects_all = mode.selector == 'indexer' and num_keys <= cfg.index_topk
  if selects_all and not wanted.selected:
    mode = dataclasses.replace(mode, selector=DENSE.selector)
  absorbed = mode.absorbed
  if absorbed is None:
    is_short = prefill and num_keys <= config.masked_prefill
    absorbed = not is_short if mode.is_sparse else not prefill
  record = wanted.experts or wanted.selected
  return dataclasses.replace(mode, absorbed=absorbed, record=record)


def _few_sizes(count: int) -> int:
  """The next power of two or, if that is enough, three quarters of it."""
  power = 1 << (count - 1).bit_length()
  smaller = power * 3 // 4
  return smaller if smaller >= count else power
