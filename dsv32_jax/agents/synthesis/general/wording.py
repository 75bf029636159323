"""Prompts of general tasks: what is asked, in several wordings."""

import json
import random
from collections.abc import Sequence

from dsv32_jax.agents.synthesis.general import constraints as c
from dsv32_jax.agents.synthesis.general.schema import Domain

_OPS = {
  '<=': ('at most {}', 'no more than {}', 'up to {}'),
  '>=': ('at least {}', 'no less than {}', '{} or more'),
  '==': ('exactly {}', 'precisely {}'),
  '!=': ('anything but {}', 'not {}'),
}


def prompt(
  domain: Domain,
  given: Sequence[str],
  constraints: Sequence[c.Constraint],
  rng: random.Random,
) -> str:
  """The whole text of a task."""
  opening = rng.choice(domain.openings).format(rows=len(given))
  lines = [f'{opening} {domain.given.says.capitalize()}: {", ".join(given)}.']
  told = _places(domain, constraints, rng)
  told += [
    _sentence(domain, given, one, rng)
    for one in constraints
    if not _is_place(one)
  ]
  joined = ' '.join(told) if rng.random() < 0.5 else '\n- '.join(['', *told])
  lines.append(joined.strip('\n') if joined.startswith('\n') else joined)
  shape = {domain.given.name: given[0]} | {
    field.name: '...' for field in domain.fields
  }
  lines.append(
    f'Submit a JSON list, one object each, in the order above: '
    f'{json.dumps([shape], ensure_ascii=False)}'
  )
  return '\n'.join(lines)


def _is_place(one: c.Constraint) -> bool:
  """Whether it only says that an entity belongs to another of its row."""
  return isinstance(one, c.Compare) and (
    (one.op, one.second_column) == ('==', 'name')
  )


def _places(
  domain: Domain, constraints: Sequence[c.Constraint], rng: random.Random
) -> list[str]:
  owners: dict[str, list[str]] = {}
  for one in constraints:
    if isinstance(one, c.Compare) and _is_place(one):
      owners.setdefault(one.second, []).append(_says(domain, one.first))
  told = []
  for place, says in owners.items():
    whose = _says(domain, place)
    told.append(
      rng.choice(
        [
          f'The {" and the ".join(says)} must belong to the {whose} of the '
          'same entry.',
          f'Per entry, take {" and ".join(says)} from its {whose}.',
        ]
      )
    )
  return told


def _sentence(
  domain: Domain, given: Sequence[str], one: c.Constraint, rng: random.Random
) -> str:
  text = _clause(domain, given, one, rng)
  return text[0].upper() + text[1:] + '.'


def _op(op: str, value: object, rng: random.Random) -> str:
  return rng.choice(_OPS[op]).format(value)


def _column(domain: Domain, field: str, column: str) -> str:
  table = domain.table_of(field)
  return column if column == 'name' else table.column(column).says


def _says(domain: Domain, field: str) -> str:
  # The given field's own word is the plural that heads the list.
  if field == domain.given.name:
    return domain.given.table.replace('_', ' ')
  return domain.field(field).says


def _of(domain: Domain, field: str, column: str) -> str:
  return f'the {_column(domain, field, column)} of the {_says(domain, field)}'


def _clause(
  domain: Domain, given: Sequence[str], one: c.Constraint, rng: random.Random
) -> str:
  match one:
    case c.Compare():
      first = _of(domain, one.first, one.first_column)
      second = _of(domain, one.second, one.second_column)
      return f'every time, {first} is {_op(one.op, second, rng)}'
    case c.Distinct():
      names = [domain.field(name).says for name in one.fields]
      if one.together:
        return f'no two entries share the same {" and ".join(names)}'
      return rng.choice(
        [
          f'no {" or ".join(names)} is used twice',
          f'never repeat any {" or ".join(names)}',
        ]
      )
    case c.Bound():
      where = 'every time' if one.row < 0 else f'for {given[one.row]}'
      of = _of(domain, one.field, one.column)
      text = f'{of} is {_op(one.op, one.value, rng)}'
      return rng.choice([f'{where}, {text}', f'{text} {where}'])
    case c.Sum():
      parts = ' plus '.join(_of(domain, f, column) for f, column in one.terms)
      limit = _op(one.op, one.value, rng)
      if one.row < 0:
        return rng.choice(
          [
            f'over all {len(given)}, {parts} comes to {limit}',
            f'the grand total of {parts} is {limit}',
          ]
        )
      return rng.choice(
        [
          f'for {given[one.row]}, {parts} comes to {limit}',
          f'{parts} together make {limit} for {given[one.row]}',
        ]
      )
    case c.Branch():
      of = _of(domain, one.field, one.column)
      told = []
      for band, case in enumerate(one.cases):
        limits = []
        if band:
          limits.append(f'{one.limits[band - 1]} or more')
        if band < len(one.limits):
          limits.append(f'below {one.limits[band]}')
        then = ' and '.join(
          f'{_of(domain, b.field, b.column)} must be {_op(b.op, b.value, rng)}'
          for b in case
        )
        told.append(
          f'if {of} is {" but ".join(limits)}, '
          f'{then or "nothing more is asked"}'
        )
      return f'for {given[one.row]}: {"; ".join(told)}'
    case c.Count():
      says = domain.field(one.field).says
      what = _column(domain, one.field, one.column)
      limit = _op(one.op, one.number, rng)
      return (
        f'the number of entries whose {says} has {what} {one.value} is {limit}'
      )
    case c.Order():
      verb = 'never falls' if one.direction == 'up' else 'never rises'
      return f'{_of(domain, one.field, one.column)} {verb} from one to the next'
    case c.Spread():
      what = _column(domain, one.field, one.column)
      says = domain.field(one.field).says
      return f'at most {one.number} of the {says} choices share one {what}'
    case c.Listed():
      relation = domain.relation(one.relation)
      ends = f'{_says(domain, one.first)} and {_says(domain, one.second)}'
      column = next(x for x in relation.columns if x.name == one.column)
      return (
        f'{relation.says} of {ends}: the {column.says} is '
        f'{_op(one.op, one.value, rng)} every time'
      )
    case c.Route():
      relation = domain.relation(one.relation)
      column = next(x for x in relation.columns if x.name == one.column)
      which = 'each one' if one.each else 'their sum'
      says = domain.field(one.field).says
      return (
        f'{relation.says} from one {says} to the next: of the {column.says}, '
        f'{which} is {_op(one.op, one.value, rng)}'
      )


def describe(domain: Domain) -> str:
  """What an environment holds, for a model that proposes tasks."""
  lines = [f'Environment: {domain.name}. Tables:']
  for table in domain.tables:
    columns = [
      f'{x.name} ({x.low} to {x.high})'
      if x.is_number
      else f'{x.name} (one of {list(x.options)})'
      for x in table.columns
    ]
    owner = f' (belongs to a {table.parent})' if table.parent else ''
    lines.append(f'- {table.name}{owner}: {"; ".join(columns) or "only names"}')
  for relation in domain.relations:
    columns = ', '.join(x.name for x in relation.columns)
    lines.append(
      f'- relation {relation.name}({relation.first}, {relation.second}): '
      f'{columns}'
    )
  lines.append(
    f'Answer: a row for each {domain.given.name} with '
    + ', '.join(f'{x.name} (a {x.table})' for x in domain.fields)
  )
  return '\n'.join(lines)
