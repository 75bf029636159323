"""An invented world: entities, and facts about them (the truth of tasks)."""

import dataclasses
import random
from collections.abc import Iterable, Mapping

from dsv32_jax.agents.synthesis.search import schema
from dsv32_jax.agents.synthesis.search.names import Names
from dsv32_jax.agents.synthesis.search.schema import Relation

Value = int | str
"""Of a fact: the index of an entity, a year, a number or a word."""

# A world knows less than everything about an entity.
_KNOWN = 0.92
# Above 1: some values are more frequent than others, most are rare.
_SKEW = 1.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entity:
  """Someone or something.

  Attributes:
    name: no other entity of the world has it.
    type: key of `schema.TYPES`.
    pronoun: 'He', 'She' or 'It'.
  """

  name: str
  type: str
  pronoun: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
  """Entities by their index, and what is true of them.

  Attributes:
    seed: that it was made from.
    entities: in the order of their types.
    facts: of each entity, its values by relation.
    by_type: entities of each type.
    subjects: entities by relation and value.
    by_name: entity of a name.
  """

  seed: str
  entities: tuple[Entity, ...]
  facts: tuple[Mapping[str, Value], ...]
  by_type: Mapping[str, tuple[int, ...]]
  subjects: Mapping[tuple[str, Value], tuple[int, ...]]
  by_name: Mapping[str, int]

  def name(self, entity: int) -> str:
    """The name of an entity."""
    return self.entities[entity].name

  def names_of(self, kind: str) -> tuple[str, ...]:
    """The names of all entities of a type: the space of its answers."""
    return tuple(self.entities[e].name for e in self.by_type[kind])


def make_world(seed: str, *, num_entities: int = 2400) -> World:
  """Draws a world; the same one from the same arguments.

  Args:
    seed: of all draws.
    num_entities: about how many; at least a few of each type.

  Raises:
    ValueError: if there is no room for every type.

  >>> world = make_world('0', num_entities=300)
  >>> world == make_world('0', num_entities=300)
  True
  """
  if num_entities < 100:
    raise ValueError(f'num_entities: got {num_entities}, expected at least 100')
  rng = random.Random(f'world {seed}')
  names = Names(rng)
  total = sum(kind.share for kind in schema.TYPES.values())
  entities: list[Entity] = []
  by_type = {}
  for kind in schema.TYPES.values():
    first = len(entities)
    for _ in range(max(4, num_entities * kind.share // total)):
      is_person = kind.key == 'person'
      entities.append(
        Entity(
          name=names.draw(kind.key),
          type=kind.key,
          pronoun=rng.choice(('He', 'She')) if is_person else 'It',
        )
      )
    by_type[kind.key] = tuple(range(first, len(entities)))

  births = _births(rng, by_type['person'])
  # The most frequent values are not the first of their type.
  orders = {key: rng.sample(ids, len(ids)) for key, ids in by_type.items()}
  facts: list[dict[str, Value]] = [{} for _ in entities]
  for index, entity in enumerate(entities):
    for relation in schema.RELATIONS_OF[entity.type]:
      value = _value(rng, index, relation, facts[index], orders, births)
      if value is not None and rng.random() < _KNOWN:
        facts[index][relation.key] = value

  subjects: dict[tuple[str, Value], list[int]] = {}
  for index, known in enumerate(facts):
    for key, value in known.items():
      subjects.setdefault((key, value), []).append(index)
  return World(
    seed=seed,
    entities=tuple(entities),
    facts=tuple(facts),
    by_type=by_type,
    subjects={key: tuple(found) for key, found in subjects.items()},
    by_name={entity.name: index for index, entity in enumerate(entities)},
  )


def _births(rng: random.Random, people: Iterable[int]) -> dict[int, int]:
  relation = schema.RELATIONS['person.birth_year']
  return {person: rng.randint(relation.low, relation.high) for person in people}


def _value(
  rng: random.Random,
  index: int,
  relation: Relation,
  known: Mapping[str, Value],
  orders: Mapping[str, list[int]],
  births: Mapping[int, int],
) -> Value | None:
  """What a relation may say of an entity, or None."""
  if relation.key == 'person.birth_year':
    return births[index]
  if relation.kind == 'word':
    return rng.choice(relation.words)
  if relation.kind == 'number':
    # As many small ones as large ones, by their digits.
    span = relation.high / relation.low
    return round(relation.low * span ** rng.random())
  if relation.kind == 'year':
    maker = known.get(relation.maker)
    if isinstance(maker, int):
      return births[maker] + rng.randint(21, 62)
    return rng.randint(relation.low, relation.high)
  order = orders[relation.object]
  for _ in range(20):
    value = order[int(len(order) * rng.random() ** _SKEW)]
    if value == index:
      continue
    # A teacher is older, and alive.
    apart = births.get(index, 0) - births.get(value, 0)
    if relation.key != 'person.taught_by' or 12 <= apart <= 50:
      return value
  return None
