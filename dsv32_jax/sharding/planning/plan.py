"""The whole plan of one layout: memory, collectives, time, the recipe.

plan = make_plan(request.make(preset='deepseek_v32_671b', ...))
print(render.text(plan))
"""

import dataclasses

from dsv32_jax.sharding import specs
from dsv32_jax.sharding.planning import (
  activations,
  collectives,
  hardware,
  weights,
  work,
)
from dsv32_jax.sharding.planning.request import STAGES, Request
from dsv32_jax.training import optimizer, stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
  """Bytes on one device.

  Attributes:
    parameters: with the router's biases.
    optimizer: moments and counts.
    gradients: of what trains; twice with several micro-batches, the sum and
      the newest.
    batch: a step's tokens and their weights.
    activations: of one micro-batch.
  """

  parameters: int
  optimizer: int
  gradients: int
  batch: int
  activations: activations.Activations

  @property
  def total(self) -> int:
    """At the fullest moment of a step."""
    return (
      self.parameters
      + self.optimizer
      + self.gradients
      + self.batch
      + self.activations.total
    )

  @property
  def fits(self) -> bool:
    """Whether it is at most what `hardware` allows."""
    return self.total <= hardware.MEMORY_BYTES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
  """A planned collective with its time.

  Attributes:
    planned: what is sent.
    where: between whom.
    seconds: a step, by itself.
  """

  planned: collectives.Planned
  where: hardware.Group
  seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What `make_plan` finds.

  Attributes:
    request: the layout.
    counts: parameters: 'main' (with its router biases), 'mtp', 'all'.
    memory: of one device.
    work: of one device, a step.
    messages: of one device, a step.
  """

  request: Request
  counts: dict[str, int]
  memory: Memory
  work: tuple[work.Work, ...]
  messages: tuple[Message, ...]

  @property
  def compute_seconds(self) -> float:
    """All work, one part after the other."""
    return sum(part.seconds for part in self.work)

  @property
  def hidden_seconds(self) -> float:
    """Messages that can run beside work."""
    return sum(m.seconds for m in self.messages if m.planned.hides)

  @property
  def exposed_seconds(self) -> float:
    """Messages that the next work waits for."""
    return sum(m.seconds for m in self.messages if not m.planned.hides)

  @property
  def step_seconds(self) -> float:
    """The roofline: hidden messages beside the work, the others after it."""
    return max(self.compute_seconds, self.hidden_seconds) + self.exposed_seconds

  @property
  def serial_seconds(self) -> float:
    """With no collective beside any work: the other bound."""
    return self.compute_seconds + self.hidden_seconds + self.exposed_seconds

  @property
  def step_tokens(self) -> int:
    """Tokens of a global batch."""
    data = self.request.stage.data
    return data.batch_size * data.seq_len

  @property
  def tokens_a_day(self) -> float:
    """On all devices."""
    return self.step_tokens / self.step_seconds * 86_400

  @property
  def model_flops_share(self) -> float:
    """The model's own FLOPs over the peak of the time that a step takes."""
    flops = work.model_flops(self.request)
    return flops / self.step_seconds / hardware.PEAK_BF16

  @property
  def stage_hours(self) -> float | None:
    """GPU-hours of the paper's stage of this kind; None if it has none."""
    published = STAGES.get(self.request.stage.kind)
    if published is None:
      return None
    steps = published.tokens / self.step_tokens
    return steps * self.step_seconds * self.request.num_devices / 3600


def make_plan(request: Request) -> Plan:
  """Plans one layout; no device is used, no array is made.

  Raises:
    ValueError: naming what the mesh cannot divide.
  """
  state = weights.build(request)
  stage = stages.build(request.stage, request.model)
  trainable, _ = optimizer.split(state.variables['params'], stage)
  gradients = specs.bytes_a_device(trainable)
  parameters = specs.bytes_a_device(state.variables)
  moments = specs.bytes_a_device(state.opt_state)
  data, parallel = request.stage.data, request.parallel
  memory = Memory(
    parameters=parameters,
    optimizer=moments,
    gradients=gradients * (1 + (request.stage.micro_batches > 1)),
    batch=data.batch_size // parallel.shards('batch') * data.seq_len * 5 * 4,
    activations=activations.estimate(request, state.weights),
  )
  updated = specs.bytes_a_device(trainable) + gradients + moments
  return Plan(
    request=request,
    counts=_counts(state),
    memory=memory,
    work=tuple(work.step(request, updated)),
    messages=tuple(
      _message(request, planned)
      for planned in collectives.plan(request, state.weights)
    ),
  )


def _message(request: Request, planned: collectives.Planned) -> Message:
  where = hardware.group(request.sizes, planned.axes)
  seconds = hardware.seconds(planned.kind, planned.bytes, where) * planned.count
  return Message(planned=planned, where=where, seconds=seconds)


def _counts(state: weights.State) -> dict[str, int]:
  """Parameters of the main model, of the MTP module, and together."""
  counts = {'main': 0, 'mtp': 0}
  for tree in state.variables.values():
    for name, part in tree.items():
      counts['mtp' if name == 'mtp' else 'main'] += weights.count(part)
  return counts | {'all': sum(counts.values())}
