"""Proposes plans: a walk through the graph, and what singles out its start."""

import random
from collections.abc import Iterable, Sequence

from dsv32_jax.agents.synthesis.search import schema
from dsv32_jax.agents.synthesis.search.index import Index
from dsv32_jax.agents.synthesis.search.plans import (
  Constraint,
  Hop,
  Plan,
  holds,
)
from dsv32_jax.agents.synthesis.search.world import World

# What more documents name than that, one search does not find everywhere.
_MAX_FAN = 21
_TRIES = 40
_DRAWS_A_FACT = 5
_FORWARD = 0.6
_VIA = 0.35


class Rejected(Exception):
  """A proposal that came to nothing; its text is the reason."""


def propose(
  index: Index, rng: random.Random, *, depth: int, breadth: int
) -> tuple[Plan, int]:
  """A plan and the entity that it leads to.

  Args:
    index: of the graph.
    rng: draws.
    depth: hops, 0 or more.
    breadth: constraints of the start, each of which it takes.

  Raises:
    Rejected: 'no_path' or 'no_description'.
  """
  world = index.world
  starts = index.with_facts(breadth + 1)
  if not starts:
    raise Rejected('no_description')
  start = rng.choice(starts)
  visited, hops = [start], []
  for _ in range(depth):
    hop, entity = _hop(index, rng, visited, hops[-1] if hops else None)
    hops.append(hop)
    visited.append(entity)
  first = {hops[0].relation} if hops and not hops[0].is_inverse else set()
  constraints = _description(
    index,
    rng,
    start,
    among=world.by_type[world.entities[start].type],
    breadth=breadth,
    without=first,
    avoid=visited,
  )
  plan = Plan(
    start=world.entities[start].type,
    constraints=constraints,
    hops=tuple(hops),
  )
  return plan, visited[-1]


def _hop(
  index: Index, rng: random.Random, visited: Sequence[int], last: Hop | None
) -> tuple[Hop, int]:
  """A step to an entity that was not there before."""
  world, here = index.world, visited[-1]
  kind = world.entities[here].type
  forward = [
    (key, value)
    for key, value in world.facts[here].items()
    if schema.RELATIONS[key].kind == 'entity'
    and value not in visited
    and not (last and last.is_inverse and last.relation == key)
  ]
  inverse = [
    (relation.key, entity)
    for relation in schema.INTO[kind]
    if index.mentions[here] <= _MAX_FAN
    and not (last and not last.is_inverse and last.relation == relation.key)
    for entity in world.subjects.get((relation.key, here), ())
    if entity not in visited
  ]
  if forward and (not inverse or rng.random() < _FORWARD):
    key, value = rng.choice(forward)
    assert isinstance(value, int)
    return Hop(relation=key), value
  if not inverse:
    raise Rejected('no_path')
  key, entity = rng.choice(inverse)
  among = world.subjects[key, here]
  constraints = ()
  if len(among) > 1:
    constraints = _description(
      index,
      rng,
      entity,
      among=among,
      breadth=1,
      without={key},
      avoid=visited,
      needs_anchor=False,
    )
  return Hop(relation=key, is_inverse=True, constraints=constraints), entity


def _description(
  index: Index,
  rng: random.Random,
  entity: int,
  *,
  among: Sequence[int],
  breadth: int,
  without: set[str],
  avoid: Sequence[int],
  needs_anchor: bool = True,
) -> tuple[Constraint, ...]:
  """Constraints that only `entity` of some fits, and fits only with all.

  `among` is a whole type, or a few of one.
  """
  world = index.world
  keys = [key for key in world.facts[entity] if key not in without]
  if len(keys) < breadth:
    raise Rejected('no_description')
  pool: dict[str, list[tuple[Constraint, set[int]]]] = {}
  draws = keys * (_DRAWS_A_FACT if breadth > 2 else 2)
  for key in rng.sample(draws, len(draws)):
    constraint = _constraint(world, rng, entity, key, avoid)
    if constraint is None:
      continue
    if len(among) <= _MAX_FAN:
      fitting = {one for one in among if holds(world, one, constraint)}
    else:
      # Those of the whole type, of which a relation's subjects are a part.
      fitting = index.fitting(constraint)
    if breadth == 1 and len(fitting) == 1:
      if not needs_anchor or _is_anchor(index, constraint):
        return (constraint,)
    # One that all fit says nothing, one that nobody else fits says it all.
    elif 1 < len(fitting) < len(among):
      pool.setdefault(key, []).append((constraint, fitting))
  if breadth == 1:
    raise Rejected('no_description')
  if len(pool) < breadth:
    raise Rejected('no_description')
  every = [(key, *one) for key, found in pool.items() for one in found]
  # Each of the others takes at least one entity away from it.
  anchors = [
    one
    for one in every
    if (not needs_anchor or _is_anchor(index, one[1]))
    and len(one[2]) >= breadth
  ]
  for _ in range(_TRIES if anchors else 0):
    key, constraint, left = rng.choice(anchors)
    chosen, fitting = [constraint], [left]
    for other in rng.sample(list(pool), len(pool)):
      is_last = len(chosen) == breadth - 1
      if len(chosen) == breadth or other == key:
        continue
      constraint, found = rng.choice(pool[other])
      rest = left & found
      if len(rest) < len(left) and (len(rest) == 1) == is_last:
        chosen.append(constraint)
        fitting.append(found)
        left = rest
    if len(chosen) == breadth and all(
      len(_all_but(fitting, place, among)) > 1 for place in range(breadth)
    ):
      return tuple(chosen)
  raise Rejected('no_description')


def _all_but(
  fitting: Sequence[set[int]], place: int, among: Iterable[int]
) -> set[int]:
  others = [one for i, one in enumerate(fitting) if i != place]
  return set.intersection(*others) if others else set(among)


def _is_anchor(index: Index, constraint: Constraint) -> bool:
  """Whether searches for names lead to all that a constraint is true of."""
  if schema.RELATIONS[constraint.relation].kind != 'entity':
    return False
  if constraint.via is None:
    value = index.world.by_name[str(constraint.value)]
    return index.mentions[value] <= _MAX_FAN
  values = index.fitting(constraint.via)
  return _is_anchor(index, constraint.via) and all(
    index.mentions[value] <= _MAX_FAN for value in values
  )


def _constraint(
  world: World,
  rng: random.Random,
  entity: int,
  key: str,
  avoid: Sequence[int],
  *,
  may_go_on: bool = True,
) -> Constraint | None:
  """A constraint that is true of an entity; None if it would say too much."""
  relation, value = schema.RELATIONS[key], world.facts[entity][key]
  if relation.kind == 'word':
    return Constraint(relation=key, value=value)
  if relation.kind != 'entity':
    assert isinstance(value, int)
    return _range(rng, key, value, is_year=relation.kind == 'year')
  assert isinstance(value, int)
  if may_go_on and rng.random() < _VIA and world.facts[value]:
    inner = rng.choice(tuple(world.facts[value]))
    via = _constraint(world, rng, value, inner, avoid, may_go_on=False)
    return via and Constraint(relation=key, via=via)
  if value in avoid:
    return None
  return Constraint(relation=key, value=world.name(value))


def _range(
  rng: random.Random, key: str, value: int, *, is_year: bool
) -> Constraint:
  test = rng.choice(('is', 'below', 'above', 'between', 'between'))
  if is_year:
    low, high = value - rng.randint(1, 25), value + rng.randint(1, 25)
  else:
    low = _round(value * rng.uniform(0.4, 0.95))
    high = max(value + 1, _round(value * rng.uniform(1.05, 2.0)))
  if test == 'is':
    return Constraint(relation=key, value=value)
  if test == 'below':
    return Constraint(relation=key, test='below', value=high)
  if test == 'above':
    return Constraint(relation=key, test='above', value=low)
  return Constraint(relation=key, test='between', value=low, high=high)


def _round(number: int | float) -> int:
  """To two digits, downwards if in doubt."""
  unit = 10 ** max(0, len(str(int(number))) - 2)
  return int(number) // unit * unit
