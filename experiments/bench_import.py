r"""Measures the host memory that an import takes beyond its parameters.

  python experiments/bench_import.py --workdir=/tmp/bench_import
  python experiments/bench_import.py --workdir=/tmp/bench_import \
    --layout=published

`shards` writes a checkpoint of four shards of at least 512 MiB (2.3 GB on the
disk; --quantize=none for bfloat16), `published` the 163 shards of the published
layout at reduced width. Each is then imported by a process of its own, whose
peak resident memory (VmHWM of Linux) is compared with the bytes of the
parameters it made, which on a CPU are host memory too:

  shards     peak - parameters <= 1.2 x largest shard + 256 MiB
  published  peak <= 2 GiB

Exit status 1 if it is not so. Prints one JSON line; `baseline` is the same
process before it reads anything, Python and jax alone.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

from absl import flags

from dsv32_jax.checkpoints import synthetic
from dsv32_jax.checkpoints.transfer_progress import Display
from dsv32_jax.config import presets
from dsv32_jax.training import flags as run_flags

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where the checkpoints are made and kept.', required=True
)
_LAYOUT = flags.DEFINE_enum(
  'layout', 'shards', ['shards', 'published'], 'Which checkpoint.'
)
_QUANTIZE = flags.DEFINE_enum(
  'quantize', 'fp8', ['fp8', 'none'], 'Matrices of the checkpoint.'
)
_KEEP = flags.DEFINE_bool('keep', False, 'Keep the matrices quantised.')
_UNROLLED = flags.DEFINE_bool('unrolled', False, 'Import without stacks.')

_MIB = 2**20
_NUM_SHARDS = 4

# The measured process: this program's own imports would count in its peak.
_IMPORT = """
import json, sys, time
import jax
from dsv32_jax.checkpoints import load_hf

def peak():
  with open('/proc/self/status') as file:
    lines = dict(line.split(':', 1) for line in file)
  return int(lines['VmHWM'].split()[0]) * 1024

path, options = sys.argv[1], json.loads(sys.argv[2])
jax.devices()
before, begin = peak(), time.perf_counter()
_, variables = load_hf(path, **options)
seconds = time.perf_counter() - begin
print(json.dumps({
  'baseline_bytes': before,
  'peak_bytes': peak(),
  'parameter_bytes': sum(x.nbytes for x in jax.tree.leaves(variables)),
  'seconds': seconds,
}))
"""


def main(argv: list[str]) -> None:
  del argv
  quantize = 'fp8' if _QUANTIZE.value == 'fp8' else None
  path = pathlib.Path(_WORKDIR.value) / f'{_LAYOUT.value}_{_QUANTIZE.value}'
  if not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    with Display('write') as display:
      if _LAYOUT.value == 'published':
        synthetic.synthesize(path, quantize=quantize, progress=display)
      else:
        synthetic.synthesize(
          path,
          _four_shards(quantize is not None),
          num_shards=_NUM_SHARDS,
          quantize=quantize,
          progress=display,
        )
  sizes = [file.stat().st_size for file in path.glob('*.safetensors')]
  options = {
    'quantized': 'keep' if _KEEP.value else 'dequantize',
    'scan_layers': not _UNROLLED.value,
  }
  done = subprocess.run(
    (sys.executable, '-c', _IMPORT, str(path), json.dumps(options)),
    stdout=subprocess.PIPE,
    check=True,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
  )
  found = json.loads(done.stdout)
  beyond = found['peak_bytes'] - found['parameter_bytes']
  bound = int(1.2 * max(sizes)) + 256 * _MIB
  if _LAYOUT.value == 'published':
    bound = 2048 * _MIB - found['parameter_bytes']
  print(
    json.dumps(
      {
        'layout': path.name,
        **options,
        'shards': len(sizes),
        'largest_shard_bytes': max(sizes),
        'checkpoint_bytes': sum(sizes),
        **found,
        'beyond_parameters_bytes': beyond,
        'bound_bytes': bound,
      }
    )
  )
  if beyond > bound:
    raise ValueError(
      f'{path}: {beyond / _MIB:,.0f} MiB beyond the parameters, expected at '
      f'most {bound / _MIB:,.0f} MiB'
    )


def _four_shards(is_fp8: bool):
  """A model whose four files have a little more than 512 MiB each."""
  return dataclasses.replace(
    presets.deepseek_v32_671b(),
    vocab_size=16384,
    hidden_size=2048,
    num_hidden_layers=5,
    first_k_dense_replace=1,
    num_attention_heads=16,
    q_lora_rank=768,
    intermediate_size=6144,
    moe_intermediate_size=1408,
    n_routed_experts=56 if is_fp8 else 28,
    n_group=1,
    topk_group=1,
    index_n_heads=16,
    num_nextn_predict_layers=0,
  )


if __name__ == '__main__':
  run_flags.run(main)
