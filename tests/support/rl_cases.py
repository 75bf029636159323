"""Groups of responses with all that sampling records, without an engine.

Tokens are random; a forward pass of the sampler's variables says which experts
and keys they had, and their log-probabilities over truncated sets.

Letters: N responses, T tokens, V vocabulary, K members of a set.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dsv32_jax.config.model import AttentionMode, ModelConfig
from dsv32_jax.rl.types import Group, Response, Scored
from tests.support import tiny_configs

KEPT = 5
"""Most members of a kept set."""


def responses(
  cfg: ModelConfig,
  variables: dict,
  lengths: Sequence[tuple[int, int]],
  *,
  temperature: float = 0.8,
  seed: int = 0,
) -> list[Response]:
  """What a sampler with these variables would have recorded.

  Args:
    cfg: the model.
    variables: of the sampler.
    lengths: of the prompt and of what follows it, of each response.
    temperature: of the draws.
    seed: of tokens and sets.

  Returns:
    Responses whose every second kept set is limited.
  """
  rng = np.random.default_rng(seed)
  totals = [prompt + new for prompt, new in lengths]
  N, T = len(lengths), max(totals)
  tokens_NT = rng.integers(0, cfg.vocab_size, (N, T), dtype=np.int32)
  fed_NT = np.arange(T)[None, :] < np.array(totals)[:, None] - 1
  output = tiny_configs.forward(cfg, AttentionMode(record=True))(
    variables, tokens_NT, segment_ids_BT=fed_NT.astype(np.int32)
  )
  logits_NTV = np.asarray(output.logits_BTV, np.float64) / temperature
  experts_LNTA = np.asarray(output.expert_index_LBTA)
  selected_LNTK = np.asarray(output.selected_LBTK)
  found = []
  for row, (prompt, new) in enumerate(lengths):
    size = prompt + new
    kept: list[Any] = []
    logprobs = np.zeros(size, np.float32)
    for place in range(prompt, size):
      token = tokens_NT[row, place]
      z_V = logits_NTV[row, place - 1]
      members = np.arange(cfg.vocab_size)
      if place % 2:
        members = rng.permutation(cfg.vocab_size)[: rng.integers(1, KEPT)]
        members = np.unique(np.append(members, token))
      kept.append(members if place % 2 else None)
      z_K = z_V[members]
      logprobs[place] = z_V[token] - np.log(np.sum(np.exp(z_K)))
    found.append(
      Response(
        tokens=tokens_NT[row, :size],
        is_policy=np.arange(size) >= prompt,
        sampling_logprobs=logprobs,
        finish_reason='stop',
        kept=tuple(kept),
        experts=experts_LNTA[:, row, : size - 1].swapaxes(0, 1),
        selected=selected_LNTK[:, row, : size - 1].swapaxes(0, 1),
        temperature=temperature,
      )
    )
  return found


def random_response(
  cfg: ModelConfig, prompt: int, new: int, seed: int = 0
) -> Response:
  """A response with random records that fit the model."""
  rng = np.random.default_rng((prompt, new, seed))
  size, layers = prompt + new, cfg.num_hidden_layers
  tokens = rng.integers(0, cfg.vocab_size, size)
  selected = np.full((size - 1, layers, cfg.index_topk), -1)
  for at in np.ndindex(size - 1, layers):
    some = rng.permutation(at[0] + 1)[: cfg.index_topk]
    selected[at][: some.size] = some
  scores = rng.random((size - 1, cfg.num_moe_layers, cfg.n_routed_experts))
  is_policy = np.arange(size) >= prompt
  return Response(
    tokens=tokens,
    is_policy=is_policy,
    sampling_logprobs=np.where(is_policy, -rng.random(size), 0),
    finish_reason='stop',
    kept=tuple(
      None if n % 3 == 0 else np.unique([tokens[prompt + n], n % 32, 7])
      for n in range(new)
    ),
    experts=np.argsort(scores, axis=-1)[..., : cfg.num_experts_per_tok],
    selected=selected,
    temperature=0.7,
  )


def groups(
  cfg: ModelConfig,
  variables: dict,
  lengths: Sequence[Sequence[tuple[int, int]]],
  *,
  domains: Sequence[str] = ('mathematics', 'programming'),
  seed: int = 0,
) -> list[Group]:
  """Groups of `responses` with random rewards, domains in turn."""
  flat = [pair for group in lengths for pair in group]
  rest = iter(responses(cfg, variables, flat, seed=seed))
  rng = np.random.default_rng(seed + 1)
  return [
    Group(
      problem=f'problem {number}',
      domain=domains[number % len(domains)],
      mode='chat',
      responses=tuple(
        Scored(response=next(rest), reward=float(rng.random())) for _ in group
      ),
    )
    for number, group in enumerate(lengths)
  ]


def without(response: Response, *names: str) -> Response:
  """The response as if something had not been recorded."""
  return dataclasses.replace(response, **dict.fromkeys(names))


def with_other_choices(variables: dict, seed: int = 0) -> dict:
  """The same function of what is chosen, with other choices.

  The routers' biases and the indexers' parameters choose experts and keys and
  take no other part in the output.
  """
  rng = np.random.default_rng(seed)

  def moved(path: tuple, x: Any) -> Any:
    chooses = path[0].key == 'router_bias' or any(
      key.key == 'indexer' for key in path
    )
    noise = rng.standard_normal(x.shape).astype(x.dtype)
    return x + 0.5 * noise if chooses else x

  return jax.tree_util.tree_map_with_path(moved, variables)
