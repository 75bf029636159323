"""MaxText 0.2.5's own DeepSeek-V3.2 train step, as a worker process.

Runs under the interpreter of an environment that has MaxText (the command that
makes one: `bench_maxtext.py --help`) and imports nothing of this repository.
It builds the model and the step through MaxText's public entry points, from
the sizes that the caller gives, then obeys one line of standard input at a
time: a number of steps to run, answered by one JSON line with their times.
(MaxText prints other lines between; DECOUPLE_GCLOUD keeps it from looking for
Google Cloud.)

  JAX_PLATFORMS=cpu DECOUPLE_GCLOUD=TRUE python maxtext_step.py '{"mode":
    "sparse", "batch": 2, "length": 256, "index_topk": 64, "experts":
    "einsum", "tokens": "/tmp/tokens.npy", "arrays": "/tmp/theirs.npz"}'
"""

import json
import logging
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import maxtext  # pyrefly: ignore[missing-import]
import numpy as np
from flax import nnx
from flax.core.spmd import logical_axis_rules
from maxtext.configs import pyconfig  # pyrefly: ignore[missing-import]
from maxtext.trainers.pre_train import train  # pyrefly: ignore[missing-import]
from maxtext.utils import (  # pyrefly: ignore[missing-import]
  sharding,
  train_utils,
)

# Config T0: the sizes of our preset `cpu` with four indexer heads.
SIZES = {
  'base_emb_dim': 128,
  'base_mlp_dim': 256,
  'base_moe_mlp_dim': 64,
  'base_num_decoder_layers': 4,
  'base_num_kv_heads': 4,
  'base_num_query_heads': 4,
  'first_num_dense_layers': 1,
  'indexer_head_dim': 32,
  'indexer_n_heads': 4,
  'kv_lora_rank': 32,
  'n_routing_groups': -1,
  'num_experts': 8,
  'num_experts_per_tok': 2,
  'q_lora_rank': 64,
  'qk_nope_head_dim': 32,
  'qk_rope_head_dim': 16,
  'shared_experts': 1,
  'topk_routing_group': -1,
  'v_head_dim': 32,
  'vocab_size': 512,
}
# No YaRN (the lengths are within the original context), no dropped tokens,
# and the constants that our side is given too.
TRAINING = {
  'capacity_factor': -1,
  'dtype': 'float32',
  'learning_rate': 7.3e-6,
  'max_position_embeddings': 4096,
  'megablox': False,
  'mtp_num_layers': 0,
  'opt_type': 'adamw',
  'original_max_position_embeddings': 4096,
  'remat_policy': 'full',
  'rope_factor': 1,
  'routed_bias': True,
  'routed_bias_update_rate': 0.001,
  'steps': 1000,
  'weight_dtype': 'float32',
}
# What only serves running it on synthetic data on a CPU.
SURROUNDINGS = {
  'attention': 'dot_product',
  'dataset_type': 'synthetic',
  'enable_checkpointing': False,
  'enable_tensorboard': False,
  'hardware': 'cpu',
  'model_name': 'deepseek3.2-671b',
  'override_model_config': True,
  'run_name': 'step',
  'skip_first_n_steps_for_profiler': 0,
  'skip_jax_distributed_system': True,
  'tokenizer_path': 'none',
  'tokenizer_type': 'huggingface',
}
MODES = {
  'dense': {'use_indexer': False},
  'sparse': {
    'indexer_loss_scaling_factor': 1.0,
    'indexer_sparse_training': True,
    'use_indexer': True,
  },
  'warmup': {
    'indexer_loss_scaling_factor': 1.0,
    'indexer_sparse_training': False,
    'trainable_parameters_mask': "['.*indexer.*']",
    'use_indexer': True,
  },
}
METRICS = ('lm_loss', 'indexer_loss', 'moe_lb_loss', 'raw_grad_norm')


def configuration(request):
  """MaxText's configuration object for one request."""
  settings = SIZES | TRAINING | SURROUNDINGS | MODES[request['mode']]
  settings |= {
    'base_output_directory': str(pathlib.Path(request['arrays']).parent),
    'indexer_topk': request['index_topk'],
    'max_target_length': request['length'],
    'per_device_batch_size': request['batch'],
    # True is ragged_dot over sorted tokens, False every expert on every token.
    'sparse_matmul': request['experts'] == 'ragged',
  }
  defaults = pathlib.Path(next(iter(maxtext.__path__)), 'configs', 'base.yml')
  return pyconfig.initialize(
    ['step', str(defaults)] + [f'{k}={v}' for k, v in settings.items()]
  )


def token_batch(tokens):
  """MaxText's batch of rows that are one document each."""
  rows, length = tokens.shape[0], tokens.shape[1] - 1
  ones = np.ones((rows, length), np.int32)
  positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
  batch = {
    'inputs': tokens[:, :-1],
    'inputs_position': positions,
    'inputs_segmentation': ones,
    'targets': tokens[:, 1:],
    'targets_position': positions,
    'targets_segmentation': ones,
  }
  return jax.tree.map(jnp.asarray, batch)


def parameters(state):
  """Every parameter as a numpy array, by its path."""
  flat = nnx.to_flat_state(nnx.state(state.model, nnx.Param))
  return {
    '/'.join(map(str, path)): np.asarray(leaf.get_value())
    for path, leaf in flat
  }


def layer_losses(graph, cfg, state, batch):
  """Indexer loss of each layer; MaxText logs their mean only."""

  def forward(state, batch):
    model = nnx.merge(graph, state).model
    _, aux = train.loss_fn(model, cfg, dict(batch), None, None, is_train=True)
    return aux['intermediate_outputs'].get('indexer_losses', {})

  leaves = jax.tree_util.tree_leaves_with_path(jax.jit(forward)(state, batch))
  # Dense layers come before MoE layers, as in the model.
  leaves.sort(key=lambda leaf: 'moe_layers' in jax.tree_util.keystr(leaf[0]))
  return [float(x) for _, leaf in leaves for x in np.ravel(leaf)]


def main():
  """Builds the step, reports its first losses, then times steps on demand."""
  logging.disable(logging.WARNING)
  request = json.loads(sys.argv[1])
  cfg = configuration(request)
  loop = train_utils.setup_train_loop(cfg, None)
  state_sharding, mesh, state = loop[2], loop[4], loop[-1]
  tokens = np.load(request['tokens'])
  graph, pure = nnx.split(state)
  batch = token_batch(tokens)
  np.savez(request['arrays'], **parameters(state))  # pyrefly: ignore
  param_sharding, state_sharding = (
    sharding.maybe_update_params_sharding_with_opt(cfg, state_sharding)
  )
  step, _ = train_utils.jit_train_and_eval_step(
    cfg,
    graph,
    mesh,
    pure,
    state_sharding,
    train.train_step,
    train.eval_step,
    None,
    param_sharding,
  )
  with jax.set_mesh(mesh), logical_axis_rules(cfg.logical_axis_rules):
    kl = layer_losses(graph, cfg, pure, batch)
    started = time.perf_counter()
    compiled = step.lower(pure, batch).compile()
    compile_s = time.perf_counter() - started
    pure, metrics = compiled(pure, batch)
    scalars = {k.split('/')[-1]: v for k, v in metrics['scalar'].items()}
    answer = {name: float(scalars[name]) for name in METRICS}
    answer |= {
      'compile_s': compile_s,
      'device': jax.devices()[0].device_kind,
      'gflop': (compiled.cost_analysis() or {}).get('flops', 0.0) / 1e9,
      'indexer_kl_L': kl,
      'jax': jax.__version__,
      'temp_mib': compiled.memory_analysis().temp_size_in_bytes / 2**20,
    }
    print(json.dumps(answer), flush=True)
    for line in sys.stdin:
      step_ms = []
      for _ in range(int(line)):
        started = time.perf_counter()
        pure, metrics = compiled(pure, batch)
        jax.block_until_ready((pure, metrics))
        step_ms.append(1e3 * (time.perf_counter() - started))
      print(json.dumps({'step_ms': step_ms}), flush=True)


if __name__ == '__main__':
  main()
