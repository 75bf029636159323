"""What a question asks, as a path through the graph, and its answers there."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from dsv32_jax.agents.synthesis.search import schema
from dsv32_jax.agents.synthesis.search.world import World

Test = Literal['is', 'below', 'above', 'between']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constraint:
  """Something that is true of an entity.

  Attributes:
    relation: key of `schema.RELATIONS`.
    test: of the value; entities and words only are.
    value: a name, a word or a number; '' with `via`.
    high: the greatest value, with 'between'.
    via: of the entity that is the value, instead of its name.
  """

  relation: str
  test: Test = 'is'
  value: int | str = ''
  high: int = 0
  via: 'Constraint | None' = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hop:
  """A step from entities to others.

  Attributes:
    relation: key of `schema.RELATIONS`.
    is_inverse: from the value to the subjects.
    constraints: on where it leads.
  """

  relation: str
  is_inverse: bool = False
  constraints: tuple[Constraint, ...] = ()

  @property
  def type(self) -> str:
    """The type of entity that it leads to."""
    relation = schema.RELATIONS[self.relation]
    return relation.subject if self.is_inverse else relation.object


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """Entities that fit a description, and the way from there.

  Attributes:
    start: type of the entities.
    constraints: that all hold of them: the breadth.
    hops: in order: the depth.
  """

  start: str
  constraints: tuple[Constraint, ...]
  hops: tuple[Hop, ...]

  @property
  def answer_type(self) -> str:
    return self.hops[-1].type if self.hops else self.start

  def names(self) -> tuple[str, ...]:
    """The entities that it names, in order."""
    every = [*self.constraints, *(c for h in self.hops for c in h.constraints)]
    return tuple(dict.fromkeys(name for c in every for name in _named(c)))


def answers(world: World, plan: Plan) -> tuple[int, ...]:
  """All entities that answer a plan, by going through the whole graph.

  It uses the facts alone, none of the tables that plans are proposed from.
  """
  found = {
    index
    for index, entity in enumerate(world.entities)
    if entity.type == plan.start
    and all(holds(world, index, c) for c in plan.constraints)
  }
  for hop in plan.hops:
    if hop.is_inverse:
      found = {
        index
        for index, facts in enumerate(world.facts)
        if facts.get(hop.relation, -1) in found
      }
    else:
      found = {
        value
        for index in found
        if isinstance(value := world.facts[index].get(hop.relation), int)
      }
    found = {
      index
      for index in found
      if all(holds(world, index, c) for c in hop.constraints)
    }
  return tuple(sorted(found))


def holds(world: World, index: int, constraint: Constraint) -> bool:
  """Whether a constraint is true of an entity; not if nothing is known."""
  value = world.facts[index].get(constraint.relation)
  if value is None:
    return False
  if schema.RELATIONS[constraint.relation].kind == 'entity':
    assert isinstance(value, int)
    if constraint.via is not None:
      return holds(world, value, constraint.via)
    return world.name(value) == constraint.value
  return passes(value, constraint)


def passes(value: int | str, constraint: Constraint) -> bool:
  """Whether a year, number or word passes the test of a constraint."""
  if constraint.test == 'is':
    return value == constraint.value
  assert isinstance(value, int)
  assert isinstance(constraint.value, int)
  if constraint.test == 'below':
    return value < constraint.value
  if constraint.test == 'above':
    return value > constraint.value
  return constraint.value <= value <= constraint.high


def to_json(plan: Plan) -> dict[str, Any]:
  """A plan as JSON values."""
  return dataclasses.asdict(plan)


def from_json(value: Mapping[str, Any]) -> Plan:
  """The plan that `to_json` wrote."""
  return Plan(
    start=value['start'],
    constraints=_constraints(value['constraints']),
    hops=tuple(
      Hop(
        relation=hop['relation'],
        is_inverse=hop['is_inverse'],
        constraints=_constraints(hop['constraints']),
      )
      for hop in value['hops']
    ),
  )


def _constraints(
  values: Sequence[Mapping[str, Any]],
) -> tuple[Constraint, ...]:
  return tuple(
    Constraint(
      relation=value['relation'],
      test=value['test'],
      value=value['value'],
      high=value['high'],
      via=_constraints([value['via']])[0] if value['via'] else None,
    )
    for value in values
  )


def _named(constraint: Constraint) -> Iterator[str]:
  if constraint.via is not None:
    yield from _named(constraint.via)
  elif schema.RELATIONS[constraint.relation].kind == 'entity':
    yield str(constraint.value)
