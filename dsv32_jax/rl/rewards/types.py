"""What is scored, and what comes of it."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from dsv32_jax.chat import Message, ParseErrorCode
from dsv32_jax.inference.requests import FinishReason
from dsv32_jax.rl.problems import Problem


class Sampled(NamedTuple):
  """A response as it was sampled.

  Attributes:
    tokens: what the policy sampled; its length is what the penalty counts.
    text: the same as text, control strings spelt (`ControlTokens.decode`).
    finish_reason: why it ended.
  """

  tokens: Sequence[int]
  text: str
  finish_reason: FinishReason = 'stop'


@dataclasses.dataclass(frozen=True)
class Job:
  """A response that parsed, to be marked by its problem's scorer."""

  problem: Problem
  message: Message


@dataclasses.dataclass(frozen=True)
class Mark:
  """A scorer's verdict.

  Attributes:
    score: 0 to 1.
    error: why the scorer gave none, in one line; the score is then 0.
    components: what else the scorer measured, each 0 to 1, for the log.
  """

  score: float
  error: str | None = None
  components: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
  """What a response earns.

  Attributes:
    total: the reward.
    components: 'outcome', 'format', 'language', 'length' (the penalty, which is
      subtracted), each 0 to 1 before its weight; and what its scorer adds.
    parse_error: how the response breaks the grammar, or None.
    error: why its scorer failed, or None; 'outcome' is then 0.
    message: the response as a message, or None if it does not parse.
  """

  total: float
  components: dict[str, float]
  parse_error: ParseErrorCode | None = None
  error: str | None = None
  message: Message | None = None
