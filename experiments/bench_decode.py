r"""Time per decoded token against the number of cached tokens.

Decoding a token scores every cached indexer key but attends to index_topk rows
only, so the sparse time must grow far slower than the cache. Two times are
measured: `step` is one call of `inference.decode_step` and the choice of the
token by the caller, as in a server; `loop` is `inference.decode`, which stays
on the device for many tokens. The contexts take turns, round after round, so
that another load on the machine falls on all of them.

  python experiments/bench_decode.py
  python experiments/bench_decode.py --contexts=1024,4096,16384 \
    --attention=sparse --jsonl=decode.jsonl
"""

import json
import statistics
import time

import jax
import jax.numpy as jnp
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
_TOKENS = flags.DEFINE_integer('tokens', 17, 'Tokens decoded a round.')
_ROUNDS = flags.DEFINE_integer('rounds', 15, 'Rounds; the median is printed.')
_JSONL = flags.DEFINE_string('jsonl', None, 'Also append the figures here.')

_MODES = {'sparse': SPARSE, 'dense': DENSE}


def _prefilled(model, variables, *, context, capacity):
  """Logits after `context` random tokens, and their caches."""
  tokens_BT = np.random.default_rng(0).integers(
    model.cfg.vocab_size, size=(_BATCH.value, context), dtype=np.int32
  )
  state = inference.init_state(model.cfg, batch=_BATCH.value, capacity=capacity)
  return inference.prefill(model, variables, state, tokens_BT)


def _by_step(model, variables, state, logits_BV, mode):
  for _ in range(_TOKENS.value - 1):
    tokens_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV, state = inference.decode_step(
      model, variables, state, tokens_B.block_until_ready(), attention=mode
    )
  return state


def _by_loop(model, variables, state, logits_BV, mode):
  *_, state = inference.decode(
    model,
    variables,
    state,
    logits_BV,
    np.zeros((_BATCH.value,), np.uint32),
    np.array([-1], np.int32),
    num_tokens=_TOKENS.value,
    attention=mode,
  )
  return state


def main(argv):
  del argv
  contexts = [int(context) for context in _CONTEXTS.value]
  model = DeepSeekV32(presets.get(_PRESET.value))
  model, variables = inference.unroll(
    model, init_variables(model, jax.random.key(0))
  )
  cases = [
    (name, driver, context)
    for name in _ATTENTION.value
    for driver in (_by_step, _by_loop)
    for context in contexts
  ]
  # Every round appends to the caches.
  extra = _TOKENS.value * (_ROUNDS.value + 1) * len(cases) // len(contexts)
  starts = {
    context: _prefilled(
      model, variables, context=context, capacity=context + extra
    )
    for context in contexts
  }
  times = {case: [] for case in cases}
  for round_index in range(_ROUNDS.value + 1):
    for name, driver, context in cases:
      logits_BV, state = starts[context]
      begin = time.perf_counter()
      state = jax.block_until_ready(
        driver(model, variables, state, logits_BV, _MODES[name])
      )
      if round_index:  # The first one compiles.
        # The last token drawn does not go through the model.
        seconds = (time.perf_counter() - begin) / (_TOKENS.value - 1)
        times[name, driver, context].append(seconds)
      starts[context] = logits_BV, state
  for name, driver, context in cases:
    seconds = times[name, driver, context]
    first = times[name, driver, contexts[0]]
    figures = {
      'preset': _PRESET.value,
      'attention': name,
      'driver': driver.__name__[4:],
      'batch': _BATCH.value,
      'cached_tokens': context,
      'ms_per_token': 1e3 * statistics.median(seconds),
      'best_ms_per_token': 1e3 * min(seconds),
      'ratio': statistics.median(seconds) / statistics.median(first),
      'best_ratio': min(seconds) / min(first),
    }
    print(
      '{attention:7s} {driver:5s} {cached_tokens:7d} cached {ms_per_token:8.3f}'
      ' ms/token, {ratio:5.2f}x (best {best_ms_per_token:.3f}, '
      '{best_ratio:.2f}x)'.format(**figures)
    )
    if _JSONL.value:
      with open(_JSONL.value, 'a', encoding='utf-8') as file:
        file.write(json.dumps(figures) + '\n')


if __name__ == '__main__':
  app.run(main)
