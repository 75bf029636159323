"""What the engine sampled, scored by the trainer: the ratio is 1.

At equal weights, and with routers' biases and indexers that have moved since,
which change nothing but what is chosen. In float64 the only difference that is
left is that of recorded log-probabilities, which are float32.
"""

import contextlib
import dataclasses
import functools

import jax
import numpy as np
import pytest

from dsv32_jax.config.rl import GRPOConfig
from dsv32_jax.inference import (
  Engine,
  EngineConfig,
  Record,
  Request,
  Sampling,
)
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.rl import batches, step
from dsv32_jax.rl.types import Group, Response, Scored
from dsv32_jax.training import state
from tests.support import rl_cases, tiny_configs
from tests.support.double_precision import double_precision

pytestmark = pytest.mark.slow

EVERYTHING = Record(experts=True, kept=True, selected=True)
SAMPLING = Sampling(temperature=0.7, top_p=0.8, top_k=20)
REQUESTS = ((5, 14), (9, 10), (1, 20), (12, 6))
GRPO = GRPOConfig()
OFF = ('keep_routing', 'keep_selection', 'keep_sampling_mask')


def rollout(cfg, variables, engine_cfg=None) -> tuple[Response, ...]:
  """Responses of the engine to random prompts."""
  engine = Engine(
    DeepSeekV32(engine_cfg or cfg),
    variables,
    EngineConfig(max_batch=4, page_size=8, max_tokens=40, prefill_chunk=8),
  )
  rng = np.random.default_rng(0)
  tickets = [
    engine.submit(
      Request(
        prompt=tuple(rng.integers(0, cfg.vocab_size, size).tolist()),
        max_new_tokens=new,
        sampling=SAMPLING,
        seed=number,
        record=EVERYTHING,
      )
    )
    for number, (size, new) in enumerate(REQUESTS)
  ]
  engine.run()
  return tuple(
    Response.from_completion(ticket.result(), temperature=SAMPLING.temperature)
    for ticket in tickets
  )


@contextlib.contextmanager
def x64_in_all_threads():
  """For the engine's own thread: `jax.enable_x64` is one thread's."""
  jax.config.update('jax_enable_x64', True)
  try:
    yield
  finally:
    jax.config.update('jax_enable_x64', False)


def packed(cfg, responses):
  group = Group(
    problem='p', domain='mathematics', mode='chat',
    responses=tuple(
      Scored(response=found, reward=float(number % 2))
      for number, found in enumerate(responses)
    ),
  )  # fmt: skip
  return batches.make_batch(
    batches.samples([group], GRPO),
    model=cfg,
    grpo=GRPO,
    row_tokens=40,
    kept_cap=SAMPLING.top_k,
  )


@functools.cache
def scorer(cfg, **switches):
  grpo = dataclasses.replace(GRPO, **switches)
  return tiny_configs.jit(step.make_score_fn(DeepSeekV32(cfg), grpo))


def drift(cfg, batch, variables, **switches) -> dict[str, float]:
  """The metrics of the log-ratio of trainer to sampler."""
  metrics = scorer(cfg, **switches)(variables, batch).metrics
  return {name: float(value) for name, value in metrics.items()}


def test_ratio_is_one_with_replays_and_not_without():
  """Bar: 1 within 1e-6, in float64, with large weights."""
  with x64_in_all_threads(), double_precision() as precision:
    cfg = tiny_configs.config(precision=precision)
    variables = tiny_configs.variables(cfg)
    batch = packed(cfg, rollout(cfg, variables))
    moved = rl_cases.with_other_choices(variables)
    found = {
      'equal': drift(cfg, batch, variables),
      'moved': drift(cfg, batch, moved),
      **{name: drift(cfg, batch, moved, **{name: False}) for name in OFF},
    }
    found['top_p'] = drift(cfg, batch, variables, keep_sampling_mask=False)
  for name, metrics in found.items():
    print(name, metrics)
  for name in ('equal', 'moved'):
    assert found[name]['sampler/log_ratio_abs_max'] < 3e-7
  assert found['equal']['mismatch/routing'] == 0
  assert found['equal']['mismatch/selection'] == 0
  assert found['moved']['mismatch/routing'] > 0.2
  assert found['moved']['mismatch/selection'] > 0.2
  fed = sum(prompt + new - 1 for prompt, new in REQUESTS)
  assert found['moved']['replayed/routing'] == fed
  assert found['moved']['replayed/selection'] == 2 * fed
  for name in (*OFF, 'top_p'):
    assert found[name]['sampler/log_ratio_abs_mean'] > 0.05
  # Truncation alone makes every ratio smaller than 1.
  assert found['top_p']['sampler/ratio_max'] < 1


@pytest.mark.exhaustive
def test_ratio_is_one_in_float32():
  """At the usual weights; 1e-6 is eight roundings of a log-probability."""
  cfg = tiny_configs.config(num_hidden_layers=3, initializer_range=0.1)
  variables = state.init_variables(DeepSeekV32(cfg), jax.random.key(0))
  batch = packed(cfg, rollout(cfg, variables))
  found = drift(cfg, batch, rl_cases.with_other_choices(variables))
  print(found)
  assert found['sampler/log_ratio_abs_max'] < 1e-6
  assert found['mismatch/routing'] > 0.2
