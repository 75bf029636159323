"""Fills a domain's tables from a seed and stores them in SQLite."""

import math
import pathlib
import random
import sqlite3
from typing import Any

from dsv32_jax.agents.synthesis.general.places import PLACES
from dsv32_jax.agents.synthesis.general.schema import (
  KEY,
  Column,
  Domain,
  Relation,
  Table,
)

Rows = dict[str, list[dict[str, Any]]]
"""Rows of each table and relation, in order."""

# A degree of latitude; of longitude it is that by the cosine of the latitude.
_KM_A_DEGREE = 111.2
_DRAWS = 50


def generate(domain: Domain, rng: random.Random) -> Rows:
  """Draws all rows of an environment of `domain`."""
  rows: Rows = {}
  used: set[str] = set()
  for table in domain.tables:
    rows[table.name] = found = []
    alike: set[tuple] = set()
    parents = [one[KEY] for one in rows[table.parent]] if table.parent else ['']
    for parent in parents:
      count = rng.randint(*table.count)
      for entity in _named(table, count, used, rng):
        if table.parent:
          entity[table.parent] = parent
        # No two alike: a condition can then tell any two of them apart.
        for _ in range(_DRAWS):
          facts = {x.name: _drawn(x, rng) for x in table.columns}
          if tuple(facts.values()) not in alike:
            break
        alike.add(tuple(facts.values()))
        found.append(entity | facts)
  for relation in domain.relations:
    rows[relation.name] = _pairs(relation, rows, rng)
  return rows


def _named(
  table: Table, count: int, used: set[str], rng: random.Random
) -> list[dict[str, Any]]:
  firsts, lasts = table.names
  if firsts == ('places',):
    country = rng.choice(sorted(PLACES))
    drawn = rng.sample(PLACES[country], min(count, len(PLACES[country])))
    return [
      {KEY: name, 'latitude': latitude, 'longitude': longitude}
      for name, latitude, longitude in drawn
    ]
  if not lasts:
    # In their own order: dates, periods, meals.
    return [{KEY: name} for name in firsts[:count]]
  found = []
  while len(found) < count:
    name = f'{rng.choice(firsts)} {rng.choice(lasts)}'
    if name not in used:
      used.add(name)
      found.append({KEY: name})
    elif rng.random() < 0.2:
      # Few names are left: number them.
      name = f'{name} {rng.randint(2, 99)}'
      if name not in used:
        used.add(name)
        found.append({KEY: name})
  return found


def _drawn(column: Column, rng: random.Random) -> int | str:
  if column.options:
    return rng.choice(column.options)
  return rng.randrange(column.low, column.high + 1, column.step)


def _pairs(
  relation: Relation, rows: Rows, rng: random.Random
) -> list[dict[str, Any]]:
  found: dict[tuple[str, str], dict[str, Any]] = {}
  for one in rows[relation.first]:
    for other in rows[relation.second]:
      pair = (one[KEY], other[KEY])
      if relation.first == relation.second and pair[::-1] in found:
        facts = found[pair[::-1]]
      elif relation.kind == 'distance':
        km = _distance_km(one, other)
        facts = {
          column.name: round(km * rng.randint(column.low, column.high) / 100)
          for column in relation.columns
        }
      else:
        facts = {c.name: _drawn(c, rng) for c in relation.columns}
      found[pair] = facts
  return [
    {'first': first, 'second': second, **facts}
    for (first, second), facts in found.items()
  ]


def _distance_km(one: dict[str, Any], other: dict[str, Any]) -> float:
  middle = math.radians((one['latitude'] + other['latitude']) / 2)
  north = one['latitude'] - other['latitude']
  east = (one['longitude'] - other['longitude']) * math.cos(middle)
  return _KM_A_DEGREE * math.hypot(north, east)


def store(rows: Rows, path: pathlib.Path) -> None:
  """Writes the rows to a new SQLite file; the same rows give the same bytes."""
  connection = sqlite3.connect(path)
  try:
    connection.execute('PRAGMA journal_mode = OFF')
    connection.execute('PRAGMA synchronous = OFF')
    for name, found in rows.items():
      columns = list(found[0])
      keys = [KEY] if KEY in columns else ['first', 'second']
      typed = ', '.join(
        f'"{column}" {_TYPES[type(found[0][column])]} NOT NULL'
        for column in columns
      )
      connection.execute(
        f'CREATE TABLE "{name}" ({typed}, PRIMARY KEY ({", ".join(keys)}))'
        ' WITHOUT ROWID'
      )
      marks = ', '.join('?' * len(columns))
      connection.executemany(
        f'INSERT INTO "{name}" VALUES ({marks})',
        [tuple(row[column] for column in columns) for row in found],
      )
    connection.commit()
  finally:
    connection.close()


_TYPES = {int: 'INTEGER', str: 'TEXT', float: 'REAL'}


def connect(path: pathlib.Path) -> sqlite3.Connection:
  """Opens an environment's database; nothing can be written through it.

  Raises:
    FileNotFoundError: there is no such file.
  """
  if not path.is_file():
    raise FileNotFoundError(f'database: got {path}, expected a file')
  return sqlite3.connect(
    f'{path.resolve().as_uri()}?mode=ro', uri=True, check_same_thread=False
  )
