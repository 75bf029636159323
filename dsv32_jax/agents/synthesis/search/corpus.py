"""A library of documents in one SQLite file, found by FTS5 (bm25).

The file holds texts only. What is true of the world is not in it.
"""

import os
import pathlib
import re
import sqlite3
from collections.abc import Sequence
from typing import NamedTuple

from dsv32_jax.agents.synthesis.search.documents import Document

VERSION = 1
_PAGE_BREAK = '\f'
_TERM = re.compile(r'"([^"]*)"|(\w+)')
_WORD = re.compile(r'\w+')
# Words that most documents have; they cost time and say nothing.
_STOP = frozenset(
  'a an and are as at by for from had has in is it its of on or that the their '
  'this to was were what which who whose with'.split()
)
# A title counts as four mentions.
_RANK = 'bm25(4.0, 1.0)'


class Hit(NamedTuple):
  """A document that a search found."""

  doc: int
  title: str
  snippet: str


def write(path: str | os.PathLike, documents: Sequence[Document]) -> None:
  """Writes a library; the same bytes for the same documents.

  It is there whole or not at all.

  Args:
    path: of the file; one that exists is replaced.
    documents: in the order of their numbers, from 1.
  """
  path = pathlib.Path(path)
  part = path.with_name(f'{path.name}.{os.getpid()}.part')
  part.unlink(missing_ok=True)
  database = sqlite3.connect(part)
  try:
    # A file that is not finished is thrown away, so nothing is journalled.
    database.execute('PRAGMA journal_mode = OFF')
    database.execute('PRAGMA synchronous = OFF')
    database.execute(f'PRAGMA user_version = {VERSION}')
    database.execute('CREATE VIRTUAL TABLE library USING fts5(title, body)')
    database.execute(
      "INSERT INTO library(library, rank) VALUES('rank', ?)", (_RANK,)
    )
    database.executemany(
      'INSERT INTO library(rowid, title, body) VALUES(?, ?, ?)',
      (
        (number, document.title, _PAGE_BREAK.join(document.pages))
        for number, document in enumerate(documents, 1)
      ),
    )
    database.execute("INSERT INTO library(library) VALUES('optimize')")
    database.commit()
  finally:
    database.close()
  os.replace(part, path)


class Corpus:
  """A library that is open for reading. For one thread at a time."""

  def __init__(self, path: str | os.PathLike):
    """Opens the file.

    Raises:
      ValueError: if it is no library of this version.
    """
    uri = pathlib.Path(path).absolute().as_uri()
    self._database = sqlite3.connect(
      f'{uri}?mode=ro&immutable=1', uri=True, check_same_thread=False
    )
    try:
      (version,) = self._database.execute('PRAGMA user_version').fetchone()
    except sqlite3.DatabaseError as error:
      self._database.close()
      raise ValueError(f'path: {path} is no library ({error})') from None
    if version != VERSION:
      self._database.close()
      raise ValueError(
        f'path: {path} has version {version}, expected {VERSION}'
      )

  def search(self, query: str, k: int) -> list[Hit]:
    """The best documents for words of which any, and phrases that all, occur.

    Args:
      query: words; what stands in double quotes is a phrase.
      k: at most so many.
    """
    match = match_expression(query)
    if not match:
      return []
    rows = self._database.execute(
      "SELECT rowid, title, snippet(library, 1, '', '', ' ... ', 16) "
      'FROM library WHERE library MATCH ? ORDER BY rank, rowid LIMIT ?',
      (match, k),
    )
    return [
      Hit(doc, title, snippet.replace(_PAGE_BREAK, ' '))
      for doc, title, snippet in rows
    ]

  def pages(self, doc: int) -> tuple[str, tuple[str, ...]] | None:
    """Title and pages of a document, or None."""
    row = self._database.execute(
      'SELECT title, body FROM library WHERE rowid = ?', (doc,)
    ).fetchone()
    return None if row is None else (row[0], tuple(row[1].split(_PAGE_BREAK)))

  def close(self) -> None:
    """Closes the file."""
    self._database.close()


def match_expression(query: str) -> str:
  """A query in FTS5's own language, in which nothing of it is an operator.

  >>> match_expression('who built "Zorl & Sons" NOT')
  '("Zorl Sons") AND ("built" OR "NOT")'
  """
  phrases, words = [], []
  for phrase, word in _TERM.findall(query):
    if word.lower() in _STOP:
      continue
    if word:
      words.append(f'"{word}"')
    elif _WORD.search(phrase):
      phrases.append(f'"{" ".join(_WORD.findall(phrase))}"')
  parts = [' AND '.join(phrases), ' OR '.join(words)]
  if all(parts):
    return ' AND '.join(f'({part})' for part in parts)
  return ''.join(parts)
