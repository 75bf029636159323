"""Samples responses through the inference engine, with the weights of the time.

The sampler is an engine of its own: it may compute in another precision than
the trainer and sit on other devices. Tokens go in and tokens come out; text is
made of them for scoring only.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from dsv32_jax import chat
from dsv32_jax.config.model import ModelConfig, Precision
from dsv32_jax.config.rl import GRPOConfig
from dsv32_jax.config.rollout import RolloutConfig
from dsv32_jax.functional import quantization
from dsv32_jax.inference.engine import Engine
from dsv32_jax.inference.engine_config import EngineConfig
from dsv32_jax.inference.requests import Completion, Record, Request
from dsv32_jax.inference.sampling import Sampling
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.rl.problems import Problem
from dsv32_jax.sharding import parallel as parallel_lib
from dsv32_jax.sharding.parallel import Parallel
from dsv32_jax.training import state as state_lib

OnProgress = Callable[[int, int], None]
"""Called with (responses that are done, responses asked for)."""

# Longer responses take wider tables, with a program each.
_TABLE_TOKENS = 512
_NO_RECORD = Record()
_FP8_BLOCK = (128, 128)
# Dims of either side of the matrices that the published checkpoint has in FP8.
_FP8_MATRICES = {
  **dict.fromkeys('w_dq w_dkv w_kr w_ik w_gate w_up w_down'.split(), (1, 1)),
  **dict.fromkeys('w_uq w_qr w_uk w_uv w_iq'.split(), (1, 2)),
  'w_o': (2, 1),
}


class SamplingError(RuntimeError):
  """The sampler's weights gave values that are not finite."""


def record_of(grpo: GRPOConfig, rollout: RolloutConfig) -> Record:
  """What training needs to replay of each token."""
  return Record(
    experts=grpo.keep_routing,
    kept=grpo.keep_sampling_mask and rollout.truncates,
    selected=grpo.keep_selection,
  )


def sampling_of(config: RolloutConfig) -> Sampling:
  """How the tokens of rollouts are drawn."""
  return Sampling(
    temperature=config.temperature, top_p=config.top_p, top_k=config.top_k
  )


class Sampler:
  """Draws responses to problems.

  Attributes:
    tokenizer: of the model.
  """

  def __init__(
    self,
    model: ModelConfig,
    variables: dict,
    config: RolloutConfig,
    tokenizer: chat.ChatTokenizer,
    *,
    max_tokens: int,
    record: Record = _NO_RECORD,
    parallel: Parallel | None = None,
  ):
    """Takes memory for all responses that are sampled at a time.

    Args:
      model: the trainer's architecture.
      variables: the trainer's; they are copied.
      config: sizes, precision.
      tokenizer: of the model.
      max_tokens: of the longest prompt and response together.
      record: what is kept of each token. The same for all that is sampled, so
        that there is one program.
      parallel: the sampler's devices; None is the default device.

    Raises:
      ValueError: sizes that do not fit the model or the devices.
    """
    self.tokenizer = tokenizer
    self._controls = chat.ControlTokens.from_tokenizer(tokenizer)
    self._config = config
    self._record = record
    self._parallel = parallel
    # What is handed over is laid out as the trainer's; then it is cast.
    self._model = DeepSeekV32(sampler_model(model, config.precision))
    # Once: it traces the whole model.
    self._shapes = state_lib.variable_shapes(self._model, parallel)
    with parallel_lib.use(parallel):
      self._engine = Engine(
        self._model,
        self._received(variables),
        EngineConfig(
          max_batch=config.max_batch,
          # All are submitted at once.
          max_waiting=2**31,
          page_size=min(config.page_size, max_tokens),
          max_tokens=max_tokens,
          prefill_chunk=config.prefill_chunk,
          prefill_rows=config.prefill_rows,
          fill_first=True,
          table_tokens=min(max_tokens, _TABLE_TOKENS),
          decode_steps=config.decode_steps,
          run_ahead=config.run_ahead,
          least_rows=config.least_rows,
          latent_format=config.latent_format,
          index_format=config.index_format,
        ),
      )
    # An unrolled model's engine would share the trainer's buffers.
    self.update(variables)

  def update(self, variables: dict) -> None:
    """Hands over new weights of the trainer."""
    with parallel_lib.use(self._parallel):
      self._engine.update_variables(self._received(variables))

  def release(self) -> None:
    """Gives the caches' memory back until the next `sample`."""
    self._engine.release()

  def prompt(self, problem: Problem) -> tuple[int, ...]:
    """The token ids of a problem, up to where the model goes on."""
    return tuple(
      chat.encode(
        problem.messages,
        self.tokenizer,
        mode=problem.mode,
        controls=self._controls,
      )
    )

  def text(self, completion: Completion) -> str:
    """The text of a response, control strings spelt; for scorers and people."""
    return self._controls.decode(completion.tokens, self.tokenizer)

  def sample(
    self,
    problems: Sequence[Problem],
    *,
    seeds: Sequence[int],
    max_new_tokens: Sequence[int],
    sampling: Sampling,
    on_progress: OnProgress | None = None,
  ) -> list[Completion]:
    """One response for each problem; name a problem often for a group.

    Args:
      problems: what to answer.
      seeds: of each response's draws. The same seeds, problems and weights give
        the same tokens.
      max_new_tokens: of each response.
      sampling: how tokens are drawn.
      on_progress: told how many are done.

    Returns:
      In the order of the problems.

    Raises:
      SamplingError: naming the first problem with values that are not finite.
      RequestTooLong: a prompt that leaves no room.
    """
    prompts: dict[str, tuple[int, ...]] = {}
    done = itertools.count(1)

    def ended(progress: Any) -> None:
      if progress.finish_reason is not None and on_progress is not None:
        on_progress(next(done), len(problems))

    tickets = []
    for problem, seed, count in zip(
      problems, seeds, max_new_tokens, strict=True
    ):
      if problem.id not in prompts:
        prompts[problem.id] = self.prompt(problem)
      request = Request(
        prompt=prompts[problem.id],
        max_new_tokens=count,
        sampling=sampling,
        seed=seed,
        stop_ids=(self.tokenizer.eos_id,),
        record=self._record,
      )
      tickets.append(self._engine.submit(request, ended))
    self._engine.run()
    completions = [ticket.result() for ticket in tickets]
    for problem, completion in zip(problems, completions, strict=True):
      if completion.finish_reason == 'error':
        raise SamplingError(
          f'rollout: {problem.id}: {completion.error}; the weights that the '
          'trainer handed over cannot be sampled from'
        )
    return completions

  def _received(self, variables: dict) -> dict:
    """The trainer's variables on the sampler's devices, rounded as asked."""
    shapes = self._shapes
    if self._parallel is not None:
      variables = jax.tree.map(
        lambda leaf, shape: jax.device_put(leaf, shape.sharding),
        dict(variables),
        shapes,
      )
    if self._config.precision == 'fp8':
      variables = _rounded_to_fp8(variables)
    return jax.tree.map(
      lambda leaf, shape: leaf.astype(shape.dtype), dict(variables), shapes
    )


def sampler_model(cfg: ModelConfig, precision: str) -> ModelConfig:
  """The architecture that samples, in its precision.

  'fp8' has matrices rounded to FP8 in blocks and computes in bfloat16.
  """
  if precision == 'same':
    return cfg
  dtype = 'bfloat16' if precision == 'fp8' else precision
  return dataclasses.replace(
    cfg, precision=Precision(param=dtype, compute=dtype, logits='float32')
  )


@jax.jit
def _rounded_to_fp8(variables: Mapping) -> dict:
  """Matrices of blocks as an FP8 checkpoint has them; the rest as it is."""

  def rounded(path: tuple, leaf: jax.Array) -> jax.Array:
    name = getattr(path[-1], 'key', '')
    if name not in _FP8_MATRICES:
      return leaf
    # Two of three dims make one side of the matrix; layers come before.
    first, second = _FP8_MATRICES[name]
    lead = leaf.shape[: leaf.ndim - first - second]
    sides = leaf.shape[len(lead) :]
    matrix = leaf.reshape(
      *lead, math.prod(sides[:first]), math.prod(sides[first:])
    )
    matrix = quantization.fake_quantize(matrix, block=_FP8_BLOCK)
    return matrix.reshape(leaf.shape)

  params = jax.tree_util.tree_map_with_path(rounded, variables['params'])
  return {**variables, 'params': params}


def repeated(items: Sequence, times: int) -> Iterator:
  """Each item so many times in a row."""
  for item in items:
    yield from itertools.repeat(item, times)
