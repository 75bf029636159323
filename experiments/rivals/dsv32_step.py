"""This repository's train step, as a worker process like `maxtext_step.py`.

The same config T0, tokens and protocol; the weights are MaxText's when the
request names a file of them, else our own random ones.

  JAX_PLATFORMS=cpu python dsv32_step.py '{"mode": "sparse",
    "batch": 2, "length": 256, "index_topk": 64, "remat": "full",
    "arrays": "/tmp/theirs.npz", "tokens": "/tmp/tokens.npy"}'
"""

import dataclasses
import json
import sys
import time

import jax
import numpy as np

from dsv32_jax.checkpoints import maxtext_mapping
from dsv32_jax.config import presets
from dsv32_jax.config.data import DataConfig
from dsv32_jax.config.training import (
  OptimizerConfig,
  StageConfig,
  StageKind,
)
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.training import optimizer, stages, state
from dsv32_jax.training.batch import Batch
from dsv32_jax.training.step import make_train_step

NUM_LAYERS = 4
# MaxText's constants. It clips main model and indexer by one norm and decays
# the norm scales too; neither changes what a step costs or its first losses.
ADAMW = OptimizerConfig(peak_learning_rate=7.3e-6, weight_decay=0.1)
MODES: dict[str, StageKind] = {
  'dense': 'pretrain',
  'sparse': 'sparse_training',
  'warmup': 'dense_warmup',
}


def model_config(request):
  """T0: preset `cpu` with four indexer heads and without balance loss."""
  return dataclasses.replace(
    presets.cpu(),
    index_n_heads=4,
    index_topk=request['index_topk'],
    max_position_embeddings=max(4096, request['length']),
    balance_loss_alpha=0.0,
    remat=request['remat'],
  )


def stage_config(request):
  """MaxText's training of one mode."""
  return StageConfig(
    kind=MODES[request['mode']],
    init_from=request.get('arrays') or 'random',
    steps=1000,
    data=DataConfig(),
    optimizer=ADAMW,
    indexer_optimizer=ADAMW,
    # MaxText takes the mean over layers where Eq. 3 and 4 stand for each.
    indexer_kl_coefficient=1.0 / NUM_LAYERS,
    router_bias_update_rate=1e-3,
  )


def variables(request, model):
  """MaxText's weights, or random ones."""
  if not request.get('arrays'):
    return state.init_variables(model, jax.random.key(0))
  with np.load(request['arrays']) as arrays:
    return maxtext_mapping.variables_from_arrays(
      dict(arrays),
      model.cfg,
      # MaxText builds no indexers for its dense step.
      indexer='zeros' if request['mode'] == 'dense' else 'required',
    )


def token_batch(tokens):
  """Rows that are one document each."""
  ones = np.ones_like(tokens[:, 1:])
  return Batch.from_numpy(
    {
      'tokens': tokens[:, :-1],
      'targets': tokens[:, 1:],
      'loss_weight': ones.astype(np.float32),
      'segment_ids': ones,
      'positions': np.cumsum(ones, axis=1, dtype=np.int32) - 1,
    }
  )


def main():
  """Builds the step, reports its first losses, then times steps on demand."""
  request = json.loads(sys.argv[1])
  model = DeepSeekV32(model_config(request))
  config = stage_config(request)
  stage = stages.build(config, model.cfg)
  tx = optimizer.build(config, stage)
  train_state = state.create(variables(request, model), stage, tx)
  batch = token_batch(np.load(request['tokens']))
  key = jax.random.key(0)
  step = jax.jit(make_train_step(model, stage, tx), donate_argnums=0)
  started = time.perf_counter()
  compiled = step.lower(train_state, batch, key).compile()
  compile_s = time.perf_counter() - started
  train_state, metrics = compiled(train_state, batch, key)
  kl_L = np.asarray(metrics.get('indexer_kl_L', np.zeros(0)), np.float64)
  memory = compiled.memory_analysis()
  answer = {
    'lm_loss': float(metrics.get('loss/lm', 0.0)),
    'indexer_loss': float(kl_L.mean()) if kl_L.size else 0.0,
    'indexer_kl_L': kl_L.tolist(),
    'compile_s': compile_s,
    'device': jax.devices()[0].device_kind,
    'gflop': (compiled.cost_analysis() or {}).get('flops', 0.0) / 1e9,
    'jax': jax.__version__,
    'temp_mib': memory.temp_size_in_bytes / 2**20 if memory else None,
  }
  print(json.dumps(answer), flush=True)
  for line in sys.stdin:
    step_ms = []
    for _ in range(int(line)):
      started = time.perf_counter()
      train_state, metrics = compiled(train_state, batch, key)
      jax.block_until_ready((train_state, metrics))
      step_ms.append(1e3 * (time.perf_counter() - started))
    print(json.dumps({'step_ms': step_ms}), flush=True)


if __name__ == '__main__':
  main()
