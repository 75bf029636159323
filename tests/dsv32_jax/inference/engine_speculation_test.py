"""Drafting with the MTP module does not change what is drawn.

Over many seeds, the first tokens of a request have the exact distribution that
the model gives them, with a draft as without: all pairs of the first two tokens
are counted, and their probabilities are computed by plain forward passes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dsv32_jax import inference
from dsv32_jax.inference import Request, Sampling, sampling
from dsv32_jax.modules.transformer import DeepSeekV32
from tests.support import tiny_configs

CFG = tiny_configs.config(
  vocab_size=8, num_nextn_predict_layers=1, max_position_embeddings=64
)
PROMPT = (1, 5, 2, 7, 3, 3, 0, 6, 4, 1)
DRAWS = 4000
SETTINGS = {
  'all': Sampling(temperature=1.2),
  'truncated': Sampling(temperature=1.5, top_k=6, top_p=0.9, min_p=0.05),
}


def _exact(variables, setting):
  """Probability of each triple of first tokens, [V, V, V]."""
  V = CFG.vocab_size
  forward = tiny_configs.forward(CFG)
  pairs = np.stack(np.meshgrid(range(V), range(V), indexing='ij'), -1)
  pairs = pairs.reshape(-1, 2)
  tokens = np.concatenate(
    [np.tile(np.array(PROMPT), (len(pairs), 1)), pairs], axis=1
  ).astype(np.int32)
  logits = forward(variables, tokens).logits_BTV[:, len(PROMPT) - 1 :]
  params = sampling.stack([setting] * len(pairs))
  weights = sampling.target_logits(jnp.asarray(logits), params)
  probs = np.asarray(jax.nn.softmax(weights, axis=-1), np.float64)
  first, second = pairs.T
  each = np.arange(len(pairs))
  joint = probs[each, 0, first] * probs[each, 1, second]
  return (joint[:, None] * probs[:, 2]).reshape(V, V, V)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
@pytest.mark.parametrize('name', SETTINGS)
def test_speculative_tokens_have_the_distribution_of_the_model(name):
  setting = SETTINGS[name]
  variables = tiny_configs.variables(CFG)
  exact = _exact(variables, setting)
  assert exact.sum() == pytest.approx(1)
  for speculative in (False, True):
    engine = inference.Engine(
      DeepSeekV32(CFG),
      variables,
      inference.EngineConfig(
        max_batch=64,
        max_waiting=DRAWS,
        page_size=16,
        max_tokens=32,
        speculative=speculative,
      ),
    )
    tickets = [
      engine.submit(
        Request(prompt=PROMPT, max_new_tokens=3, sampling=setting, seed=seed)
      )
      for seed in range(DRAWS)
    ]
    engine.run()
    counts = np.zeros(exact.shape)
    for ticket in tickets:
      counts[ticket.result(0).tokens] += 1
    assert counts[exact == 0].sum() == 0
    # Rare triples are counted together.
    common = exact * DRAWS > 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(exact[common], exact[~common].sum()) * DRAWS
    p = stats.chisquare(
      observed, expected * observed.sum() / expected.sum()
    ).pvalue
    counted = engine.stats()
    print(
      f'{name}, speculative {speculative}: p {p:.3f}, {len(observed)} cells, '
      f'accepted {counted.accepted} of {counted.drafted}'
    )
    # Four comparisons in this file.
    assert p > 1e-3 / 4
    if speculative:
      assert counted.accepted > 0.1 * counted.drafted
