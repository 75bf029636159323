import pytest

from dsv32_jax.agents.synthesis.search import schema
from dsv32_jax.agents.synthesis.search.corpus import (
  Corpus,
  match_expression,
  write,
)
from dsv32_jax.agents.synthesis.search.documents import Document, render
from dsv32_jax.agents.synthesis.search.reading import Reader
from dsv32_jax.agents.synthesis.search.tools import make_tools
from dsv32_jax.agents.synthesis.search.world import make_world
from dsv32_jax.agents.types import Tool, ToolError

DOCUMENTS = (
  Document(
    title='Zorl', pages=('Zorl is a city. It lies on Vim.', 'Page two.')
  ),
  Document(title='Vim', pages=('Vim is a river. Zorl & Sons drink of it.',)),
  Document(title='Zorl & Sons', pages=('Zorl & Sons is a company.',)),
)


@pytest.fixture
def tools(tmp_path):
  write(tmp_path / 'library.sqlite', DOCUMENTS)
  corpus = Corpus(tmp_path / 'library.sqlite')
  yield {tool.spec.name: tool for tool in make_tools(corpus)}
  corpus.close()


def test_tools_are_tools(tools):
  assert set(tools) == {'search', 'open', 'find'}
  assert all(isinstance(tool, Tool) for tool in tools.values())


def test_search_ranks_titles_first_and_keeps_to_k(tools):
  assert tools['search']({'query': 'river Vim'}).startswith('[2] Vim: ')
  assert tools['search']({'query': 'Zorl', 'k': 1}).count('\n') == 0


def test_search_for_a_phrase_needs_all_of_it(tools):
  found = tools['search']({'query': '"Zorl & Sons"'})
  assert '[1]' not in found
  assert '[2]' in found
  assert '[3]' in found


@pytest.mark.parametrize(
  'query', ['', ' ', '""', 'NEAR(', 'title:x OR', '"', '*', 'the of', '\x00']
)
def test_search_for_nothing_or_operators_finds_nothing(tools, query):
  assert tools['search']({'query': query}) == 'Nothing was found.'


def test_open_shows_one_page(tools):
  text = tools['open']({'doc': 1, 'page': 2})
  assert text == 'Zorl (page 2 of 2)\n\nPage two.'


def test_find_lists_sentences_with_their_pages(tools):
  assert (
    tools['find']({'doc': 1, 'text': 'LIES on'}) == 'page 1: It lies on Vim.'
  )
  assert 'does not contain' in tools['find']({'doc': 1, 'text': 'mountain'})


@pytest.mark.parametrize(
  ('tool', 'arguments', 'field'),
  [
    ('search', {'query': 'x' * 1001}, 'query: got 1001'),
    ('search', {'query': 'x', 'k': 0}, 'k: got 0'),
    ('search', {'query': 'x', 'k': 99}, 'k: got 99'),
    ('open', {'doc': 9}, 'doc: there is no document 9'),
    ('open', {'doc': 2**70}, 'doc: there is no'),
    ('open', {'doc': 1, 'page': 3}, 'page: got 3'),
    ('open', {'doc': 1, 'page': 0}, 'page: got 0'),
    ('find', {'doc': 1, 'text': ' '}, 'text: got none'),
    ('find', {'doc': -1, 'text': 'x'}, 'doc: there is no'),
  ],
)
def test_wrong_arguments_are_errors_for_the_model(
  tools, tool, arguments, field
):
  with pytest.raises(ToolError, match=field):
    tools[tool](arguments)


def test_query_language_is_quoted_away():
  assert match_expression('a"b') == '"b"'
  assert match_expression('x AND "y z"') == '("y z") AND ("x")'


def test_file_that_is_no_library_is_refused(tmp_path):
  other = tmp_path / 'other.sqlite'
  other.write_bytes(b'not a database at all, but long enough' * 40)
  with pytest.raises(ValueError, match='is no library'):
    Corpus(other)


def test_reader_reads_back_every_fact_of_a_world(tmp_path):
  world = make_world('read', num_entities=300)
  write(tmp_path / 'w.sqlite', render(world))
  corpus = Corpus(tmp_path / 'w.sqlite')
  reader = Reader(make_tools(corpus))
  for entity, facts in zip(world.entities, world.facts, strict=True):
    article = reader.named(entity.name)
    assert article is not None
    assert article.type == entity.type
    for relation in schema.RELATIONS_OF[entity.type]:
      want = facts.get(relation.key)
      if relation.kind == 'entity' and want is not None:
        want = world.name(want)
      assert article.value(relation) == want, (entity.name, relation.key)
  corpus.close()
