r"""Time per decoded token against the number of cached tokens.

Decoding a token scores every cached indexer key but attends to index_topk rows
only, so the sparse time must grow far slower than the cache. The contexts are
measured in turn, round after round, so that another load on the machine falls
on all of them.

  python experiments/bench_decode.py
  python experiments/bench_decode.py --contexts=1024,4096,16384 \
    --attention=sparse --jsonl=decode.jsonl
"""

import json
import statistics
import time

import jax
import numpy as np
from absl import app, flags

from dsv32_jax import DENSE, SPARSE, DeepSeekV32, inference, presets
from dsv32_jax.training.state import init_variables

_PRESET = flags.DEFINE_string('preset', 'tiny', 'Model size.')
_CONTEXTS = flags.DEFINE_list(
  'contexts', ['1024', '16384'], 'Cached tokens to measure at.'
)
_ATTENTION = flags.DEFINE_list(
  'attention', ['sparse', 'dense'], 'Attention modes to measure.'
)
_BATCH = flags.DEFINE_integer('batch', 1, 'Requests decoded together.')
_TOKENS = flags.DEFINE_integer('tokens', 32, 'Tokens decoded a round.')
_ROUNDS = flags.DEFINE_integer('rounds', 9, 'Rounds; the median is printed.')
_SHARED_CAPACITY = flags.DEFINE_bool(
  'shared_capacity',
  False,
  'Give every context the capacity of the largest, instead of its own.',
)
_JSONL = flags.DEFINE_string('jsonl', None, 'Also append the figures here.')

_MODES = {'sparse': SPARSE, 'dense': DENSE}


def _prefilled(model, variables, *, context: int, capacity: int):
  """A state with `context` cached tokens, and the logits after them."""
  tokens_BT = np.random.default_rng(0).integers(
    model.cfg.vocab_size, size=(_BATCH.value, context), dtype=np.int32
  )
  state = inference.init_state(model.cfg, batch=_BATCH.value, capacity=capacity)
  return inference.prefill(model, variables, state, tokens_BT)


def main(argv):
  del argv
  contexts = [int(context) for context in _CONTEXTS.value]
  modes = {name: _MODES[name] for name in _ATTENTION.value}
  model = DeepSeekV32(presets.get(_PRESET.value))
  model, variables = inference.unroll(
    model, init_variables(model, jax.random.key(0))
  )
  tokens = _TOKENS.value
  # Warm-up runs and every round append to the cache.
  extra = tokens * (_ROUNDS.value + 1) * len(modes)
  runs = {}
  for context in contexts:
    top = max(contexts) if _SHARED_CAPACITY.value else context
    runs[context] = _prefilled(
      model, variables, context=context, capacity=top + extra
    )
  times = {(name, context): [] for name in modes for context in contexts}
  for round_index in range(_ROUNDS.value + 1):
    for (name, context), seconds in times.items():
      logits_BV, state = runs[context]
      begin = time.perf_counter()
      *_, state = jax.block_until_ready(
        inference.decode(
          model,
          variables,
          state,
          logits_BV,
          np.zeros((_BATCH.value,), np.uint32),
          np.array([-1], np.int32),
          num_tokens=tokens,
          attention=modes[name],
        )
      )
      if round_index:  # The first one compiles.
        # The last token drawn has not been through the model.
        seconds.append((time.perf_counter() - begin) / (tokens - 1))
      runs[context] = logits_BV, state
  for name in modes:
    base = None
    for context in contexts:
      median = statistics.median(times[name, context])
      best = min(times[name, context])
      base = base or median
      figures = {
        'preset': _PRESET.value,
        'attention': name,
        'batch': _BATCH.value,
        'cached_tokens': context,
        'ms_per_token': 1e3 * median,
        'best_ms_per_token': 1e3 * best,
        'ratio_to_first': median / base,
      }
      print(
        f'{name:7s} {context:7d} cached  {1e3 * median:8.3f} ms/token'
        f'  (best {1e3 * best:.3f})  {median / base:5.2f}x of {contexts[0]}'
      )
      if _JSONL.value:
        with open(_JSONL.value, 'a', encoding='utf-8') as file:
          file.write(json.dumps(figures) + '\n')


if __name__ == '__main__':
  app.run(main)
