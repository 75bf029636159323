"""What was sampled and what it earned, on the host.

A response is one append-only sequence of tokens: the prompt, what the policy
sampled, what tools answered, what it sampled next. It is never decoded and
encoded again ("token in, token out"), so that training scores the very tokens
that were drawn.

Letters: T tokens, N sampled tokens, L layers with experts, A experts a token,
K selected keys.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsv32_jax.inference.requests import Completion, FinishReason


@dataclasses.dataclass(frozen=True, kw_only=True)
class Response:
  """A prompt and everything that followed it, with what sampling recorded.

  The last token is never fed to the model, so what is recorded of fed tokens
  has T - 1 rows.

  Attributes:
    tokens: int32 [T].
    is_policy: bool [T], tokens that the policy sampled.
    sampling_logprobs: float32 [T], of sampled tokens under the distribution
      that each was drawn from; 0 elsewhere.
    finish_reason: why the last turn ended.
    kept: for each sampled token the ids that could have been drawn, or None
      where all could; None: not recorded.
    experts: int [T - 1, L, A], the experts of each fed token; -1 where they are
      not known; None: not recorded.
    selected: int [T - 1, layers, K], the keys that each fed token attended to,
      as positions in the sequence, -1 for none; None: not recorded.
    temperature: of the draws.
    weight_version: of the parameters that sampled the last turn.

  Raises:
    ValueError: parts that do not fit each other, or a sampled token that is
      not among those that could have been drawn.
  """

  tokens: np.ndarray
  is_policy: np.ndarray
  sampling_logprobs: np.ndarray
  finish_reason: FinishReason
  kept: tuple[np.ndarray | None, ...] | None = None
  experts: np.ndarray | None = None
  selected: np.ndarray | None = None
  temperature: int | float = 1.0
  weight_version: int = 0

  def __post_init__(self):
    tokens = np.asarray(self.tokens, np.int32)
    object.__setattr__(self, 'tokens', tokens)
    object.__setattr__(self, 'is_policy', np.asarray(self.is_policy, np.bool_))
    object.__setattr__(
      self, 'sampling_logprobs', np.asarray(self.sampling_logprobs, np.float32)
    )
    if tokens.ndim != 1 or tokens.size < 2:
      raise ValueError(
        f'tokens: got shape {tokens.shape}, expected [T] of at least 2'
      )
    for name in ('is_policy', 'sampling_logprobs'):
      shape = getattr(self, name).shape
      if shape != tokens.shape:
        raise ValueError(f'{name}: got shape {shape}, expected {tokens.shape}')
    if self.is_policy[0]:
      raise ValueError(
        'is_policy: got True for the first token, expected a prompt before it'
      )
    if not np.all(np.isfinite(self.sampling_logprobs)):
      raise ValueError(
        'sampling_logprobs: got a value that is not finite, expected numbers'
      )
    if not self.temperature > 0:
      raise ValueError(
        f'temperature: got {self.temperature}, expected a positive number (a '
        'greedy response has no distribution to learn from)'
      )
    self._check_kept()
    for name in ('experts', 'selected'):
      value = getattr(self, name)
      if value is not None and (
        value.ndim != 3 or value.shape[0] != tokens.size - 1
      ):
        raise ValueError(
          f'{name}: got shape {value.shape}, expected [{tokens.size - 1}, '
          'layers, choices]: one row for each token but the last'
        )

  @classmethod
  def from_completion(
    cls,
    completion: Completion,
    *,
    weight_version: int = 0,
    temperature: int | float = 1.0,
    is_truncated: bool = True,
  ) -> 'Response':
    """From one answer of the engine.

    Args:
      completion: with whatever the request asked to record.
      weight_version: of the engine's parameters.
      temperature: of the request.
      is_truncated: False for a request without top-k, top-p and min-p: all
        tokens could be drawn, recorded or not.

    Raises:
      ValueError: a completion without tokens, or one that ended in an error.
    """
    _check_completion(completion)
    num_prompt, num_new = len(completion.prompt), len(completion.tokens)
    kept = completion.kept
    if not is_truncated:
      kept = (None,) * num_new
    return cls(
      tokens=np.array(completion.prompt + completion.tokens, np.int32),
      is_policy=np.arange(num_prompt + num_new) >= num_prompt,
      sampling_logprobs=np.concatenate(
        [
          np.zeros(num_prompt, np.float32),
          np.array(completion.sampling_logprobs, np.float32),
        ]
      ),
      finish_reason=completion.finish_reason,
      kept=kept,
      experts=_fed('experts', completion),
      selected=_fed('selected', completion),
      temperature=temperature,
      weight_version=weight_version,
    )

  def continued(
    self,
    completion: Completion,
    *,
    weight_version: int | None = None,
    is_truncated: bool = True,
  ) -> 'Response':
    """The response with a further turn.

    Tokens between the last sampled one and the new ones (a tool's answer, the
    next question) are fed, and learned from by nobody. Of tokens that were fed
    before, the first record stands: it is what the sampling of the first turn
    depended on.

    Args:
      completion: its prompt begins with all tokens of this response.
      weight_version: of the parameters that sampled it; None: the same.
      is_truncated: see `from_completion`.

    Raises:
      ValueError: if the prompt does not begin so, or the turns were recorded
        differently.
    """
    _check_completion(completion)
    before = self.tokens.size
    prompt = np.array(completion.prompt, np.int32)
    if prompt.size < before or np.any(prompt[:before] != self.tokens):
      raise ValueError(
        f'completion: got a prompt of {prompt.size} tokens that does not begin '
        f'with the {before} tokens so far, expected them unchanged'
      )
    turn = Response.from_completion(
      completion, temperature=self.temperature, is_truncated=is_truncated
    )
    joined: dict[str, Any] = {}
    for name in ('kept', 'experts', 'selected'):
      old, new = getattr(self, name), getattr(turn, name)
      if (old is None) != (new is None):
        raise ValueError(
          f'{name}: got it recorded for one turn only, expected all or none'
        )
      if old is None:
        joined[name] = None
      elif name == 'kept':
        joined[name] = old + new
      else:
        joined[name] = _joined(old, new)
    return dataclasses.replace(
      turn,
      is_policy=np.concatenate([self.is_policy, turn.is_policy[before:]]),
      sampling_logprobs=np.concatenate(
        [self.sampling_logprobs, turn.sampling_logprobs[before:]]
      ),
      weight_version=(
        self.weight_version if weight_version is None else weight_version
      ),
      **joined,
    )

  @property
  def num_policy_tokens(self) -> int:
    """N, what a mean over the response divides by."""
    return int(np.sum(self.is_policy))

  @property
  def prompt_length(self) -> int:
    """Tokens before the first sampled one."""
    is_policy = self.is_policy
    return int(np.argmax(is_policy)) if np.any(is_policy) else is_policy.size

  @property
  def policy_tokens(self) -> np.ndarray:
    """int32 [N], the sampled tokens."""
    return self.tokens[self.is_policy]

  def _check_kept(self) -> None:
    if self.kept is None:
      return
    kept = tuple(
      None if ids is None else np.asarray(ids, np.int32) for ids in self.kept
    )
    object.__setattr__(self, 'kept', kept)
    if len(kept) != self.num_policy_tokens:
      raise ValueError(
        f'kept: got {len(kept)} sets for {self.num_policy_tokens} sampled '
        'tokens, expected one for each'
      )
    sets = [(n, ids) for n, ids in enumerate(kept) if ids is not None]
    if not sets:
      return
    sizes = np.array([ids.size for _, ids in sets])
    drawn = self.policy_tokens[[number for number, _ in sets]]
    is_drawn = np.concatenate([ids for _, ids in sets]) == np.repeat(
      drawn, sizes
    )
    ends = np.concatenate([[0], np.cumsum(is_drawn)])[np.cumsum(sizes)]
    missing = np.flatnonzero(np.diff(ends, prepend=0) != 1)
    if missing.size:
      number, ids = sets[missing[0]]
      raise ValueError(
        f'kept: got {np.sum(ids == drawn[missing[0]])} times token '
        f'{drawn[missing[0]]} in the set of sampled token {number}, expected '
        'it once: it was drawn from that set'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
  """A response and what it earned.

  Attributes:
    response: what was sampled.
    reward: the sum that the advantage is made of.
    components: what it is a sum of, for reports.
  """

  response: Response
  reward: int | float
  components: Mapping[str, int | float] = dataclasses.field(
    default_factory=dict
  )

  def __post_init__(self):
    if not np.isfinite(self.reward):
      raise ValueError(f'reward: got {self.reward}, expected a finite number')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
  """The responses to one prompt.

  Attributes:
    problem: its id.
    domain: such as 'mathematics'.
    mode: 'thinking' or 'chat'.
    responses: at least one.
  """

  problem: str
  domain: str
  mode: str
  responses: tuple[Scored, ...]

  def __post_init__(self):
    if not self.responses:
      raise ValueError(
        f'responses: got none for problem {self.problem!r}, expected at least 1'
      )

  @property
  def rewards(self) -> np.ndarray:
    """float64 [G]."""
    return np.array([scored.reward for scored in self.responses], np.float64)

  @property
  def has_equal_rewards(self) -> bool:
    """Whether all advantages are 0, so that only the KL term moves anything."""
    return bool(np.all(self.rewards == self.rewards[0]))


def _check_completion(completion: Completion) -> None:
  if completion.finish_reason == 'error':
    raise ValueError(
      f'completion: got one that ended in an error ({completion.error}), '
      'expected a sampled response'
    )
  if not completion.tokens:
    raise ValueError('completion: got no new token, expected at least one')


def _fed(name: str, completion: Completion) -> np.ndarray | None:
  """What is recorded of the prompt's tokens but the last, and of the rest."""
  prompt, new = getattr(completion, f'prompt_{name}'), getattr(completion, name)
  if new is None:
    return None
  if prompt is None:
    if len(completion.prompt) > 1:
      raise ValueError(
        f'prompt_{name}: got None with {name} recorded, expected a row for '
        'each token of the prompt but the last'
      )
    return new
  return _stacked((prompt, new))


def _joined(old: np.ndarray, new: np.ndarray) -> np.ndarray:
  """The first record of each token; rows of the first turn, then the rest."""
  return _stacked((old, new[old.shape[0] :]))


def _stacked(parts: Sequence[np.ndarray]) -> np.ndarray:
  """Joins along the first dim; the last is filled up with -1.

  A later turn has longer tables of pages and may select from more keys.
  """
  width = max(part.shape[-1] for part in parts)
  return np.concatenate(
    [
      np.pad(
        part,
        ((0, 0), (0, 0), (0, width - part.shape[-1])),
        constant_values=-1,
      )
      for part in parts
    ]
  )
