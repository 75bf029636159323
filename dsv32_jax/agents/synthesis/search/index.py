"""Which entities fit a constraint, by tables instead of by going through all.

Proposals are made with it; what they claim is proven without it.
"""

import bisect

from dsv32_jax.agents.synthesis.search import schema
from dsv32_jax.agents.synthesis.search.plans import Constraint
from dsv32_jax.agents.synthesis.search.world import World


class Index:
  """Tables over a world.

  Attributes:
    world: that they are of.
    mentions: how many facts name each entity.
  """

  def __init__(self, world: World):
    self.world = world
    self._with_facts: dict[int, tuple[int, ...]] = {}
    self.mentions = [0] * len(world.entities)
    pairs: dict[str, list[tuple[int, int]]] = {}
    for entity, facts in enumerate(world.facts):
      for key, value in facts.items():
        kind = schema.RELATIONS[key].kind
        if kind == 'entity':
          self.mentions[int(value)] += 1
        elif kind != 'word':
          assert isinstance(value, int)
          pairs.setdefault(key, []).append((value, entity))
    self._sorted = {key: sorted(found) for key, found in pairs.items()}

  def with_facts(self, at_least: int) -> tuple[int, ...]:
    """The entities of which so many facts are known, or more."""
    if at_least not in self._with_facts:
      self._with_facts[at_least] = tuple(
        entity
        for entity, facts in enumerate(self.world.facts)
        if len(facts) >= at_least
      )
    return self._with_facts[at_least]

  def fitting(self, constraint: Constraint) -> set[int]:
    """The entities of which a constraint is true."""
    key, world = constraint.relation, self.world
    if constraint.via is not None:
      return {
        entity
        for value in self.fitting(constraint.via)
        for entity in world.subjects.get((key, value), ())
      }
    kind = schema.RELATIONS[key].kind
    if kind == 'entity':
      value = world.by_name[str(constraint.value)]
      return set(world.subjects.get((key, value), ()))
    if constraint.test == 'is':
      return set(world.subjects.get((key, constraint.value), ()))
    assert isinstance(constraint.value, int)
    pairs = self._sorted[key]
    first, last = 0, len(pairs)
    if constraint.test == 'below':
      last = bisect.bisect_left(pairs, (constraint.value, -1))
    elif constraint.test == 'above':
      first = bisect.bisect_left(pairs, (constraint.value + 1, -1))
    else:
      first = bisect.bisect_left(pairs, (constraint.value, -1))
      last = bisect.bisect_left(pairs, (constraint.high + 1, -1))
    return {entity for _, entity in pairs[first:last]}
