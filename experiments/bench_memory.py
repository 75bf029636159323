"""Peak temporary memory of one train step against sequence length.

    python experiments/bench_memory.py

Compiles (and does not run) the step of `tiny`, one row a batch, in each stage,
and prints XLA's own count of temporary memory: everything but parameters,
optimizer state and batch. A ratio of 4 over 4x the length is linear.
"""

import json

import jax
import jax.numpy as jnp
from absl import flags

from dsv32_jax.config import presets
from dsv32_jax.config.data import DataConfig
from dsv32_jax.config.training import StageConfig
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.training import flags as run_flags
from dsv32_jax.training import optimizer, stages, step
from dsv32_jax.training import state as state_lib
from dsv32_jax.training.batch import Batch

_LENGTHS = flags.DEFINE_list('lengths', ['4096', '16384'], 'Tokens a row.')
_KINDS = ('pretrain', 'dense_warmup', 'sparse_training')


def temporary_bytes(kind, seq_len: int) -> int:
  """XLA's temporary memory of one step."""
  model = DeepSeekV32(presets.tiny())
  config = StageConfig(
    kind=kind,
    steps=1,
    init_from='any',
    data=DataConfig(seq_len=seq_len, batch_size=1),
  )
  stage = stages.build(config, model.cfg)
  tx = optimizer.build(config, stage)
  state = jax.eval_shape(
    lambda variables: state_lib.create(variables, stage, tx),
    state_lib.variable_shapes(model),
  )
  ids = jax.ShapeDtypeStruct((1, seq_len), jnp.int32)
  weight = jax.ShapeDtypeStruct((1, seq_len), jnp.float32)
  batch = Batch(ids, ids, weight, ids, ids)
  key = jax.eval_shape(lambda: jax.random.key(0))
  run = jax.jit(step.make_train_step(model, stage, tx), donate_argnums=0)
  analysis = run.lower(state, batch, key).compile().memory_analysis()
  assert analysis is not None, 'XLA gives no memory analysis here'
  return analysis.temp_size_in_bytes


def main(argv: list[str]) -> None:
  del argv
  lengths = [int(length) for length in _LENGTHS.value or ()]
  for kind in _KINDS:
    sizes = {length: temporary_bytes(kind, length) for length in lengths}
    row = {
      'stage': kind,
      'mib': {length: round(size / 2**20, 1) for length, size in sizes.items()},
      'ratio': round(sizes[lengths[-1]] / sizes[lengths[0]], 2),
      'device': jax.devices()[0].device_kind,
      'jax': jax.__version__,
    }
    print(json.dumps(row), flush=True)


if __name__ == '__main__':
  run_flags.run(main)
