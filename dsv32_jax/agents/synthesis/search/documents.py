"""Facts as documents: varied wording, sentences beside the point, mistakes."""

import dataclasses
import random
from collections.abc import Sequence

from dsv32_jax.agents.synthesis.search import schema
from dsv32_jax.agents.synthesis.search.schema import Relation
from dsv32_jax.agents.synthesis.search.world import Value, World

PREFIXES = (
  'According to the register, ',
  'As far as is known, ',
  'By all accounts, ',
  'It is on record that ',
  'Every handbook agrees that ',
)
"""Before a fact; what follows is meant."""

_MISTAKES = (
  'An early guide claimed in error that {claim}.',
  'It was long believed, wrongly, that {claim}.',
  'A rumour, since disproved, had it that {claim}.',
)
_FILLERS = (
  'Most of the papers were lost in a fire in {year}.',
  'A short notice in a calendar of {year} adds nothing new.',
  'The spelling of the name was settled in {year}.',
  'A commemorative stamp was printed in {year}.',
  'Schoolchildren of the area still learn a rhyme about it.',
  'A pamphlet of {number} pages deals with the matter.',
  'Opinions about it have been divided since {year}.',
  'The local archive keeps {number} letters on the subject.',
  'A radio programme of {year} brought it to wider notice.',
  'Visitors are often surprised by this.',
  'No photograph from before {year} is known.',
  'A plaque was put up in {year} and stolen soon after.',
)
_INTROS = (
  '{name} is a {noun}.',
  '{name} is a {noun} about which little has been written.',
  '{name} is a {noun} with a history of its own.',
  '{name} is a {noun} that appears in few lists.',
)
_SENTENCES_A_PAGE = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
  """What a world's library has about one entity.

  Attributes:
    title: name of the entity.
    pages: text, in order.
  """

  title: str
  pages: tuple[str, ...]


def render(world: World) -> tuple[Document, ...]:
  """The documents of a world, in an order that says nothing."""
  rng = random.Random(f'documents {world.seed}')
  mentions = _mentions(rng, world)
  order = rng.sample(range(len(world.entities)), len(world.entities))
  return tuple(_document(rng, world, e, mentions.get(e, ())) for e in order)


def value_text(world: World, relation: Relation, value: Value) -> str:
  """A value as it stands in the place of {}."""
  if relation.kind == 'entity':
    return world.name(int(value))
  if relation.kind == 'year':
    return f'in {value}'
  if relation.kind == 'number':
    return f'{value:,}'
  return str(value)


def _document(
  rng: random.Random, world: World, index: int, mentions: Sequence[str]
) -> Document:
  entity = world.entities[index]
  noun = schema.TYPES[entity.type].nouns[0]
  sentences = []
  for key, value in world.facts[index].items():
    relation = schema.RELATIONS[key]
    said = rng.choice(relation.says).format(value_text(world, relation, value))
    subject = rng.choice((entity.name, entity.pronoun, f'The {noun}'))
    sentences.append(_fact(rng, subject, said, subject == entity.name))
  sentences += mentions
  if rng.random() < 0.4:
    sentences.append(_mistake(rng, world, index))
  if rng.random() < 0.4:
    other = world.name(rng.choice(world.by_type[entity.type]))
    if other != entity.name:
      sentences.append(f'Catalogues list it next to {other}.')
  for filler in rng.sample(_FILLERS, rng.randint(2, 5)):
    year, number = rng.randint(1800, 2015), rng.randint(12, 400)
    sentences.append(filler.format(year=year, number=number))
  rng.shuffle(sentences)
  sentences.insert(0, rng.choice(_INTROS).format(name=entity.name, noun=noun))
  pages = tuple(
    ' '.join(sentences[start : start + _SENTENCES_A_PAGE])
    for start in range(0, len(sentences), _SENTENCES_A_PAGE)
  )
  return Document(title=entity.name, pages=pages)


def _fact(rng: random.Random, subject: str, said: str, is_name: bool) -> str:
  if rng.random() < 0.6:
    return f'{subject} {said}.'
  if not is_name:
    subject = subject[0].lower() + subject[1:]
  return f'{rng.choice(PREFIXES)}{subject} {said}.'


def _mistake(rng: random.Random, world: World, index: int) -> str:
  """A claim about the entity that is not true, and said not to be."""
  entity = world.entities[index]
  relation = rng.choice(schema.RELATIONS_OF[entity.type])
  if relation.kind == 'entity':
    value: Value = rng.choice(world.by_type[relation.object])
  elif relation.kind == 'word':
    value = rng.choice(relation.words)
  else:
    value = rng.randint(relation.low, relation.high)
  said = rng.choice(relation.says).format(value_text(world, relation, value))
  return rng.choice(_MISTAKES).format(claim=f'{entity.name} {said}')


def _mentions(rng: random.Random, world: World) -> dict[int, list[str]]:
  """For some entities, sentences about others whose facts name them."""
  found: dict[int, list[str]] = {}
  for index, facts in enumerate(world.facts):
    entity = world.entities[index]
    for key, value in facts.items():
      relation = schema.RELATIONS[key]
      if relation.kind != 'entity' or rng.random() > 0.3:
        continue
      about = found.setdefault(int(value), [])
      if len(about) < 4:
        said = rng.choice(relation.says).format(world.name(int(value)))
        noun = schema.TYPES[entity.type].nouns[0]
        about.append(f'The {noun} {entity.name} {said}.')
  return found
