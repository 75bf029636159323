"""The three tools of a search task."""

from dsv32_jax.agents.synthesis.search.corpus import Corpus
from dsv32_jax.agents.tools import FunctionTool
from dsv32_jax.agents.types import ToolError
from dsv32_jax.chat import ToolSpec

MAX_K = 30
_LONGEST_QUERY = 1000
_LONGEST_SNIPPET = 240


def make_tools(corpus: Corpus) -> tuple[FunctionTool, ...]:
  """search, open and find over a library."""

  def search(query: str, k: int = 5) -> str:
    if len(query) > _LONGEST_QUERY:
      raise ToolError(
        f'query: got {len(query)} characters, expected at most {_LONGEST_QUERY}'
      )
    if not 1 <= k <= MAX_K:
      raise ToolError(f'k: got {k}, expected 1 to {MAX_K}')
    hits = corpus.search(query, k)
    if not hits:
      return 'Nothing was found.'
    return '\n'.join(
      f'[{hit.doc}] {hit.title}: {hit.snippet[:_LONGEST_SNIPPET]}'
      for hit in hits
    )

  def open_(doc: int, page: int = 1) -> str:
    title, pages = _pages(corpus, doc)
    if not 1 <= page <= len(pages):
      raise ToolError(f'page: got {page}, document {doc} has {len(pages)}')
    return f'{title} (page {page} of {len(pages)})\n\n{pages[page - 1]}'

  def find(doc: int, text: str) -> str:
    _, pages = _pages(corpus, doc)
    if not text.strip():
      raise ToolError('text: got none')
    found = [
      f'page {number}: {sentence}'
      for number, page in enumerate(pages, 1)
      for sentence in page.split('. ')
      if text.casefold() in sentence.casefold()
    ]
    return '\n'.join(found) or 'The document does not contain this text.'

  return (
    FunctionTool(search, _SEARCH),
    FunctionTool(open_, _OPEN),
    FunctionTool(find, _FIND),
  )


def _pages(corpus: Corpus, doc: int) -> tuple[str, tuple[str, ...]]:
  # SQLite's integers have 64 bits.
  found = corpus.pages(doc) if 0 < doc < 2**63 else None
  if found is None:
    raise ToolError(f'doc: there is no document {doc}')
  return found


_DOC = {'type': 'integer', 'description': 'Number of a document.'}
_SEARCH = ToolSpec(
  name='search',
  description=(
    'Searches the library. Documents with any of the words are found, the best '
    'first; a "phrase in double quotes" must occur as it is.'
  ),
  parameters={
    'type': 'object',
    'properties': {
      'query': {'type': 'string', 'description': 'Words and "phrases".'},
      'k': {
        'type': 'integer',
        'minimum': 1,
        'maximum': MAX_K,
        'description': 'How many documents; 5 unless given.',
      },
    },
    'required': ['query'],
    'additionalProperties': False,
  },
)
_OPEN = ToolSpec(
  name='open',
  description='Shows one page of a document.',
  parameters={
    'type': 'object',
    'properties': {
      'doc': _DOC,
      'page': {
        'type': 'integer',
        'minimum': 1,
        'description': 'Number of the page; 1 unless given.',
      },
    },
    'required': ['doc'],
    'additionalProperties': False,
  },
)
_FIND = ToolSpec(
  name='find',
  description='Lists the sentences of a document that contain a text.',
  parameters={
    'type': 'object',
    'properties': {
      'doc': _DOC,
      'text': {'type': 'string', 'description': 'What to look for.'},
    },
    'required': ['doc', 'text'],
    'additionalProperties': False,
  },
)
