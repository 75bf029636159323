"""Reads facts back out of documents, with nothing but the tools."""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dsv32_jax.agents.synthesis.search import schema
from dsv32_jax.agents.synthesis.search.documents import PREFIXES
from dsv32_jax.agents.synthesis.search.schema import Relation
from dsv32_jax.agents.synthesis.search.tools import MAX_K
from dsv32_jax.agents.types import Tool

_HIT = re.compile(r'^\[(\d+)\] (.+?): ', re.MULTILINE)
_OPENED = re.compile(r'^(.+) \(page \d+ of (\d+)\)\n\n', re.DOTALL)
_INTRO = re.compile(r' is a ([a-z]+)')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
  """A call that was made.

  Attributes:
    tool: its name.
    arguments: of it.
  """

  tool: str
  arguments: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Article:
  """What a document says of its subject.

  Attributes:
    title: name of the subject.
    type: of the subject.
    said: sentences about it, without their subject.
  """

  title: str
  type: str
  said: tuple[str, ...]

  def value(self, relation: Relation) -> int | str | None:
    """What a relation says of the subject: a name, a word or a number."""
    for said in self.said:
      found = _pattern(relation.key).fullmatch(said)
      if found:
        text = next(group for group in found.groups() if group is not None)
        if relation.kind in ('year', 'number'):
          return int(text.replace(',', ''))
        return text
    return None


class Reader:
  """Calls the tools, remembers results, and keeps a list of calls.

  Results are a function of the library, so a reader may serve many tasks;
  `begin` starts a new list, in which every call stands again that a task needs.
  """

  def __init__(self, tools: Sequence[Tool]):
    self._tools = {tool.spec.name: tool for tool in tools}
    self._articles: dict[int, tuple[Article, int]] = {}
    self._hits: dict[tuple[str, int], list[tuple[int, str]]] = {}
    self._calls: dict[str, Call] = {}

  def begin(self) -> None:
    """Forgets the list of calls."""
    self._calls = {}

  @property
  def calls(self) -> tuple[Call, ...]:
    """The calls since `begin`, each once."""
    return tuple(self._calls.values())

  def search(self, query: str, k: int = MAX_K) -> list[tuple[int, str]]:
    """Number and title of the documents found."""
    arguments = {'query': query, 'k': k}
    self._log('search', arguments)
    if (query, k) not in self._hits:
      found = self._tools['search'](arguments)
      self._hits[query, k] = [
        (int(doc), title) for doc, title in _HIT.findall(found)
      ]
    return self._hits[query, k]

  def article(self, doc: int) -> Article:
    """A document, all of its pages."""
    if doc not in self._articles:
      pages, num_pages, title = [], 1, ''
      while len(pages) < num_pages:
        text = self._tools['open']({'doc': doc, 'page': len(pages) + 1})
        opened = _OPENED.match(text)
        if opened is None:
          raise ValueError(f'open: got {text[:80]!r}, expected a page')
        num_pages = int(opened[2])
        pages.append(text[opened.end() :])
        title = opened[1]
      self._articles[doc] = _article(title, ' '.join(pages)), num_pages
    article, num_pages = self._articles[doc]
    for page in range(1, num_pages + 1):
      self._log('open', {'doc': doc, 'page': page})
    return article

  def named(self, name: str) -> Article | None:
    """The document about an entity."""
    for doc, title in self.search(f'"{name}"'):
      if title == name:
        return self.article(doc)
    return None

  def _log(self, tool: str, arguments: dict[str, Any]) -> None:
    key = f'{tool} {arguments}'
    if key not in self._calls:
      self._calls[key] = Call(tool=tool, arguments=arguments)


def _article(title: str, text: str) -> Article:
  intro = _INTRO.match(text, len(title))
  noun = intro[1] if intro else ''
  subjects = (f'{title} ', 'He ', 'She ', 'It ', f'The {noun} ')
  said = []
  for sentence in text.rstrip('.').split('. '):
    for prefix in PREFIXES:
      if sentence.startswith(prefix):
        sentence = sentence[len(prefix) :]
        sentence = sentence[0].upper() + sentence[1:]
        break
    for subject in subjects:
      if sentence.startswith(subject):
        said.append(sentence[len(subject) :])
        break
  return Article(title=title, type=noun, said=tuple(said))


@functools.cache
def _pattern(key: str) -> re.Pattern:
  relation = schema.RELATIONS[key]
  value = {
    # 'was born in' a place, not in a year.
    'entity': r'(?!\d)(.+)',
    'word': f'({"|".join(relation.words)})',
    'year': r'in (\d+)',
    'number': r'([\d,]+)',
  }[relation.kind]
  return re.compile(
    '|'.join(re.escape(s).replace(r'\{\}', value) for s in relation.says)
  )
