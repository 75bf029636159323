"""The trained side of RL: a state, its anchor, and steps on minibatches."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax.config.rl import RLConfig
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.rl import batches
from dsv32_jax.rl import step as step_lib
from dsv32_jax.rl.ledger import Ledger
from dsv32_jax.sharding import specs
from dsv32_jax.sharding.parallel import Parallel
from dsv32_jax.training import compiled_step, optimizer
from dsv32_jax.training import state as state_lib


class Learner:
  """Parameters and optimizer state, and the frozen parameters KL is against.

  Call it within `sharding.parallel.use(parallel)`.

  Attributes:
    needs_reference: whether any domain has a KL penalty.
  """

  def __init__(
    self,
    model: DeepSeekV32,
    config: RLConfig,
    domains: Sequence[str],
    parallel: Parallel | None,
  ):
    """Prepares; `start` gives it parameters.

    Args:
      model: to train.
      config: of the run.
      domains: of the mixture, in the order that batches number them.
      parallel: layout of training; None for one device.
    """
    self.needs_reference = any(
      config.grpo.kl_strength_of(name) > 0 for name in domains
    )
    self._model = model
    self._config = config
    self._domains = domains
    self._parallel = parallel
    self._stage = step_lib.rl_stage(config.grpo, model.cfg)
    self._score = jax.jit(step_lib.make_score_fn(model, config.grpo))
    self._compiled: dict[int, Callable] = {}
    self._carry: Any = None
    self._reference: Any = None
    self._shardings: Any = None

  @property
  def variables(self) -> dict:
    """Of now; the next step gives them up (they are donated)."""
    return self._state.variables

  def start(self, variables: dict) -> None:
    """Begins with these parameters, which are the KL's anchor too."""
    if self._parallel is not None:
      self._shardings = specs.of_leaves(variables['params'])
    state = state_lib.create(variables, self._stage, self._tx(), self._parallel)
    self._hold(compiled_step.place_state(state, self._parallel))
    if self.needs_reference:
      self.refresh_reference()

  def tree(self) -> dict:
    """What a checkpoint holds; parameters where `load_params` looks."""
    state = self._state
    tree = {
      field.name: getattr(state, field.name)
      for field in dataclasses.fields(state)
    }
    if self._reference is None:
      return tree
    return {**tree, 'reference': self._reference}

  def free(self) -> None:
    """Gives the arrays up before others are read from a checkpoint."""
    # Two states would need twice the memory.
    compiled_step.free(self.tree())

  def restore(self, tree: Mapping[str, Any]) -> None:
    """Goes on with a tree that `tree` gave."""
    fields = dict(tree)
    self._reference = fields.pop('reference', None)
    self._hold(state_lib.TrainState(**fields))

  def refresh_reference(self) -> None:
    """Makes the parameters of now the KL's anchor."""
    # Arrays of their own: those of the state are donated.
    self._reference = jax.tree.map(jnp.copy, dict(self.variables))

  def drift(self, samples: Sequence[batches.Sample]) -> dict[str, float]:
    """What the trainer makes of the sampler's tokens with the same weights."""
    scores = self._score(self.variables, self._packed(samples))
    return {
      name: float(value)
      for name, value in jax.device_get(scores.metrics).items()
      if name.startswith('sampler/')
    }

  def step(
    self, samples: Sequence[batches.Sample], ledger: Ledger
  ) -> dict[str, float]:
    """One optimizer step on one minibatch.

    Args:
      samples: the minibatch.
      ledger: the FLOPs are added to it.

    Returns:
      Metrics of the step, and seconds of its parts.
    """
    cfg = self._model.cfg
    fed = [sample.response.tokens.size - 1 for sample in samples]
    began = time.perf_counter()
    batch = self._packed(samples)
    packed = time.perf_counter()
    if self._reference is not None:
      scores = self._score(self._reference, batch)
      batch = dataclasses.replace(batch, ref_logprob_BT=scores.ref_logprob_BT)
      jax.block_until_ready(batch.ref_logprob_BT)
      ledger.add_forward('scoring', cfg, fed)
    scored = time.perf_counter()
    rows = batch.tokens_BT.shape[0]
    line = {}
    if rows not in self._compiled:
      self._compiled[rows] = self._compile(batch)
      line['time/compile_s'] = time.perf_counter() - scored
    compiled = time.perf_counter()
    self._carry, values = self._compiled[rows](self._carry, batch, self._key())
    values = jax.device_get(values)
    ledger.add_training(cfg, fed)
    line |= {name: float(value) for name, value in values.items()}
    line |= {
      'time/pack_s': packed - began,
      'time/reference_s': scored - packed,
      'time/update_s': time.perf_counter() - compiled,
    }
    line['train/tokens'] = float(sum(fed))
    line['train/tokens_per_s'] = sum(fed) / line['time/update_s']
    line['train/fill'] = sum(fed) / (rows * self._config.row_tokens)
    return line

  @property
  def _state(self) -> state_lib.TrainState:
    return self._carry[0]

  def _hold(self, state: state_lib.TrainState) -> None:
    is_finite = compiled_step.place_state(np.asarray(True), self._parallel)
    self._carry = (state, is_finite)

  def _tx(self) -> Any:
    update = self._config.update
    settings = {'main': update.optimizer, 'indexer': update.indexer_optimizer}
    return optimizer.for_groups(settings, self._config.steps, self._stage)

  def _packed(self, samples: Sequence[batches.Sample]) -> Any:
    config = self._config
    rows = config.rows
    if batches.rows_needed(samples, config.row_tokens) > rows:
      rows = config.most_rows
    host = batches.make_batch(
      samples,
      model=self._model.cfg,
      grpo=config.grpo,
      rows=rows,
      row_tokens=config.row_tokens,
      domains=self._domains,
      num_responses=config.responses_per_minibatch,
      kept_cap=config.kept_cap,
    )
    return batches.place(host, self._parallel)

  def _compile(self, batch: Any) -> Callable:
    step = step_lib.make_rl_step(
      self._model,
      self._config.grpo,
      self._tx(),
      micro_batches=self._config.update.micro_batches,
      logits_chunk=self._config.update.logits_chunk,
      shardings=self._shardings,
    )
    return compiled_step.compile_step(
      lambda state, batch, key: step(state, batch),
      self._carry,
      batch,
      self._key(),
    )

  def _key(self) -> Any:
    return compiled_step.place_state(jax.random.key(0), self._parallel)
