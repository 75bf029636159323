r"""Attention blocks as a server runs them, sparse against dense, on one GPU.

A few blocks of the model's own attention, projections and norms included, over
caches that are full already: decoding reads one token a request, prefill a
prompt. Sparse decoding reads pages of latents and of (fp8) indexer keys; dense
decoding is MQA over the latents in one piece, dense prefill MHA. The two modes
take turns in one process, over the same memory.

  python experiments/bench_attention_blocks.py                  # one H100
  python experiments/bench_attention_blocks.py --phases=decode --profile
  python experiments/bench_attention_blocks.py --preset=tiny --context=256 \
    --batch=2 --index_format=compute --rounds=2

Printed for each phase: milliseconds of all blocks (median of the rounds), the
floor (each part's products and bytes at the rates of a matrix product and of a
copy in the same process), what fraction of the time that is, and dense over
sparse. --profile adds the longest kernels of a call, by name.
"""

import dataclasses
import json

import jax
from absl import app, flags

from dsv32_jax import presets
from dsv32_jax.evaluation import serving_cost
from pallas_kernels.benchmarks import measure

_PRESET = flags.DEFINE_string(
  'preset', 'deepseek_v32_671b', 'Model whose attention it is.'
)
_LAYERS = flags.DEFINE_integer('layers', 4, 'Attention blocks.')
_CONTEXT = flags.DEFINE_integer('context', 131072, 'Tokens of a request.')
_BATCH = flags.DEFINE_integer('batch', 16, 'Requests decoded together.')
_PHASES = flags.DEFINE_list('phases', ['decode', 'prefill'], 'What to measure.')
_MODES = flags.DEFINE_list('modes', list(serving_cost.MODES), 'Which modes.')
_INDEX = flags.DEFINE_enum(
  'index_format', 'fp8', ['fp8', 'compute'], 'Cached indexer keys.'
)
_CHUNK = flags.DEFINE_integer('query_chunk', 4096, 'ModelConfig.query_chunk.')
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Rounds; the median is printed.')
_CALLS = flags.DEFINE_integer('calls', 20, 'Calls of decoding in a round.')
_PROFILE = flags.DEFINE_bool('profile', False, 'Also print the kernels.')
_JSONL = flags.DEFINE_string('jsonl', None, 'Also append the figures here.')

_KERNELS = 14
_NAME = 72


def _workload(cfg, phase):
  decodes = phase == 'decode'
  return serving_cost.Workload(
    cfg=cfg,
    layers=_LAYERS.value,
    batch=_BATCH.value if decodes else 1,
    cached=_CONTEXT.value - 1 if decodes else 0,
    new=1 if decodes else _CONTEXT.value,
    index_format=_INDEX.value,
  )


def _measure(cfg, phase, ceilings):
  work = _workload(cfg, phase)
  operands = serving_cost.make(work)
  programs = {
    mode: serving_cost.Program.build(work, mode, operands)
    for mode in _MODES.value
  }
  timings, operands = serving_cost.alternate(
    programs,
    operands,
    rounds=_ROUNDS.value,
    calls=_CALLS.value if phase == 'decode' else 1,
  )
  for mode, timing in timings.items():
    parts = {
      name: 1e3 * work.layers * ceilings.seconds(cost)
      for name, cost in serving_cost.block_costs(work, mode).items()
    }
    figures = {
      'phase': phase,
      'mode': mode,
      'preset': _PRESET.value,
      'layers': work.layers,
      'context': _CONTEXT.value,
      'batch': work.batch,
      'index_format': work.index_format,
      'ms': 1e3 * timing.seconds,
      'rounds_ms': [1e3 * x for x in timing.rounds],
      'floor_ms': sum(parts.values()),
      'of_floor': sum(parts.values()) / (1e3 * timing.seconds),
      'floors_ms': parts,
      'finite': timing.finite,
      'device': jax.devices()[0].device_kind,
      'jax': jax.__version__,
    }
    floors = ', '.join(f'{name} {ms:.3f}' for name, ms in parts.items())
    print(
      f'{phase:8s} {mode:7s} {figures["ms"]:10.3f} ms, floor '
      f'{figures["floor_ms"]:.3f} ms ({floors}), {figures["of_floor"]:.2f} of '
      f'the time, finite {timing.finite}',
      flush=True,
    )
    if _PROFILE.value:
      operands, kernels = _profile(programs[mode], operands)
      figures['kernels_ms'] = kernels
    _save(figures)
  if set(timings) == set(serving_cost.MODES):
    ratio = timings['dense'].seconds / timings['sparse'].seconds
    print(f'{phase:8s} dense / sparse {ratio:.2f}', flush=True)
    _save({'phase': phase, 'dense_over_sparse': ratio})


def _profile(program, operands):
  kept = [operands]

  def call():
    h_BTD, kept[0] = program.calls(kept[0], 1)
    return h_BTD

  kernels = {
    name[:_NAME]: 1e3 * seconds
    for name, seconds in serving_cost.kernel_seconds(call).items()
  }
  longest = list(kernels.items())[:_KERNELS]
  for name, ms in longest:
    print(f'    {ms:9.4f} ms  {name}')
  rest = sum(kernels.values()) - sum(ms for _, ms in longest)
  print(f'    {rest:9.4f} ms  {len(kernels) - len(longest)} others', flush=True)
  return kept[0], kernels


def _save(figures):
  if _JSONL.value:
    with open(_JSONL.value, 'a', encoding='utf-8') as file:
      file.write(json.dumps(figures) + '\n')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  for flag, known in (
    (_PHASES, ('decode', 'prefill')),
    (_MODES, serving_cost.MODES),
  ):
    unknown = sorted(set(flag.value) - set(known))
    if unknown:
      raise app.UsageError(f'--{flag.name}: got {unknown}, expected {known}')
  preset = presets.get(_PRESET.value)
  cfg = dataclasses.replace(
    preset,
    query_chunk=_CHUNK.value,
    max_position_embeddings=max(_CONTEXT.value, preset.max_position_embeddings),
  )
  ceilings = measure.ceilings()
  print(
    f'{jax.devices()[0].device_kind}: matrix product '
    f'{1e-12 * ceilings.flops:.0f} TFLOP/s ({ceilings.dtype}), copy '
    f'{1e-12 * ceilings.bytes:.2f} TB/s; {_LAYERS.value} blocks of '
    f'{_PRESET.value}, {_CONTEXT.value} tokens',
    flush=True,
  )
  for phase in _PHASES.value:
    _measure(cfg, phase, ceilings)


if __name__ == '__main__':
  app.run(main)
