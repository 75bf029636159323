import collections

import pytest

from dsv32_jax.agents.synthesis.search import schema
from dsv32_jax.agents.synthesis.search.documents import render
from dsv32_jax.agents.synthesis.search.index import Index
from dsv32_jax.agents.synthesis.search.plans import Constraint, holds
from dsv32_jax.agents.synthesis.search.world import make_world


@pytest.fixture(scope='module')
def world():
  return make_world('test', num_entities=600)


def test_same_seed_gives_the_same_world_and_another_another(world):
  assert make_world('test', num_entities=600) == world
  other = make_world('other', num_entities=600)
  assert len(set(other.by_name) & set(world.by_name)) < 20


def test_names_are_unique_and_facts_fit_the_schema(world):
  assert len(world.by_name) == len(world.entities) > 500
  for entity, facts in zip(world.entities, world.facts, strict=True):
    for key, value in facts.items():
      relation = schema.RELATIONS[key]
      assert relation.subject == entity.type
      if relation.kind == 'entity':
        assert world.entities[value].type == relation.object
      elif relation.kind == 'word':
        assert value in relation.words
      else:
        assert isinstance(value, int)


def test_works_date_from_the_adult_life_of_their_makers(world):
  checked = 0
  for facts in world.facts:
    for key, value in facts.items():
      maker = facts.get(schema.RELATIONS[key].maker)
      if maker is not None and 'person.birth_year' in world.facts[maker]:
        age = value - world.facts[maker]['person.birth_year']
        assert 21 <= age <= 62
        checked += 1
  assert checked > 50


def test_long_tail_most_entities_are_named_seldom(world):
  mentions = sorted(Index(world).mentions)
  assert mentions[len(mentions) // 2] <= 3
  assert mentions[-1] >= 20


def test_documents_say_every_fact_and_one_is_about_each_entity(world):
  documents = {document.title: document for document in render(world)}
  assert set(documents) == set(world.by_name)
  for entity, facts in zip(world.entities, world.facts, strict=True):
    text = ' '.join(documents[entity.name].pages)
    for key, value in facts.items():
      if schema.RELATIONS[key].kind == 'entity':
        assert world.name(value) in text


def test_words_of_a_type_mean_one_relation_each():
  for kind in schema.TYPES:
    counts = collections.Counter(
      (text, relation.kind in ('year', 'number', 'word'))
      for relation in schema.RELATIONS_OF[kind]
      for text in (*relation.says, *relation.roles)
    )
    assert max(counts.values()) == 1, counts.most_common(2)
    assert len(schema.RELATIONS_OF[kind]) >= 3


@pytest.mark.parametrize(
  'constraint',
  [
    Constraint(relation='person.profession', value='poet'),
    Constraint(relation='person.birth_year', test='below', value=1830),
    Constraint(relation='person.birth_year', test='above', value=1900),
    Constraint(
      relation='city.population', test='between', value=9_000, high=90_000
    ),
    Constraint(
      relation='book.author',
      via=Constraint(relation='person.profession', value='poet'),
    ),
  ],
)
def test_tables_agree_with_going_through_all(world, constraint):
  want = {
    entity
    for entity in range(len(world.entities))
    if holds(world, entity, constraint)
  }
  assert Index(world).fitting(constraint) == want
  assert len(want) > 1


def test_world_that_is_too_small_is_refused():
  with pytest.raises(ValueError, match='num_entities: got 9'):
    make_world('0', num_entities=9)
