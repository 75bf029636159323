"""Weak answerers: a task that one of them answers is no search task.

Each is a function of an `Attempt` and gives one name. They use the tools and,
for guesses, what is common in the world, but not the plan's whole path.
"""

import dataclasses
import random
from collections.abc import Callable, Mapping

from dsv32_jax.agents.synthesis.search import schema
from dsv32_jax.agents.synthesis.search.plans import Plan, passes
from dsv32_jax.agents.synthesis.search.reading import Article, Reader
from dsv32_jax.agents.synthesis.search.world import World

_READ = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt:
  """What an answerer may use.

  Attributes:
    question: as it is asked.
    plan: of which most see the last hop only.
    reader: of the library.
    world: for guesses without tools.
    rng: draws.
  """

  question: str
  plan: Plan
  reader: Reader
  world: World
  rng: random.Random


def closed_book(attempt: Attempt) -> str:
  """The value that the last relation has most often, or the best known name."""
  world, plan = attempt.world, attempt.plan
  last = plan.hops[-1] if plan.hops else None
  if last is not None and not last.is_inverse:
    counts = {
      entity: len(world.subjects.get((last.relation, entity), ()))
      for entity in world.by_type[plan.answer_type]
    }
  else:
    into = schema.INTO[plan.answer_type]
    counts = {
      entity: sum(
        len(world.subjects.get((relation.key, entity), ())) for relation in into
      )
      for entity in world.by_type[plan.answer_type]
    }
  # The first of the most frequent: dicts keep their order.
  return world.name(max(counts, key=lambda entity: counts[entity]))


def single_search(attempt: Attempt) -> str:
  """The best document for the whole question, and what it says at the end."""
  hits = attempt.reader.search(attempt.question, k=1)
  if not hits:
    return ''
  article = attempt.reader.article(hits[0][0])
  if article.type == attempt.plan.answer_type:
    return article.title
  return _last_value(attempt.plan, article) or article.title


def last_hop_only(attempt: Attempt) -> str:
  """What fits the last hop, wherever the way there began."""
  plan, reader = attempt.plan, attempt.reader
  if not plan.hops:
    words = schema.TYPES[plan.start].nouns[0]
    constraints = plan.constraints[-1:]
  else:
    relation = schema.RELATIONS[plan.hops[-1].relation]
    words = f'{schema.TYPES[relation.subject].nouns[0]} {relation.says[0]}'
    constraints = plan.hops[-1].constraints
  names = [f'"{c.value}"' for c in constraints if isinstance(c.value, str)]
  for doc, _ in reader.search(' '.join([words, *names]), k=_READ):
    article = reader.article(doc)
    value = _last_value(plan, article)
    if value:
      return value
    if article.type == plan.answer_type and all(
      c.via is not None
      or (
        (value := article.value(schema.RELATIONS[c.relation])) is not None
        and passes(value, c)
      )
      for c in constraints
    ):
      return article.title
  return ''


def skips_hops(attempt: Attempt) -> str:
  """The last hop, from the entities that the question names."""
  plan = attempt.plan
  for name in plan.names():
    article = attempt.reader.named(name)
    if article is None:
      continue
    if article.type == plan.answer_type:
      return article.title
    value = _last_value(plan, article)
    if value:
      return value
  return ''


def random_entity(attempt: Attempt) -> str:
  """Any entity of the answer's type."""
  return attempt.rng.choice(attempt.world.names_of(attempt.plan.answer_type))


def _last_value(plan: Plan, article: Article) -> str | None:
  if not plan.hops or plan.hops[-1].is_inverse:
    return None
  relation = schema.RELATIONS[plan.hops[-1].relation]
  if article.type != relation.subject:
    return None
  value = article.value(relation)
  return value if isinstance(value, str) else None


ANSWERERS: Mapping[str, Callable[[Attempt], str]] = {
  'closed_book': closed_book,
  'single_search': single_search,
  'last_hop_only': last_hop_only,
  'skips_hops': skips_hops,
  'random_entity': random_entity,
}
