"""Fresh checkpoints of transformers in, our exports back into transformers."""

import pathlib

import jax
import numpy as np
import pytest

from dsv32_jax import DENSE, SPARSE, checkpoints, inference

ROOT = pathlib.Path(__file__).parents[3]
FIXTURES = ROOT / 'tests' / 'fixtures'
LOGIT_TOLERANCE = 1e-5
SMALL_INDEXER = {'index_n_heads': 8, 'index_head_dim': 8, 'index_topk': 7}

# transformers and torch warn about themselves.
pytestmark = [
  pytest.mark.torch,
  pytest.mark.slow,
  pytest.mark.filterwarnings('default'),
]


def _logits(model, variables, tokens_BT, mode):
  def run(variables, tokens_BT):
    return model.apply(variables, tokens_BT, attention=mode).logits_BTV

  return np.asarray(jax.jit(run)(variables, tokens_BT))


def _transformers_logits(path, tokens_BT):
  import torch
  import transformers

  model, found = transformers.AutoModelForCausalLM.from_pretrained(
    path,
    attn_implementation='eager',
    experts_implementation='eager',
    output_loading_info=True,
  )
  assert not any(found.values()), found
  with torch.no_grad():
    logits = model.eval()(torch.tensor(tokens_BT).long()).logits
    return logits.float().numpy()


@pytest.mark.parametrize(
  'name', ['hf_no_yarn', 'hf_ungrouped', 'hf_sharded', 'hf_fp8', 'hf_v3']
)
def test_fresh_checkpoint_in_and_out_matches_transformers(tmp_path, name):
  from tests.support import transformers_checkpoints

  source = tmp_path / name
  transformers_checkpoints.make(name, source, seed=10)
  expected = np.load(source / 'expected.npz')
  tokens_BT = expected['input_ids']
  is_v3 = name == 'hf_v3'
  options = {}
  if is_v3:
    options = {'indexer': 'init', 'overrides': SMALL_INDEXER}
  mode = DENSE if is_v3 else SPARSE
  model, variables = checkpoints.load_hf(source, **options)
  logits = _logits(model, variables, tokens_BT, mode)
  error = np.abs(logits - expected['logits']).max()
  new = inference.generate(
    model,
    variables,
    tokens_BT[:, : int(expected['prompt_len'])].tolist(),
    max_new_tokens=expected['greedy_ids'].shape[1],
    attention=mode,
  )
  print(f'{name}: import, largest error {error:.2e}')
  assert error < LOGIT_TOLERANCE
  np.testing.assert_array_equal(new.tokens_BN, expected['greedy_ids'])
  if is_v3:
    return
  export = tmp_path / 'export'
  checkpoints.save_hf(model, variables, export, max_shard_bytes=60_000)
  theirs = _transformers_logits(export, tokens_BT)
  error = np.abs(theirs - expected['logits']).max()
  print(f'{name}: export, largest error {error:.2e}')
  assert error < LOGIT_TOLERANCE


def test_export_in_published_dtypes_is_loaded_by_transformers(
  tmp_path,
):
  """bfloat16: the same rounded weights on both sides, computed in float32."""
  model, variables = checkpoints.load_hf(FIXTURES / 'hf_sharded')
  path = tmp_path / 'bfloat16'
  checkpoints.save_hf(model, variables, path, dtype='published')
  again, rounded = checkpoints.load_hf(path)
  assert again.cfg.precision.compute == 'bfloat16'
  wide = tmp_path / 'float32'
  checkpoints.save_hf(again, rounded, wide, dtype='float32')
  tokens_BT = np.load(FIXTURES / 'hf_sharded' / 'expected.npz')['input_ids']
  ours = _logits(*checkpoints.load_hf(wide), tokens_BT, SPARSE)
  theirs = _transformers_logits(wide, tokens_BT)
  assert np.abs(ours - theirs).max() < LOGIT_TOLERANCE
  # And in the published dtypes it loads without a missing or unknown name.
  assert np.isfinite(_transformers_logits(path, tokens_BT)).all()
