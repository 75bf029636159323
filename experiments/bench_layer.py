"""One DSA attention layer's train step, sparse against dense, by length.

  python experiments/bench_layer.py --lengths=32768,131072      # one GPU
  python experiments/bench_layer.py --preset=tiny --lengths=1024,4096

A step is the layer's forward and backward pass from its normed input to its
output projection: MLA's projections, the indexer, selection, attention and, in
the sparse case, the indexer's loss and its gradient. The dense case is the
same layer in MHA mode without an indexer loss. Both are rematerialised alike:
the layer's input is kept and everything else made again.

Each mode and length runs in a process of its own (but for --in_process): a
step may need most of the device in one piece, which memory that another step
has used no longer is.

Printed for each length: milliseconds a step (median), the largest device
memory in use where the backend tells, and sparse over dense.
"""

import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import linen as nn

from dsv32_jax import DENSE, SPARSE_TRAINING, presets
from dsv32_jax.functional import masking
from dsv32_jax.modules import dsa, remat

_PRESET = flags.DEFINE_string(
  'preset', 'deepseek_v32_671b', 'Model whose layer it is.'
)
_LENGTHS = flags.DEFINE_list('lengths', ['32768', '131072'], 'Tokens of a row.')
_MODES = flags.DEFINE_list('modes', ['sparse', 'dense'], 'Which steps.')
_CHUNK = flags.DEFINE_integer('query_chunk', 4096, 'ModelConfig.query_chunk.')
_STEPS = flags.DEFINE_integer('steps', 5, 'Timed steps; the median is printed.')
_PARTS = flags.DEFINE_bool('forward', False, 'Time the forward pass alone too.')
_IN_PROCESS = flags.DEFINE_bool(
  'in_process', False, 'Run every mode and length in this process.'
)
_JSONL = flags.DEFINE_string('jsonl', None, 'Also append the figures here.')

_ATTENTION = {'sparse': SPARSE_TRAINING, 'dense': DENSE}


def _context(length):
  segment_ids_BT = jnp.ones((1, length), jnp.int32)
  start_BT, end_BT = masking.key_ranges(segment_ids_BT)
  return dsa.AttentionContext(
    positions_BT=end_BT - 1,
    key_start_BT=start_BT,
    key_end_BT=end_BT,
    row_weight_BT=jnp.full((1, length), 1.0 / length),
  )


def _step(cfg, mode, length):
  """A compiled train step of the layer, its operands, its forward pass."""
  layer = dsa.DeepSeekSparseAttention(cfg, _ATTENTION[mode])
  dtype = jnp.dtype(cfg.precision.compute)

  @jax.jit
  def make(key):
    keys = jax.random.split(key, 3)
    x_BTD = jax.random.normal(keys[0], (1, length, cfg.hidden_size), dtype)
    d_BTD = jax.random.normal(keys[1], (1, length, cfg.hidden_size), dtype)
    variables = layer.init(keys[2], x_BTD[:, :128], _context(128))
    return nn.meta.unbox(variables['params']), x_BTD, d_BTD

  context = _context(length)

  def forward(params, x_BTD, context):
    u_BTD, aux = layer.apply({'params': params}, x_BTD, context)
    return u_BTD, aux.indexer_kl

  def loss(params, x_BTD, d_BTD, context):
    again = jax.checkpoint(forward, policy=remat.policy('full'))
    u_BTD, indexer_kl = again(params, x_BTD, context)
    return jnp.sum(u_BTD.astype(jnp.float32) * d_BTD) / length + indexer_kl

  operands = (*make(jax.random.key(0)), context)
  step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
  ahead = jax.jit(forward).lower(operands[0], operands[1], context).compile()
  return step.lower(*operands).compile(), operands, ahead


def _time(function, *operands):
  """Median milliseconds, and whether every output is finite."""
  result = jax.block_until_ready(function(*operands))
  finite = all(
    bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(result)
  )
  del result
  times = []
  for _ in range(_STEPS.value):
    started = time.perf_counter()
    jax.block_until_ready(function(*operands))
    times.append(1e3 * (time.perf_counter() - started))
  return statistics.median(times), finite


def _measure(mode, length):
  cfg = dataclasses.replace(
    presets.get(_PRESET.value),
    query_chunk=_CHUNK.value,
    remat='full',
    max_position_embeddings=max(
      length, presets.get(_PRESET.value).max_position_embeddings
    ),
  )
  started = time.perf_counter()
  step, operands, ahead = _step(cfg, mode, length)
  compile_s = time.perf_counter() - started
  milliseconds, finite = _time(step, *operands)
  analysis = step.memory_analysis()
  figures = {
    'preset': _PRESET.value,
    'mode': mode,
    'length': length,
    'ms': milliseconds,
    'finite': finite,
    'compile_s': compile_s,
    'temporary_gib': analysis.temp_size_in_bytes / 2**30 if analysis else None,
    'device': jax.devices()[0].device_kind,
    'jax': jax.__version__,
  }
  statistics_of_device = jax.devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in statistics_of_device:
    figures['peak_gib'] = statistics_of_device['peak_bytes_in_use'] / 2**30
  if _PARTS.value:
    figures['forward_ms'], _ = _time(ahead, *operands[:2], operands[3])
  return figures


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {argv[1:]}')
  unknown = set(_MODES.value) - set(_ATTENTION)
  if unknown:
    raise app.UsageError(
      f'--modes: got {sorted(unknown)}, expected {sorted(_ATTENTION)}'
    )
  for length in map(int, _LENGTHS.value):
    times: dict[str, float] = {}
    for mode in _MODES.value:
      if _IN_PROCESS.value:
        figures = _figures(mode, length)
      else:
        figures = _figures_of_a_process(mode, length)
      if 'error' in figures:
        print(f'{mode:7s} {length:7d} failed: {figures["error"]}', flush=True)
      else:
        times[mode] = float(figures['ms'])
        print(
          ' '.join(
            f'{name} {value:.2f}' if isinstance(value, float) else f'{value}'
            for name, value in figures.items()
          ),
          flush=True,
        )
      if _JSONL.value:
        with open(_JSONL.value, 'a', encoding='utf-8') as file:
          file.write(json.dumps(figures) + '\n')
    if {'sparse', 'dense'} <= set(times):
      ratio = times['sparse'] / times['dense']
      print(f'        {length:7d} sparse / dense {ratio:.2f}', flush=True)


def _figures(mode, length):
  """What was measured, or the error."""
  try:
    return _measure(mode, length)
  except jax.errors.JaxRuntimeError as error:
    # Out of memory is a result here: the other mode may still fit.
    return {'mode': mode, 'length': length, 'error': str(error)[:300]}


def _figures_of_a_process(mode, length):
  """The same, from a process that measures nothing else."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'figures.jsonl'
    done = subprocess.run(
      (
        *(sys.executable, __file__, '--in_process'),
        *(f'--modes={mode}', f'--lengths={length}', f'--jsonl={path}'),
        *(f'--preset={_PRESET.value}', f'--query_chunk={_CHUNK.value}'),
        *(f'--steps={_STEPS.value}', f'--forward={_PARTS.value}'),
      ),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
      check=False,
    )
    if path.exists():
      return json.loads(path.read_text(encoding='utf-8'))
  complaint = done.stderr.strip().splitlines()[-1:] or ['no message']
  error = f'ended with status {done.returncode}: {complaint[0][:300]}'
  return {'mode': mode, 'length': length, 'error': error}


if __name__ == '__main__':
  app.run(main)
