"""What an agent is made of: a policy, an environment with tools, a trajectory.

Plain values and protocols. Nothing here knows a model; tokens are ids that a
policy brought along.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from dsv32_jax.chat import Message, Mode, ParseErrorCode, ToolSpec

Ending = Literal[
  'answered',
  'submitted',
  'steps',
  'tokens',
  'wall',
  'parse_error',
  'policy_error',
]
"""Why an episode ended: no more calls, a tool that ends it, a budget (steps,
tokens, wall time), a reply outside the grammar, a policy that failed."""


class ToolError(Exception):
  """What went wrong in a call; its text is the call's result."""


class PolicyError(Exception):
  """A policy that cannot reply: an endpoint that is gone, a full engine.

  Attributes:
    ending: what the episode ends with: 'policy_error', or 'wall' or 'tokens'
      for a policy that found no time or no room.
  """

  def __init__(self, reason: str, *, ending: Ending = 'policy_error'):
    super().__init__(reason)
    self.ending: Ending = ending


@runtime_checkable
class Tool(Protocol):
  """A function that a model may call.

  Attributes:
    spec: what the model is told of it.
  """

  @property
  def spec(self) -> ToolSpec: ...

  def __call__(self, arguments: Mapping[str, Any]) -> str:
    """Runs a call whose arguments fit the spec's schema.

    Raises:
      ToolError: what the model should read instead of a result.
    """
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
  """What an episode earned.

  Attributes:
    reward: 0 to 1.
    reasons: one line a check, for people.
    parts: named values behind the reward.
  """

  reward: float
  reasons: tuple[str, ...] = ()
  parts: Mapping[str, float] = dataclasses.field(default_factory=dict)


@runtime_checkable
class Environment(Protocol):
  """A task with its tools and its verifier, for one episode.

  Attributes:
    tools: what may be called, by name in `spec.name`.
    is_over: a tool has ended the episode (an answer was submitted).
  """

  @property
  def tools(self) -> Sequence[Tool]: ...

  @property
  def is_over(self) -> bool: ...

  def start(self) -> Sequence[Message]:
    """The messages that an episode begins with, the tools among them."""
    ...

  def score(self, messages: Sequence[Message]) -> Score:
    """Judges a finished episode by its messages and the environment's state."""
    ...

  def close(self) -> None:
    """Gives back what the episode held: processes, files, connections."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Query:
  """What a policy is asked.

  Attributes:
    messages: so far.
    mode: of the reply.
    tokens: ids of `messages` up to where the reply begins, with earlier replies
      as they were sampled; empty where nobody counts tokens.
    max_new_tokens: of the reply.
    seed: of the draws; one for each reply of an episode, 0 to 2**32 - 1.
    timeout_s: what is left of the episode's time; None for any.
  """

  messages: tuple[Message, ...]
  mode: Mode = 'thinking'
  tokens: tuple[int, ...] = ()
  max_new_tokens: int = 1024
  seed: int = 0
  timeout_s: int | float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
  """What a policy replied.

  Attributes:
    message: the assistant's, or None for a reply outside of the grammar.
    text: as it was written.
    error: why there is no message.
    tokens: ids as they were sampled, the end token included; empty for a policy
      that has none, whose text is then encoded.
    num_tokens: how many there were, from a policy that counts them and does not
      have them.
    was_cut: `max_new_tokens` ended it, not the policy.
    completion: what the engine recorded of them, for training; not written.
  """

  message: Message | None
  text: str = ''
  error: ParseErrorCode | None = None
  tokens: tuple[int, ...] = ()
  num_tokens: int = 0
  was_cut: bool = False
  completion: Any = None


@runtime_checkable
class Policy(Protocol):
  """Whoever replies. May be called from several threads at a time."""

  def reply(self, query: Query) -> Reply:
    """Replies.

    Raises:
      PolicyError: it cannot; the episode ends with the error's `ending`.
    """
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
  """A reply and the results of its calls.

  Attributes:
    reply: the assistant's message, or None if it did not parse.
    text: as it was written.
    results: a tool message a call, in their order.
    num_failed: calls that ended in an error.
    error: why it did not parse.
    num_tokens: of the reply: as many of the trajectory's tokens are it, or what
      the policy counted where there are none.
    seconds: of the reply and the calls.
    context: what the reply goes on from, where a strategy made that shorter;
      else empty, for all that there is.
  """

  reply: Message | None
  text: str = ''
  results: tuple[Message, ...] = ()
  num_failed: int = 0
  error: ParseErrorCode | None = None
  num_tokens: int = 0
  seconds: int | float = 0.0
  context: tuple[Message, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trajectory:
  """One episode.

  Attributes:
    task: id of the task.
    seed: of the episode.
    mode: of its replies.
    start: the messages that it began with.
    steps: in order.
    ending: why it ended.
    score: what it earned.
    tokens: ids of the whole sequence, replies as they were sampled; empty
      without a tokenizer. Appended to only.
    is_policy: of each token, whether the policy sampled it: the loss mask.
    segments: where in `tokens` another sequence begins, after a context was
      made shorter; empty for one sequence.
    completions: what the engine recorded of each reply, for training; not
      written to files.
    error: one line, with 'policy_error'.
  """

  task: str
  seed: int
  mode: Mode
  start: tuple[Message, ...]
  steps: tuple[Step, ...]
  ending: Ending
  score: Score
  tokens: tuple[int, ...] = ()
  is_policy: tuple[bool, ...] = ()
  segments: tuple[int, ...] = ()
  completions: tuple[Any, ...] = ()
  error: str = ''

  @property
  def messages(self) -> tuple[Message, ...]:
    """The conversation, without a last reply that did not parse.

    Where the context was made shorter, it is the last one and what followed.
    """
    found = list(self.start)
    for step in self.steps:
      if step.context:
        found = list(step.context)
      if step.reply is not None:
        found += [step.reply, *step.results]
    return tuple(found)
