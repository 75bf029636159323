"""Where RL starts from: a checkpoint, or stages that are run first."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

from dsv32_jax import data
from dsv32_jax.checkpoints import load_params
from dsv32_jax.config import convert
from dsv32_jax.config.rl import RLConfig
from dsv32_jax.config.training import RunConfig
from dsv32_jax.data.tokenizer import Tokenizer, check_vocab
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.rl import demonstrations, ledger
from dsv32_jax.sharding.parallel import Parallel
from dsv32_jax.training import recipe
from dsv32_jax.training import state as state_lib

_TOKENIZER = 'tokenizer'


class Start:
  """The parameters, tokenizer and cost that a run starts with.

  Attributes:
    tokenizer: of the model.
    flops: FLOPs behind the parameters; 0 if unknown.
  """

  def __init__(
    self,
    config: RLConfig,
    workdir: pathlib.Path,
    *,
    report: Callable[[str], None],
  ):
    """Runs what has to be run; later calls find it done.

    Args:
      config: of RL.
      workdir: of RL; the stages are run in `start/`.
      report: receives lines for the user.

    Raises:
      ValueError: a checkpoint without a tokenizer, or stages that do not run.
    """
    self._config = config
    self._report = report
    if config.init_from is None:
      self._path = self._run_stages(workdir)
    else:
      self._path = pathlib.Path(config.init_from).absolute()
      if not self._path.exists():
        raise ValueError(
          f'init_from: got {config.init_from!r}, expected a checkpoint, or the '
          'directory of a stage or of an RL run'
        )
    self.tokenizer = self._find_tokenizer()
    check_vocab(self.tokenizer, config.model.vocab_size)
    if not (workdir / _TOKENIZER).exists():
      self.tokenizer.save(str(workdir / _TOKENIZER))
    self.flops = self._find_flops()

  def variables(self, model: DeepSeekV32, parallel: Parallel | None) -> dict:
    """The parameters, laid out for training."""
    shapes = state_lib.variable_shapes(model, parallel)
    return load_params(self._path, shapes, report=self._report).state

  def _run_stages(self, workdir: pathlib.Path) -> pathlib.Path:
    config = self._config
    directory = workdir / 'demonstrations'
    last = workdir / 'start' / 'stages' / config.order[-1]
    if (last / 'stage.json').exists():
      return last
    for name, parts in config.demonstrations.items():
      demonstrations.write(
        directory / f'{name}.jsonl',
        [demonstrations.part(part) for part in parts],
        seed=config.seed,
      )
    run = recipe.Run(
      config.start_run(str(directory)), workdir / 'start', report=self._report
    )
    run.run()
    return last

  def _find_tokenizer(self) -> Tokenizer:
    """The one of the run that the checkpoint is of."""
    for directory in (self._path, *self._path.parents):
      if (directory / _TOKENIZER).is_dir():
        return data.load_tokenizer(str(directory / _TOKENIZER))
    raise ValueError(
      f'init_from: found no {_TOKENIZER}/ in {self._path} or above it, '
      'expected the work directory of a run'
    )

  def _find_flops(self) -> float:
    config = self._config
    if config.pretraining_flops:
      return config.pretraining_flops
    if config.order:
      return sum(ledger.recipe_flops(config.start_run()).values())
    return _recorded_flops(self._path)


def _recorded_flops(path: pathlib.Path) -> float:
  """From the config of the recipe that a stage belongs to; 0 without one."""
  for directory in (path, *path.parents):
    origin = directory / 'config.json'
    if not origin.is_file():
      continue
    content: Any = json.loads(origin.read_text(encoding='utf-8'))
    try:
      run = convert.from_dict(RunConfig, content['config'])
    except (KeyError, TypeError, ValueError):
      return 0.0
    found = ledger.recipe_flops(run)
    # Stages up to the one that is taken, by way of their starts.
    name: str | None = path.name
    total = 0.0
    while name in found:
      total += found[name]
      name = run.stages[name].init_from
    return total
  return 0.0
