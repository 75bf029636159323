"""Which problems a rollout batch asks, by the mixture of domains.

The n-th prompt of a run is fixed by the config alone: domains, their sources
and their modes take turns in proportion to their weights, and each source gives
its problems in order. Nothing of it has to be saved.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from dsv32_jax.config.problems import DomainConfig
from dsv32_jax.config.rl import RLConfig
from dsv32_jax.rl import problems
from dsv32_jax.rl.problems import Problem, ProblemSource

# Held-out problems looked at for each that is wanted.
_ATTEMPTS = 20


class Prompts:
  """Training and held-out problems of a config.

  Attributes:
    domains: names, in the order of the config; their places number them.
  """

  def __init__(self, config: RLConfig):
    """Makes every source.

    Raises:
      ValueError: for a source that is unknown, refuses its options or belongs
        to another domain.
    """
    self._config = config
    self.domains = tuple(config.domains)
    self._sources: dict[str, list[ProblemSource]] = {}
    for name, domain in config.domains.items():
      self._sources[name] = _make_sources(name, domain)
    self._turns = _Turns({n: d.weight for n, d in config.domains.items()})
    self._source_turns = {
      name: _Turns({i: s.weight for i, s in enumerate(domain.sources)})
      for name, domain in config.domains.items()
    }
    self._drawn: list[tuple[str, int, int]] = []
    self._counts: dict[tuple[str, int], int] = {}

  def batch(self, number: int) -> list[Problem]:
    """The problems of a rollout batch, counted from 0."""
    size = self._config.rollout.prompts_per_batch
    end = (number + 1) * size
    while len(self._drawn) < end:
      self._draw()
    return [
      self._problem('train', *place) for place in self._drawn[end - size : end]
    ]

  def held_out(self, domain: str, count: int) -> list[Problem]:
    """So many different held-out problems of a domain, its sources in turns.

    Raises:
      ValueError: if there are not so many.
    """
    config = self._config.domains[domain]
    turns = _Turns({i: s.weight for i, s in enumerate(config.sources)})
    counts = dict.fromkeys(range(len(config.sources)), 0)
    found: dict[str, Problem] = {}
    for _ in range(_ATTEMPTS * count):
      source = turns.next()
      problem = self._problem('held_out', domain, source, counts[source])
      counts[source] += 1
      found.setdefault(problem.prompt, problem)
      if len(found) == count:
        return list(found.values())
    raise ValueError(
      f'evaluation.problems: got {count}, expected at most {len(found)}, the '
      f'different held-out problems found in {_ATTEMPTS * count} of domain '
      f'{domain!r}'
    )

  def max_new_tokens(self, domain: str) -> int:
    """Of a response to a problem of this domain."""
    own = self._config.domains[domain].max_new_tokens
    return own or self._config.rollout.max_new_tokens

  def _draw(self) -> None:
    domain = self._turns.next()
    source = self._source_turns[domain].next()
    index = self._counts.get((domain, source), 0)
    self._counts[domain, source] = index + 1
    self._drawn.append((domain, source, index))

  def _problem(
    self, split: problems.Split, domain: str, source: int, index: int
  ) -> Problem:
    modes = self._config.domains[domain].modes
    return self._sources[domain][source].problem(
      split, index, mode=modes[index % len(modes)]
    )


class _Turns:
  """Smooth weighted round robin: shares are kept within one turn."""

  def __init__(self, weights: Mapping):
    total = sum(weights.values())
    self._shares = {k: w / total for k, w in weights.items() if w > 0}
    self._credit = dict.fromkeys(self._shares, 0.0)

  def next(self):
    for key, share in self._shares.items():
      self._credit[key] += share
    # Rounding must not decide between equals: the first one goes.
    best = max(self._credit, key=lambda key: round(self._credit[key], 9))
    self._credit[best] -= 1.0
    return best


def _make_sources(name: str, domain: DomainConfig) -> list[ProblemSource]:
  sources = []
  for number, config in enumerate(domain.sources):
    where = f'domains.{name}.sources[{number}]'
    try:
      source = problems.make(config.name, **config.options)
    except ValueError as error:
      raise ValueError(f'{where}: {error}') from None
    if source.domain != name:
      raise ValueError(
        f'{where}.name: got {config.name!r} of domain {source.domain!r}, '
        f'expected one of {name!r}'
      )
    sources.append(source)
  return sources


def draw_seed(*numbers: int) -> int:
  """A seed of the engine for one response, from what names it."""
  return int(np.random.SeedSequence(numbers).generate_state(1, np.uint32)[0])


def check_lengths(prompts: Sequence[Sequence[int]], limit: int) -> None:
  """Refuses a prompt that is longer than rows have room for.

  Raises:
    ValueError: naming the longest and the limit.
  """
  longest = max((len(prompt) for prompt in prompts), default=0)
  if longest > limit:
    raise ValueError(
      f'update.max_prompt_tokens: got {limit}, expected at least {longest}, '
      'the longest prompt of this batch'
    )
