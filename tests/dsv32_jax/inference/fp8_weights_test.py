"""A checkpoint kept in FP8 is multiplied with in FP8."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax import checkpoints, inference
from dsv32_jax.functional.fp8_matmul import MatmulWeight
from dsv32_jax.functional.quantization import QuantizedArray
from dsv32_jax.modules.transformer import DeepSeekV32
from tests.support import tiny_configs

# Every key and every expert is chosen: a rounding changes no choice.
CFG = tiny_configs.config(
  scan_layers=False,
  index_topk=32,
  num_experts_per_tok=8,
  n_group=1,
  topk_group=1,
)


@pytest.fixture(scope='module')
def kept(tmp_path_factory):
  path = tmp_path_factory.mktemp('fp8') / 'checkpoint'
  checkpoints.save_hf(
    DeepSeekV32(CFG), tiny_configs.variables(CFG), path, quantize='fp8'
  )
  return checkpoints.load_hf(path, quantized='keep', scan_layers=False)


def _logits(model, variables, tokens_BT):
  apply = tiny_configs.jit(
    lambda variables, tokens_BT: model.apply(variables, tokens_BT).logits_BTV
  )
  return np.asarray(apply(variables, tokens_BT), np.float64)


def test_products_in_fp8_are_near_those_of_dequantised_weights(kept):
  model, variables = kept
  tokens_BT = tiny_configs.rows([[20]])['tokens']
  prepared = inference.prepare_fp8(variables, dtype=jnp.float32)
  exact = _logits(model, variables, tokens_BT)
  rounded = _logits(model, prepared, tokens_BT)
  error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
  print(f'relative error of rounded activations: {error:.3f}')
  # Activations have three bits after the leading one.
  assert 1e-3 < error < 0.15


def test_every_matrix_but_experts_and_absorbed_ones_is_prepared(kept):
  _, variables = kept
  prepared = inference.prepare_fp8(variables, dtype=jnp.float32)
  layer = prepared['params']['moe_layers']['layer_0']
  mla, moe = layer['attention']['mla'], layer['moe']
  for name in ('w_dq', 'w_dkv', 'w_kr', 'w_uq', 'w_qr', 'w_o'):
    assert isinstance(mla[name], MatmulWeight)
  for name in ('w_iq', 'w_ik'):
    assert isinstance(layer['attention']['indexer'][name], MatmulWeight)
  assert isinstance(moe['shared']['w_down'], MatmulWeight)
  assert isinstance(moe['experts']['w_down'], QuantizedArray)
  assert isinstance(mla['w_uk'], jax.Array)


@pytest.mark.slow
def test_engine_decodes_with_products_in_fp8(kept):
  model, variables = kept
  prepared = inference.prepare_fp8(variables, dtype=jnp.float32)
  engine = inference.Engine(
    model, prepared, inference.EngineConfig(max_batch=2, prefill_chunk=16)
  )
  prompt = (3, 1, 4, 1, 5, 9, 2, 6)
  ticket = engine.submit(inference.Request(prompt=prompt, max_new_tokens=4))
  engine.run()
  completion = ticket.result(0)
  tokens_BT = np.zeros((1, 20), np.int32)
  tokens_BT[0, :12] = [*prompt, *completion.tokens]
  logits_TV = _logits(model, prepared, tokens_BT)[0]
  logprobs = jax.nn.log_softmax(logits_TV[7:11])
  # A rounding of an activation may fall the other way.
  np.testing.assert_allclose(
    np.asarray(logprobs)[np.arange(4), completion.tokens],
    completion.logprobs,
    atol=0.2,
  )


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda kept: tiny_configs.variables(CFG), 'got no float8 matrix'),
    (
      lambda kept: {
        'params': {
          'moe_layers': {'layers': kept[1]['params']['moe_layers']['layer_0']}
        }
      },
      'got stacked layers',
    ),
  ],
)
def test_variables_that_cannot_be_prepared_are_refused(kept, change, message):
  with pytest.raises(ValueError, match=message):
    inference.prepare_fp8(change(kept), dtype=jnp.float32)
