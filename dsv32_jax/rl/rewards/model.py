"""The rewards of a batch of responses."""

from collections.abc import Mapping, Sequence

from dsv32_jax import chat
from dsv32_jax.config.rewards import DomainReward, RewardConfig
from dsv32_jax.rl.problems import Problem
from dsv32_jax.rl.rewards import scorers
from dsv32_jax.rl.rewards.language import check_language, consistency
from dsv32_jax.rl.rewards.length import length_penalty
from dsv32_jax.rl.rewards.tools import Tools
from dsv32_jax.rl.rewards.types import Job, Mark, Outcome, Sampled


class RewardModel:
  r"""Scores responses by rules and rubrics (arXiv:2512.02556, section 3).

  A response that does not parse has outcome 0. So has one whose scorer raises,
  hangs or dies, which is told in `Outcome.error` and costs nothing else.

  >>> from dsv32_jax.rl import problems
  >>> problem = problems.make('mathematics', seed=1).problem('train', 0)
  >>> right = rf'\boxed{{{problem.reference["answer"]}}}<｜end▁of▁sentence｜>'
  >>> wrong = r'\boxed{0.1}<｜end▁of▁sentence｜>'
  >>> with RewardModel(RewardConfig(), max_new_tokens=8) as rewards:
  ...   outcomes = rewards.score(
  ...     [problem] * 2, [([1, 2], right, 'stop'), ([1, 2], wrong, 'stop')]
  ...   )
  >>> [outcome.total for outcome in outcomes]
  [1.0, 0.0]
  """

  def __init__(
    self,
    config: RewardConfig,
    *,
    max_new_tokens: int | Mapping[str, int],
  ):
    """Starts nothing yet.

    Args:
      config: weights, and how scorers are run.
      max_new_tokens: the longest response, or that of each domain: where a
        domain's `max_length` is None, the length penalty ends there.

    Raises:
      ValueError: for a language that cannot be told.
    """
    for reward in (config.default, *config.domains.values()):
      check_language(reward.language)
    self._config = config
    self._max_new_tokens = max_new_tokens
    self._tools = Tools(config)

  def score(
    self,
    problems: Sequence[Problem],
    responses: Sequence[Sampled | tuple],
  ) -> list[Outcome]:
    """The outcome of each response.

    Args:
      problems: one for each response.
      responses: (tokens, text, finish reason) of each.

    Returns:
      In the same order; the same for the same responses, whatever else is in
      the batch.

    Raises:
      ValueError: for counts that differ and scorers that do not exist.
    """
    if len(problems) != len(responses):
      raise ValueError(
        f'responses: got {len(responses)} for {len(problems)} problems, '
        'expected one each'
      )
    read = _Reader()
    samples = [Sampled._make(response) for response in responses]
    parsed = [
      read(problem, sample.text)
      for problem, sample in zip(problems, samples, strict=True)
    ]
    marks = self._marks(problems, parsed)
    return [
      self._outcome(problem, sample, message, mark)
      for problem, sample, message, mark in zip(
        problems, samples, parsed, marks, strict=True
      )
    ]

  def close(self) -> None:
    """Ends scoring processes and sandboxes."""
    self._tools.close()

  def __enter__(self) -> 'RewardModel':
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _marks(
    self,
    problems: Sequence[Problem],
    parsed: Sequence[chat.Message | chat.ParseError],
  ) -> list[Mark]:
    """Marks equal answers to a problem once."""
    jobs: dict[str, dict[tuple[str, str], Job]] = {}
    for problem, message in zip(problems, parsed, strict=True):
      if isinstance(message, chat.Message):
        named = jobs.setdefault(problem.scorer, {})
        named.setdefault((problem.id, message.content), Job(problem, message))
    marks: dict[tuple[str, str], Mark] = {}
    for name, named in jobs.items():
      found = scorers.find(name)(list(named.values()), self._tools)
      marks.update(zip(named, found, strict=True))
    return [
      marks[problem.id, message.content]
      if isinstance(message, chat.Message)
      else Mark(0.0)
      for problem, message in zip(problems, parsed, strict=True)
    ]

  def _outcome(
    self,
    problem: Problem,
    sample: Sampled,
    parsed: chat.Message | chat.ParseError,
    mark: Mark,
  ) -> Outcome:
    reward = self._config.of(problem.domain, problem.mode)
    message = parsed if isinstance(parsed, chat.Message) else None
    score = mark.score
    if reward.threshold:
      score = float(score >= reward.threshold)
    components = {
      'outcome': score,
      'format': float(message is not None),
      'language': _language(message, sample.text, reward),
      'length': length_penalty(
        len(sample.tokens),
        max_length=self._max_length(problem, reward),
        buffer=reward.length_buffer,
      ),
    }
    components.update(mark.components)
    total = (
      reward.outcome_weight * components['outcome']
      + reward.format_weight * components['format']
      + reward.language_weight * components['language']
      - reward.length_penalty * components['length']
    )
    return Outcome(
      total=total,
      components=components,
      parse_error=None if message else parsed.code,  # pyrefly: ignore
      error=mark.error,
      message=message,
    )

  def _max_length(self, problem: Problem, reward: DomainReward) -> int:
    if reward.max_length is not None:
      return reward.max_length
    if isinstance(self._max_new_tokens, int):
      return self._max_new_tokens
    return self._max_new_tokens[problem.domain]


class _Reader:
  """Parses each text once."""

  def __init__(self):
    self._known: dict[tuple, chat.Message | chat.ParseError] = {}

  def __call__(
    self, problem: Problem, text: str
  ) -> chat.Message | chat.ParseError:
    tools, response_format = _request(problem)
    key = (problem.mode, text, problem.id if tools or response_format else '')
    if key not in self._known:
      try:
        self._known[key] = chat.parse(
          text,
          mode=problem.mode,
          tools=tools or None,
          response_format=response_format,
        )
      except chat.ParseError as error:
        self._known[key] = error
    return self._known[key]


def _request(problem: Problem) -> tuple[tuple[chat.ToolSpec, ...], dict | None]:
  """What the prompt offers and asks for."""
  tools: tuple[chat.ToolSpec, ...] = ()
  response_format = None
  for message in problem.messages:
    tools += message.tools
    response_format = message.response_format or response_format
  return tools, response_format


def _language(
  message: chat.Message | None, text: str, reward: DomainReward
) -> float:
  """The share of words in the target language, of what can be read."""
  if message is not None:
    text = f'{message.reasoning}\n{message.content}'
  else:
    for control in chat.CONTROL_STRINGS:
      text = text.replace(control, ' ')
  return consistency(text, reward.language)
