"""Finds a plan's answers with the tools alone.

It knows what is asked, as a plan, and how to read; it knows nothing of the
world. What it finds is compared with the graph's answer.
"""

import dataclasses
from collections.abc import Sequence

from dsv32_jax.agents.synthesis.search import schema
from dsv32_jax.agents.synthesis.search.plans import (
  Constraint,
  Plan,
  passes,
)
from dsv32_jax.agents.synthesis.search.reading import Article, Call, Reader
from dsv32_jax.agents.synthesis.search.tools import MAX_K


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solution:
  """What the solver found.

  Attributes:
    answers: names, in order of the alphabet.
    calls: that it took.
  """

  answers: tuple[str, ...]
  calls: tuple[Call, ...]


def solve(plan: Plan, reader: Reader) -> Solution:
  """Follows a plan through the library.

  Returns:
    No answers where a search was cut off that had to be complete.
  """
  reader.begin()
  found = _described(plan.start, plan.constraints, reader)
  for hop in plan.hops:
    relation = schema.RELATIONS[hop.relation]
    following: dict[str, Article] = {}
    for article in found:
      if hop.is_inverse:
        leads = _subjects(hop.relation, article.title, reader) or []
      else:
        name = article.value(relation)
        lead = reader.named(name) if isinstance(name, str) else None
        leads = [] if lead is None else [lead]
      following.update((lead.title, lead) for lead in leads)
    found = [
      article
      for article in following.values()
      if all(_holds(article, c, reader) for c in hop.constraints)
    ]
  return Solution(
    answers=tuple(sorted(article.title for article in found)),
    calls=reader.calls,
  )


def _described(
  kind: str, constraints: Sequence[Constraint], reader: Reader
) -> list[Article]:
  """All entities of a type that fit constraints."""
  # A name leads there more directly than what leads to a name.
  for anchor in sorted(constraints, key=lambda c: c.via is not None):
    candidates = _candidates(anchor, reader)
    if candidates is not None:
      return [
        article
        for article in candidates
        if article.type == kind
        and all(_holds(article, c, reader) for c in constraints)
      ]
  return []


def _candidates(constraint: Constraint, reader: Reader) -> list[Article] | None:
  """All that a constraint is true of; None if that cannot be looked up."""
  if schema.RELATIONS[constraint.relation].kind != 'entity':
    return None
  if constraint.via is None:
    return _subjects(constraint.relation, str(constraint.value), reader)
  values = _candidates(constraint.via, reader)
  if values is None:
    return None
  found: list[Article] = []
  for value in values:
    subjects = _subjects(constraint.relation, value.title, reader)
    if subjects is None:
      return None
    found += subjects
  return found


def _subjects(relation: str, name: str, reader: Reader) -> list[Article] | None:
  """All of whom a relation says a name; None if a search was cut off."""
  hits = reader.search(f'"{name}"')
  if len(hits) == MAX_K:
    return None
  articles = [reader.article(doc) for doc, _ in hits]
  known = schema.RELATIONS[relation]
  return [
    article
    for article in articles
    if article.type == known.subject and article.value(known) == name
  ]


def _holds(article: Article, constraint: Constraint, reader: Reader) -> bool:
  relation = schema.RELATIONS[constraint.relation]
  if article.type != relation.subject:
    return False
  value = article.value(relation)
  if value is None:
    return False
  if constraint.via is None:
    return passes(value, constraint)
  behind = reader.named(str(value))
  return behind is not None and _holds(behind, constraint.via, reader)
