"""Tunix's DrGRPO loss on small random inputs: its own, or as recorded.

`python -m tests.support.tunix_cases` writes the recorded values, in an
environment of its own that has google-tunix 0.1.7 (Python 3.11).

Letters: G responses, P tokens of a prompt, T tokens of a response, V
vocabulary.
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

VERSION = '0.1.7'
PATH = pathlib.Path(__file__).parents[1] / 'fixtures/tunix/drgrpo.json'
PAD, EOS = 0, 1
P, T, V = 2, 5, 9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """Inputs of one loss.

  Attributes:
    name: of the case.
    seed: of everything random.
    lengths: of all responses.
    epsilon: of the clip.
    beta: strength of the KL (K3).
    temperature: of the logits.
    options: of Tunix's config beside these.
  """

  name: str
  seed: int
  lengths: tuple[int, ...]
  epsilon: float = 0.2
  beta: float = 0.0
  temperature: float = 1.0
  options: dict[str, Any] = dataclasses.field(default_factory=dict)


_MEAN = {'loss_agg_mode': 'sequence-mean-token-mean'}
CASES = (
  # Tunix's default divides by the longest response's length; where all are as
  # long that is the mean over the own tokens, which is the paper's.
  Case(name='defaults', seed=0, lengths=(5,) * 6),
  Case(name='ragged', seed=1, lengths=(5, 1, 3, 2, 4, 5), options=_MEAN),
  Case(
    name='wide_clip', seed=2, lengths=(2, 5, 1, 3, 3, 4), epsilon=10.0,
    options=_MEAN,
  ),
  Case(
    name='temperature', seed=3, lengths=(5, 4, 3, 2, 1, 5), temperature=0.7,
    options=_MEAN,
  ),
  Case(
    name='plain_kl', seed=4, lengths=(3, 4, 5, 5, 1, 2), beta=0.3,
    options=_MEAN | {'kl_loss_mode': 'low_var_kl'},
  ),
)  # fmt: skip


def inputs(case: Case) -> dict[str, np.ndarray]:
  """Two groups of three responses, and the logits at every place."""
  rng = np.random.default_rng(case.seed)
  G = len(case.lengths)
  mask_GT = np.arange(T)[None, :] < np.array(case.lengths)[:, None]
  tokens = rng.integers(2, V, (G, P + T))
  return {
    'prompt_GP': tokens[:, :P],
    'completion_GT': np.where(mask_GT, tokens[:, P:], PAD),
    'mask_GT': mask_GT,
    'logits_GLV': rng.standard_normal((G, P + T, V)).astype(np.float32),
    'old_GT': (-rng.random((G, T)) * 3).astype(np.float32),
    'ref_GT': (-rng.random((G, T)) * 3).astype(np.float32),
    'rewards_G': rng.random(G).astype(np.float32),
  }


def recorded() -> dict[str, dict[str, Any]]:
  """What Tunix gave, by name of the case."""
  return json.loads(PATH.read_text(encoding='utf-8'))['cases']


def run(case: Case) -> dict[str, Any]:
  """Tunix's advantages, loss and gradient in the logits."""
  # In an environment of its own: see the top of the file.
  import jax
  import jax.numpy as jnp
  from flax import nnx
  from tunix.rl import algo_core, common, function_registry
  from tunix.rl.grpo import drgrpo_learner

  arrays = inputs(case)
  config = drgrpo_learner.DrGRPOConfig(
    num_generations=3,
    num_iterations=2,
    beta=case.beta,
    epsilon=case.epsilon,
    **case.options,
  )
  # The learner sets it from its rollouts' config.
  config.temperature = case.temperature
  estimator = function_registry.get_advantage_estimator(
    config.advantage_estimator
  )
  advantages_G = estimator(
    rewards=arrays['rewards_G'], num_generations=config.num_generations
  )
  example = common.TrainExample(
    prompt_ids=jnp.asarray(arrays['prompt_GP']),
    prompt_mask=jnp.ones((len(case.lengths), P), bool),
    completion_ids=jnp.asarray(arrays['completion_GT']),
    completion_mask=jnp.asarray(arrays['mask_GT']),
    advantages=jnp.asarray(advantages_G),
    ref_per_token_logps=jnp.asarray(arrays['ref_GT']) if case.beta else None,
    old_per_token_logps=jnp.asarray(arrays['old_GT']),
  )

  class Table(nnx.Module):
    """A model whose logits are its parameters."""

    def __init__(self):
      self.logits = nnx.Param(jnp.asarray(arrays['logits_GLV']))

    def __call__(self, tokens, **_):
      del tokens
      return self.logits[...], None

  def loss(model):
    return algo_core.grpo_loss_fn(
      model, example, config, pad_id=PAD, eos_id=EOS
    )

  (value, aux), gradient = nnx.value_and_grad(loss, has_aux=True)(Table())
  leaf = jax.tree.leaves(gradient)[0]
  return {
    'advantages_G': np.asarray(advantages_G).tolist(),
    'loss': float(value),
    'clip_fraction': float(aux['pg_clipfrac']),
    'gradient_GLV': _rounded(leaf),
  }


def _rounded(x: Any) -> list:
  """Nine digits, which is all that a float32 has."""
  flat = [float(f'{value:.9g}') for value in np.asarray(x).ravel()]
  return np.array(flat).reshape(np.shape(x)).tolist()


def write(path: pathlib.Path = PATH) -> None:
  """Records every case."""
  cases = {case.name: run(case) for case in CASES}
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = ',\n'.join(
    f'{json.dumps(name)}: {json.dumps(case)}' for name, case in cases.items()
  )
  text = f'{{"google-tunix": "{VERSION}", "cases": {{\n{lines}\n}}}}\n'
  path.write_text(text, encoding='utf-8')


if __name__ == '__main__':
  write()
