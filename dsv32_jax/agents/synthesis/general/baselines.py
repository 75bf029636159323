"""Weak answers, which a task must not accept."""

import random
from collections.abc import Iterator, Sequence

from dsv32_jax.agents.synthesis.general.data import Rows
from dsv32_jax.agents.synthesis.general.schema import KEY, Domain

Answer = list[dict[str, str]]


def random_answer(
  domain: Domain, rows: Rows, given: Sequence[str], rng: random.Random
) -> Answer:
  """Any entity in every field: uniform over the typed answer space."""
  return [
    {domain.given.name: value}
    | {x.name: rng.choice(rows[x.table])[KEY] for x in domain.fields}
    for value in given
  ]


def greedy_answer(
  domain: Domain, rows: Rows, given: Sequence[str], rng: random.Random
) -> Answer:
  """In each field the cheapest, or the best, of what fits and is not used.

  It knows which tables belong to which, and it repeats nothing as long as it
  can; it looks at no condition of the task.
  """
  sign = rng.choice((1, -1))
  # One column a table; where it has no numbers, chance.
  columns = {
    table.name: rng.choice(numbers)
    for table in domain.tables
    if (numbers := [x.name for x in table.columns if x.is_number])
  }
  used: set[tuple[str, str]] = set()
  answer = []
  for value in given:
    row = {domain.given.name: value}
    chosen = {domain.given.table: value}
    for field in domain.fields:
      table = domain.table(field.table)
      options = rows[table.name]
      if table.parent in chosen:
        options = [
          x for x in options if x[table.parent] == chosen[table.parent]
        ]
      options = [
        x for x in options if (table.name, x[KEY]) not in used
      ] or options
      column = columns.get(table.name)
      if column and rng.random() < 0.8:
        best = min(options, key=lambda x, c=column: sign * x[c])
      else:
        best = rng.choice(options)
      row[field.name] = best[KEY]
      chosen[table.name] = best[KEY]
      used.add((table.name, best[KEY]))
    answer.append(row)
  return answer


def toolless_answer(
  domain: Domain, prompt: str, given: Sequence[str], rng: random.Random
) -> Answer:
  """From the prompt alone: words of it stand where names should."""
  words = [word.strip('.,:;"{}[]') for word in prompt.split()]
  words = sorted({word for word in words if word[:1].isupper()}) or ['unknown']
  return [
    {domain.given.name: value}
    | {field.name: rng.choice(words) for field in domain.fields}
    for value in given
  ]


def mutants(domain: Domain, rows: Rows, answer: Answer) -> Iterator[Answer]:
  """Every answer that differs from `answer` in one field of one row."""
  for index, row in enumerate(answer):
    for field in domain.fields:
      for entity in rows[field.table]:
        if entity[KEY] != row[field.name]:
          changed = [dict(one) for one in answer]
          changed[index][field.name] = entity[KEY]
          yield changed
