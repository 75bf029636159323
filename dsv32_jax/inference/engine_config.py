"""What an engine is made with, and what it says of itself."""

import dataclasses

from dsv32_jax.config.model import SPARSE, AttentionMode
from dsv32_jax.functional.latent_cache import FORMATS


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
  """Sizes and switches of an engine.

  Attributes:
    max_batch: requests that run at a time.
    max_waiting: requests that may wait; one more is refused.
    page_size: tokens a page of the caches holds.
    num_pages: pages in all; None gives every place the longest request.
    max_tokens: most tokens of a request, prompt and new ones; None takes the
      model's max_position_embeddings.
    prefill_chunk: tokens of a prompt that are run at a time.
    prefill_rows: prompts that are run at a time (in each group of devices);
      more are faster where prompts are short and come together.
    fill_first: while prompts wait to be run, run no decode steps: batches are
      full, and those that have begun wait. For throughput, not for users.
    table_tokens: tokens that tables of pages have room for at least. Longer
      requests double it, with a program each; the longest request's length
      here means one program.
    decode_steps: steps between two looks of the host: more cost less overhead,
      and let new requests wait longer.
    run_ahead: begin the next decode steps before the last ones are read, so
      that the device does not wait for the host. Newcomers wait a little
      longer, and a stop string is noticed a call late.
    least_rows: when requests have ended, decode steps run so many rows at least
      (in each group of devices), from there on powers of two and three quarters
      of them, with a program for each; None always runs max_batch rows. For
      batches that end request by request, such as rollouts; not with
      speculation.
    latent_format: of cached latent rows: 'compute' or 'fp8' (656 bytes).
    index_format: of cached indexer keys: 'compute' or 'fp8'.
    speculative: draft a token a step with the MTP module.
    masked_prefill: prompts up to this length are run in MHA mode under a mask
      of the selected keys, longer ones in MQA mode over gathered rows; equal in
      exact arithmetic.
    attention: sparse or dense.
  """

  max_batch: int = 8
  max_waiting: int = 256
  page_size: int = 64
  num_pages: int | None = None
  max_tokens: int | None = None
  prefill_chunk: int = 512
  prefill_rows: int = 1
  fill_first: bool = False
  table_tokens: int = 512
  decode_steps: int = 4
  run_ahead: bool = False
  least_rows: int | None = None
  latent_format: str = 'compute'
  index_format: str = 'compute'
  speculative: bool = False
  masked_prefill: int = 0
  attention: AttentionMode = SPARSE

  def __post_init__(self):
    for name in (
      'max_batch page_size num_pages max_tokens prefill_chunk prefill_rows '
      'table_tokens decode_steps least_rows'
    ).split():
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f'{name}: got {value}, expected at least 1')
    for name in ('max_waiting', 'masked_prefill'):
      value = getattr(self, name)
      if value < 0:
        raise ValueError(f'{name}: got {value}, expected 0 or more')
    if self.least_rows and self.speculative:
      raise ValueError(
        f'least_rows: got {self.least_rows} with speculative, expected None: '
        'drafts are kept by row'
      )
    for name in ('latent_format', 'index_format'):
      value = getattr(self, name)
      if value not in FORMATS:
        raise ValueError(f'{name}: got {value!r}, expected one of {FORMATS}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineStats:
  """Counts since the engine was made, and what it holds now.

  Attributes:
    waiting: requests without a place.
    running: requests with one.
    free_pages: of `total_pages`.
    total_pages: of all groups.
    prompt_tokens: run through the model.
    new_tokens: given to requests.
    finished: requests that ended, by reason.
    steps: decode steps of the main model; of rows, so a batch of n counts n.
    decode_calls: decode steps of the whole batch.
    prefill_s: seconds spent on prompts, device and host.
    decode_s: seconds spent on decode steps, device and host.
    drafted: tokens the MTP module drafted for those steps.
    accepted: of these, tokens that stood.
  """

  waiting: int
  running: int
  free_pages: int
  total_pages: int
  prompt_tokens: int
  new_tokens: int
  finished: dict[str, int]
  steps: int
  decode_calls: int
  prefill_s: float
  decode_s: float
  drafted: int
  accepted: int
