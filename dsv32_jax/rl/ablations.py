"""Ablations of the stabilisers: which cells there are, and one cell's run.

A cell is a regime (how stale rollouts are, in what precision and from which
nucleus they are drawn), a variant (which stabilisers are off) and a seed. Its
configuration is an ordinary one, that `rl.trainer` runs to the same numbers; a
`Lab` runs many of them in one process, so that programs are compiled once.
"""

import dataclasses
import fcntl
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax.config.rl import RLConfig
from dsv32_jax.config.rollout import SamplerPrecision
from dsv32_jax.inference.sampling import Sampling
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.rl import batches, held_out, rollout, store
from dsv32_jax.rl import step as step_lib
from dsv32_jax.rl.collection import Collector
from dsv32_jax.rl.prompts import Prompts
from dsv32_jax.rl.rewards import RewardModel
from dsv32_jax.rl.start import Start
from dsv32_jax.training import compiled_step, optimizer
from dsv32_jax.training import state as state_lib

SWITCHES = (
  'unbiased_kl',
  'off_policy_sequence_mask',
  'keep_routing',
  'keep_sampling_mask',
  'keep_selection',
)
VARIANTS: dict[str, tuple[str, ...]] = {
  'all_on': (),
  **{f'no_{switch}': (switch,) for switch in SWITCHES},
  'all_off': SWITCHES,
}
"""Switches that are off, by the variant's name."""

# What `rl.trainer` draws the order of a minibatch's responses with.
_MINIBATCHES = 3
_KEPT = (
  'reward/mean',
  'rollout/length',
  'entropy',
  'kl/all',
  'grpo/ratio_mean',
  'grpo/ratio_max',
  'grpo/log_ratio_mean',
  'grpo/log_ratio_abs_mean',
  'grpo/clip_fraction',
  'grpo/masked_fraction',
  'grad_norm/main',
  'grad_norm/indexer',
  'mismatch/routing',
  'mismatch/selection',
  'sampler/log_ratio_abs_mean',
  'sampler/ratio_max',
)
_DIGITS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regime:
  """How far sampler and trainer are apart.

  Attributes:
    staleness: rollouts are drawn with the weights of so many steps ago.
    precision: of the sampler.
    top_p: nucleus that tokens are drawn from.
    kl_strength: None takes the base configuration's.
    variants: that are run in it; None takes all that can make a difference.
  """

  staleness: int = 0
  precision: SamplerPrecision = 'same'
  top_p: float = 1.0
  kl_strength: float | None = None
  variants: tuple[str, ...] | None = None

  def __post_init__(self):
    unknown = set(self.variants or ()) - set(VARIANTS)
    if unknown:
      raise ValueError(
        f'variants: got {sorted(unknown)}, expected some of {list(VARIANTS)}'
      )


REGIMES: dict[str, Regime] = {
  # Replay changes nothing here: sampler and trainer choose alike.
  'on_policy': Regime(variants=('all_on', 'no_unbiased_kl', 'all_off')),
  'stale': Regime(staleness=8),
  'bf16': Regime(precision='bfloat16', variants=('all_on', 'all_off')),
  'fp8': Regime(precision='fp8'),
  'top_p': Regime(
    top_p=0.9, variants=('all_on', 'no_keep_sampling_mask', 'all_off')
  ),
  'all_three': Regime(staleness=8, precision='fp8', top_p=0.9),
  'stale_strong_kl': Regime(
    staleness=8, kl_strength=0.5, variants=('all_on', 'no_unbiased_kl')
  ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
  """One run."""

  regime: str
  variant: str
  seed: int

  @property
  def key(self) -> str:
    return f'{self.regime}/{self.variant}/{self.seed}'


def cells(regimes: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
  """All cells that differ: seed by seed, so an early end leaves whole ones.

  Without a nucleus there are no kept sets, so keep_sampling_mask on and off are
  the same run; only 'on' is listed.

  Raises:
    ValueError: for a regime that there is not.
  """
  found = []
  for name in regimes:
    if name not in REGIMES:
      raise ValueError(
        f'regimes: got {name!r}, expected some of {list(REGIMES)}'
      )
  for seed in seeds:
    for name in regimes:
      regime = REGIMES[name]
      for variant in regime.variants or VARIANTS:
        if variant != 'no_keep_sampling_mask' or regime.top_p < 1:
          found.append(Cell(regime=name, variant=variant, seed=seed))
  return found


def config_of(base: RLConfig, cell: Cell) -> RLConfig:
  """The configuration of a cell.

  Args:
    base: one minibatch a rollout batch, so that staleness counts steps.
    cell: what is changed.

  Raises:
    ValueError: for a base with more minibatches.
  """
  if base.update.minibatches != 1:
    raise ValueError(
      f'update.minibatches: got {base.update.minibatches}, expected 1 (the '
      'regime says how stale rollouts are)'
    )
  regime = REGIMES[cell.regime]
  strength = regime.kl_strength
  off: dict[str, Any] = dict.fromkeys(VARIANTS[cell.variant], False)
  return dataclasses.replace(
    base,
    seed=cell.seed,
    rollout=dataclasses.replace(
      base.rollout,
      staleness=regime.staleness,
      precision=regime.precision,
      top_p=regime.top_p,
      # Bounds what is recorded of a nucleus; a nucleus is far smaller here.
      top_k=base.rollout.top_k if regime.top_p < 1 else None,
    ),
    grpo=dataclasses.replace(
      base.grpo,
      **off,
      kl_strength=base.grpo.kl_strength if strength is None else strength,
    ),
  )


class Lab:
  """Runs cells one after the other; compiles what they share once."""

  def __init__(
    self,
    base: RLConfig,
    workdir: pathlib.Path,
    *,
    report: Callable[[str], None] = print,
  ):
    """Prepares nothing yet.

    Args:
      base: what all cells share.
      workdir: gets a start for each seed, see `rl.start`.
      report: receives lines for the user.
    """
    self._base = base
    self._workdir = pathlib.Path(workdir)
    self._report = report
    self._starts: dict[int, tuple[Start, dict]] = {}
    self._before: dict[int, dict[str, float]] = {}
    self._samplers: dict[str, rollout.Sampler] = {}
    self._steps: dict[Any, Callable] = {}
    self._scores: dict[Any, Callable] = {}

  def run(self, cell: Cell) -> dict[str, Any]:
    """Runs a cell from its start to its last step, or to where it diverges.

    Returns:
      JSON values: `cell`, `regime`, `variant`, `seed`, `settings`, `before` and
      `after` (held-out accuracy), `diverged` (the step, or None), `seconds`,
      and `series`: a list of values a step for each metric, None where it was
      not measured.
    """
    began = time.perf_counter()
    config = config_of(self._base, cell)
    with tempfile.TemporaryDirectory() as folder:
      run = _Run(self, config, pathlib.Path(folder))
      lines, diverged = run.train()
      after = None if diverged is not None else run.accuracy()
    series = {
      name: [_rounded(line.get(name)) for line in lines] for name in _KEPT
    }
    regime = dataclasses.asdict(REGIMES[cell.regime])
    regime.pop('variants')
    return {
      'cell': cell.key,
      **dataclasses.asdict(cell),
      'settings': regime
      | {'kl_strength': config.grpo.kl_strength}
      | {switch: getattr(config.grpo, switch) for switch in SWITCHES},
      'steps': config.batches,
      'before': run.before,
      'after': after,
      'diverged': diverged,
      'seconds': time.perf_counter() - began,
      'series': series,
    }

  def before(
    self, seed: int, measure: Callable[[], dict[str, float]]
  ) -> dict[str, float]:
    """Held-out accuracy of a seed's start, measured once."""
    if seed not in self._before:
      self._before[seed] = measure()
    return self._before[seed]

  def start(self, config: RLConfig) -> tuple[Start, dict]:
    """The start of a seed, with its variables on the host."""
    if config.seed not in self._starts:
      folder = self._workdir / f'start_{config.seed}'
      folder.mkdir(parents=True, exist_ok=True)
      with (folder / 'lock').open('w') as lock:
        # Of several processes one makes it, and the others find it done.
        fcntl.flock(lock, fcntl.LOCK_EX)
        start = Start(config, folder, report=self._report)
      variables = start.variables(DeepSeekV32(config.rl_model), None)
      self._starts[config.seed] = start, jax.device_get(variables)
    return self._starts[config.seed]

  def sampler(self, config: RLConfig, variables: dict) -> rollout.Sampler:
    """The sampler of a precision, with these variables.

    It records everything, whether the trainer replays it or not: then it is one
    program, and what would have differed is known.
    """
    key = config.rollout.precision
    if key not in self._samplers:
      start, _ = self.start(config)
      everything = dataclasses.replace(
        config.grpo,
        keep_routing=True,
        keep_selection=True,
        keep_sampling_mask=True,
      )
      limited = dataclasses.replace(config.rollout, top_p=0.5)
      self._samplers[key] = rollout.Sampler(
        config.rl_model,
        variables,
        config.rollout,
        start.tokenizer,
        max_tokens=config.update.max_prompt_tokens + config.max_new_tokens,
        record=rollout.record_of(everything, limited),
      )
    self._samplers[key].update(variables)
    return self._samplers[key]

  def step(
    self, config: RLConfig, tx: Any, carry: Any, batch: batches.TrainingBatch
  ) -> Callable:
    """The compiled step of a variant."""
    key = (_switches(config), batch.kept_BTK is None, config.batches)
    if key not in self._steps:
      step = step_lib.make_rl_step(
        DeepSeekV32(config.rl_model), config.grpo, tx
      )
      self._steps[key] = compiled_step.compile_step(
        lambda state, batch, key: step(state, batch),
        carry,
        batch,
        jax.random.key(0),
      )
    return self._steps[key]

  def score(self, config: RLConfig) -> Callable:
    """Scores with a variant's replays."""
    key = _switches(config)[2:]
    if key not in self._scores:
      model = DeepSeekV32(config.rl_model)
      self._scores[key] = jax.jit(step_lib.make_score_fn(model, config.grpo))
    return self._scores[key]


class _Run:
  """One cell's run."""

  def __init__(self, lab: Lab, config: RLConfig, folder: pathlib.Path):
    self._lab, self._config = lab, config
    self._model = DeepSeekV32(config.rl_model)
    self._prompts = Prompts(config)
    self._rewards = RewardModel(
      config.rewards,
      max_new_tokens={
        name: self._prompts.max_new_tokens(name)
        for name in self._prompts.domains
      },
    )
    self._store = store.RolloutStore(folder)
    self._collector = Collector(
      config, self._prompts, self._rewards, self._store
    )
    stage = step_lib.rl_stage(config.grpo, config.rl_model)
    update = config.update
    settings = {'main': update.optimizer, 'indexer': update.indexer_optimizer}
    self._tx = optimizer.for_groups(settings, config.steps, stage)
    # Arrays of its own: steps donate them.
    _, variables = lab.start(config)
    variables = jax.tree.map(jnp.array, variables)
    self._reference = jax.tree.map(jnp.array, variables)
    state = state_lib.create(variables, stage, self._tx, None)
    self._carry: Any = compiled_step.place_state(
      (state, np.asarray(True)), None
    )
    self.before = lab.before(config.seed, self.accuracy)

  def train(self) -> tuple[list[dict[str, float]], int | None]:
    """A line a step, and the step that was not finite."""
    config = self._config
    ahead = config.rollout.staleness
    lines: list[dict[str, float]] = []
    try:
      for number in range(config.batches):
        first = number if number == 0 else number + ahead
        sampler = self._lab.sampler(config, self._variables)
        for wanted in range(first, min(number + ahead + 1, config.batches)):
          self._collector.collect(
            wanted,
            sampler,
            weight_version=number,
            inspect=lambda groups, n=wanted: self._drift(groups, n),
          )
        line = self._step(number)
        lines.append(line)
        if not all(np.isfinite(line[n]) for n in compiled_step.watched(line)):
          return lines, number + 1
    except rollout.SamplingError:
      return lines, len(lines)
    return lines, None

  @property
  def _variables(self) -> dict:
    return self._carry[0].variables

  def _step(self, number: int) -> dict[str, float]:
    config = self._config
    found = self._collector.find(number)
    assert found is not None
    batch = self._packed(found.groups, number)
    scores = self._lab.score(config)(self._reference, batch)
    batch = dataclasses.replace(batch, ref_logprob_BT=scores.ref_logprob_BT)
    step = self._lab.step(config, self._tx, self._carry, batch)
    self._carry, values = step(self._carry, batch, jax.random.key(0))
    self._store.remove(store.batch_name(number))
    values = {k: float(v) for k, v in jax.device_get(values).items()}
    return {**found.metrics, **values}

  def _packed(self, groups: Any, number: int) -> batches.TrainingBatch:
    config = self._config
    (samples,) = batches.minibatches(
      batches.samples(groups, config.grpo),
      1,
      seed=(config.seed, _MINIBATCHES, number),
    )
    host = batches.make_batch(
      samples,
      model=config.rl_model,
      grpo=config.grpo,
      rows=config.most_rows,
      row_tokens=config.row_tokens,
      domains=self._prompts.domains,
      num_responses=config.responses_per_minibatch,
      kept_cap=config.kept_cap,
    )
    return batches.place(host, None)

  def _drift(self, groups: Any, number: int) -> dict[str, float]:
    """Sampler against trainer at the same weights, in some of the batches."""
    if number % 4:
      return {}
    batch = self._packed(groups, number)
    scores = self._lab.score(self._config)(self._variables, batch)
    return {k: float(v) for k, v in jax.device_get(scores.metrics).items()}

  def accuracy(self) -> dict[str, float]:
    """On held-out problems, by the trainer's own precision and all tokens."""
    config = self._config
    same = dataclasses.replace(
      config, rollout=dataclasses.replace(config.rollout, precision='same')
    )
    sampler = self._lab.sampler(same, self._variables)
    passed: list[int] = []
    for domain in self._prompts.domains:
      found = held_out.evaluate(
        sampler,
        self._rewards,
        self._prompts.held_out(domain, config.evaluation.problems),
        samples=1,
        sampling=Sampling(temperature=1.0),
        max_new_tokens=self._prompts.max_new_tokens(domain),
        seed=config.seed,
      )
      passed += found['passed']
    return {'pass@1': sum(passed) / len(passed), 'n': len(passed)}


def _switches(config: RLConfig) -> tuple[bool, ...]:
  return tuple(getattr(config.grpo, switch) for switch in SWITCHES)


def _rounded(value: float | None) -> float | None:
  return None if value is None else float(f'{value:.{_DIGITS}g}')
