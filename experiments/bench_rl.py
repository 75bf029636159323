r"""One rollout batch and one optimizer step on it: time, bytes, utilisation.

Responses are drawn by the engine with what training replays (experts, kept
sets), as long as a random draw says, since random weights end none; then they
are packed, scored by the reference, and trained on. Both parts run once to
compile and once for the figures. The floor of a decode step is the time to read
the weights and all cached rows once.

  python experiments/bench_rl.py --preset=tiny --samples=16 --max_tokens=128
  python experiments/bench_rl.py --jsonl=rl.jsonl     (one H100, `small`)
"""

import concurrent.futures
import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags

from dsv32_jax import DeepSeekV32, inference, presets
from dsv32_jax.config.model import Precision
from dsv32_jax.config.rl import GRPOConfig
from dsv32_jax.config.training import OptimizerConfig
from dsv32_jax.evaluation import device_trace
from dsv32_jax.rl import batches, ledger
from dsv32_jax.rl import step as step_lib
from dsv32_jax.rl.types import Group, Response, Scored
from dsv32_jax.training import optimizer, state

_PRESET = flags.DEFINE_string('preset', 'small', 'Model size.')
_SAMPLES = flags.DEFINE_integer('samples', 512, 'Responses.')
_GROUP = flags.DEFINE_integer('group_size', 16, 'Responses a prompt.')
_MAX_TOKENS = flags.DEFINE_integer('max_tokens', 4096, 'Longest, with prompt.')
_PROMPT = flags.DEFINE_integer('prompt_tokens', 256, 'Of each prompt.')
_SHORTEST = flags.DEFINE_float(
  'shortest', 0.25, 'Shortest over longest answer.'
)
_TOP_P = flags.DEFINE_float('top_p', 0.95, 'Nucleus; with top_k 64.')
_ROWS = flags.DEFINE_integer('micro_rows', 2, 'Rows of a micro-batch.')
_WIDTH = flags.DEFINE_integer('row_widths', 2, 'Longest responses a row.')
_BATCH = flags.DEFINE_integer('max_batch', 0, 'Responses at a time; 0: all.')
_LEAST = flags.DEFINE_integer('least_rows', 128, 'Rows at the end; 0: all.')
_STEPS = flags.DEFINE_integer('decode_steps', 32, 'Steps between host looks.')
_THREADS = flags.DEFINE_integer('threads', 4, 'Programs compiled at a time.')
_REMAT = flags.DEFINE_string('remat', 'save_attention', "The trainer's.")
_CHUNK = flags.DEFINE_integer('query_chunk', 0, "The trainer's.")
_SHARE = flags.DEFINE_float(
  'train_share', 1.0, 'Of the responses, in the step that is timed.'
)
_BANDWIDTH = flags.DEFINE_float('bandwidth', 3.35e12, 'Bytes a second.')
_FLOPS = flags.DEFINE_float('flops', 989e12, 'FLOPs a second, bfloat16.')
_PROFILE = flags.DEFINE_string(
  'profile', None, 'Roll out once more, for a profile of a few calls, here.'
)
_JSONL = flags.DEFINE_string('jsonl', None, 'Also append the figures here.')

GRPO = GRPOConfig(keep_selection=False)
RECORD = inference.Record(experts=True, kept=True)


def _requests(vocab_size, seed):
  generator = np.random.default_rng(seed)
  most = _answer()
  sampling = inference.Sampling(top_p=_TOP_P.value, top_k=64)
  found, prompt = [], []
  for number in range(_SAMPLES.value):
    if number % _GROUP.value == 0:
      prompt = generator.integers(2, vocab_size, _PROMPT.value).tolist()
    least = max(int(_SHORTEST.value * most), 1)
    found.append(
      inference.Request(
        prompt=tuple(prompt),
        max_new_tokens=int(generator.integers(least, most + 1)),
        sampling=sampling,
        seed=number,
        record=RECORD,
      )
    )
  return found


def _few_steps(requests):
  """The same, each over after a call or two: runs what is compiled once."""
  return [
    dataclasses.replace(
      request, max_new_tokens=min(2 + _STEPS.value * (n % 2), _answer())
    )
    for n, request in enumerate(requests)
  ]


def _answer():
  return _MAX_TOKENS.value - _PROMPT.value


def _roll_out(engine, requests):
  before, began = engine.stats(), time.perf_counter()
  tickets = [engine.submit(request) for request in requests]
  engine.run()
  seconds = time.perf_counter() - began
  completions = [ticket.result() for ticket in tickets]
  after = engine.stats()
  names = ('prefill_s', 'decode_s', 'decode_calls', 'new_tokens')
  spent = {n: getattr(after, n) - getattr(before, n) for n in names}
  return completions, spent | {'seconds': seconds}


def _profile(engine, requests, directory):
  """Kernels of eight decode calls in the middle of a rollout, by time."""
  for request in requests:
    engine.submit(request)
  first = engine.stats().decode_calls

  def run(steps):
    while engine.stats().decode_calls < first + steps and engine.step():
      pass

  middle = _answer() // 2
  run(middle)
  with jax.profiler.trace(directory):
    run(middle + 8 * _STEPS.value)
  running = engine.stats().running
  engine.close()
  found = device_trace.kernel_seconds(pathlib.Path(directory))
  print(
    f'{running} responses, 8 x {_STEPS.value} steps:'
    f' {1e3 * found["span"]:.1f} ms, of which a kernel ran'
    f' {1e3 * found["busy"]:.1f}'
  )
  for name, count, seconds in found['kernels'][:60]:
    print(f'{1e3 * seconds:9.2f} ms {count:7d} x  {name[:120]}')


def _rollout_figures(cfg, weight_bytes, completions, spent):
  size = np.dtype(jax.numpy.dtype(cfg.precision.compute)).itemsize
  row = cfg.latent_dim + cfg.index_head_dim
  row_bytes = size * cfg.num_hidden_layers * row
  # The n-th new token reads the prompt and the n - 1 before it; the first one
  # comes with the prompt.
  cached = sum(
    sum(range(len(c.prompt) + 1, len(c.prompt) + len(c.tokens)))
    for c in completions
  )
  floor = spent['decode_calls'] * weight_bytes + cached * row_bytes
  floor_s = floor / _BANDWIDTH.value
  per_step = 1e3 * spent['decode_s'] / spent['decode_calls']
  return {
    'rollout/samples_per_s': len(completions) / spent['seconds'],
    'rollout/new_tokens_per_s': spent['new_tokens'] / spent['seconds'],
    'rollout/seconds': spent['seconds'],
    'rollout/prefill_s': spent['prefill_s'],
    'rollout/decode_s': spent['decode_s'],
    'rollout/decode_ms_per_step': per_step,
    'rollout/decode_steps': spent['decode_calls'],
    'rollout/decode_floor_s': floor_s,
    'rollout/decode_fraction_of_floor': floor_s / spent['decode_s'],
  }


def _samples(completions):
  generator = np.random.default_rng(1)
  groups = [
    Group(
      problem=str(first),
      domain='mathematics',
      mode='chat',
      responses=tuple(
        Scored(
          response=Response.from_completion(completion),
          reward=float(generator.integers(0, 2)),
        )
        for completion in completions[first : first + _GROUP.value]
      ),
    )
    for first in range(0, len(completions), _GROUP.value)
  ]
  return batches.samples(groups, GRPO)


class _Trainer:
  """The reference's scores and the step, compiled for a number of rows."""

  def __init__(self, cfg, variables, rows):
    self.cfg = cfg
    self.rows = rows
    self._model = DeepSeekV32(cfg)
    stage = step_lib.rl_stage(GRPO, cfg)
    small = OptimizerConfig(peak_learning_rate=1e-6)
    tx = optimizer.for_groups({'main': small, 'indexer': small}, 100, stage)
    self.state = state.create(variables, stage, tx)
    self._step: Any = jax.jit(
      step_lib.make_rl_step(
        self._model,
        GRPO,
        tx,
        micro_batches=rows // _ROWS.value,
        logits_chunk=min(1024, _MAX_TOKENS.value),
      ),
      donate_argnums=0,
    )

  def batch(self, samples):
    batch = batches.make_batch(
      samples,
      model=self.cfg,
      grpo=GRPO,
      row_tokens=_WIDTH.value * _MAX_TOKENS.value,
      rows=self.rows,
      num_responses=_SAMPLES.value,
      kept_cap=64,
    )
    # Any numbers serve as the reference's.
    return dataclasses.replace(batch, ref_logprob_BT=batch.sampling_logprob_BT)

  def compile(self, batch):
    self._step = self._step.lower(self.state, batch).compile()

  def step(self, batch):
    began = time.perf_counter()
    self.state, metrics = self._step(self.state, batch)
    metrics = jax.device_get(metrics)
    return time.perf_counter() - began, metrics


def _any_batch(trainer):
  """A batch of one short response: what it compiles is for all."""
  cfg = trainer.cfg
  response = Response(
    tokens=np.arange(4),
    is_policy=np.arange(4) > 1,
    sampling_logprobs=np.zeros(4),
    finish_reason='length',
    kept=(None, None),
    experts=np.zeros(
      (3, cfg.num_moe_layers, cfg.num_experts_per_tok), np.int32
    ),
  )
  scored = Scored(response=response, reward=1.0)
  group = Group(
    problem='', domain='mathematics', mode='chat', responses=(scored, scored)
  )
  return trainer.batch(batches.samples([group], GRPO))


def main(argv):
  del argv
  changes: dict[str, Any] = {
    'remat': _REMAT.value,
    'query_chunk': _CHUNK.value,
    'max_position_embeddings': _MAX_TOKENS.value,
  }
  cfg = dataclasses.replace(presets.get(_PRESET.value), **changes)
  half = dataclasses.replace(
    cfg, precision=Precision(param='bfloat16', compute='bfloat16')
  )
  variables = state.init_variables(DeepSeekV32(cfg), jax.random.key(0))
  casted = jax.tree.map(lambda x: x.astype('bfloat16'), variables)
  weight_bytes = sum(x.nbytes for x in jax.tree.leaves(casted))
  engine = inference.Engine(
    DeepSeekV32(half),
    casted,
    inference.EngineConfig(
      max_batch=_BATCH.value or _SAMPLES.value,
      least_rows=_LEAST.value or None,
      max_waiting=_SAMPLES.value,
      max_tokens=_MAX_TOKENS.value,
      table_tokens=_MAX_TOKENS.value,
      prefill_rows=16,
      prefill_chunk=min(512, _PROMPT.value),
      fill_first=True,
      run_ahead=True,
      decode_steps=_STEPS.value,
    ),
  )
  del casted
  # A batch of the longest for the shapes.
  requests = _requests(cfg.vocab_size, 0)
  tokens = sum(len(r.prompt) + r.max_new_tokens - 1 for r in requests)
  count = max(int(len(requests) * _SHARE.value), 1)
  # Responses do not fill their rows quite.
  rows = int(1.2 * tokens * _SHARE.value / (_WIDTH.value * _MAX_TOKENS.value))
  rows = -(-max(rows, 1) // _ROWS.value) * _ROWS.value
  trainer = _Trainer(cfg, variables, rows)
  began = time.perf_counter()
  warm = _few_steps(_requests(cfg.vocab_size, 1))
  with concurrent.futures.ThreadPoolExecutor() as pool:
    compiled = pool.submit(trainer.compile, _any_batch(trainer))
    engine.compile_ahead(warm[0], threads=_THREADS.value)
    _roll_out(engine, warm)
    print(f'compiled rollouts: {time.perf_counter() - began:.0f} s', flush=True)
    compiled.result()
  print(f'compiled the step: {time.perf_counter() - began:.0f} s', flush=True)
  completions, spent = _roll_out(engine, requests)
  figures: dict[str, Any] = {
    'preset': _PRESET.value,
    'samples': len(completions),
  }
  figures |= _rollout_figures(half, weight_bytes, completions, spent)
  print(json.dumps(figures, indent=1), flush=True)
  if _PROFILE.value:
    _profile(engine, requests, _PROFILE.value)
  began = time.perf_counter()
  samples = _samples(completions)[:count]
  batch = trainer.batch(samples)
  figures['train/packing_s'] = time.perf_counter() - began
  batch = jax.device_put(batch)
  engine.release()
  trainer.step(batch)
  seconds, metrics = trainer.step(batch)
  lengths = [s.response.tokens.size - 1 for s in samples]
  model_flops = 3 * sum(ledger.forward_flops(cfg, n) for n in lengths)
  whole = seconds / _SHARE.value
  figures |= {
    'train/samples': len(samples),
    'train/tokens': sum(lengths),
    'train/rows': rows,
    'train/seconds': seconds,
    'train/samples_per_s': len(samples) / seconds,
    'train/tokens_per_s': sum(lengths) / seconds,
    'train/model_flops': model_flops,
    'train/utilisation': model_flops / seconds / _FLOPS.value,
    'share/rollout': spent['seconds'] / (spent['seconds'] + whole),
    'share/train': whole / (spent['seconds'] + whole),
    'metrics': {name: float(x) for name, x in metrics.items() if x.ndim == 0},
    'device': jax.devices()[0].device_kind,
  }
  print(json.dumps(figures, indent=1))
  if _JSONL.value:
    with open(_JSONL.value, 'a', encoding='utf-8') as file:
      file.write(json.dumps(figures) + '\n')


if __name__ == '__main__':
  app.run(main)
