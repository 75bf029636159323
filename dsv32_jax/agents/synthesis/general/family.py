"""The general family: environments, tasks hardened in rounds, and the gate."""

import collections
import dataclasses
import json
import math
import pathlib
import random
import sqlite3
from collections.abc import Sequence

from dsv32_jax.agents.synthesis.family import Made
from dsv32_jax.agents.synthesis.filters import Rejected, refuse
from dsv32_jax.agents.synthesis.general import (
  baselines,
  constraints,
  data,
  domains,
  drafts,
  solution,
  tools,
  wording,
)
from dsv32_jax.agents.synthesis.general.author import ProceduralAuthor
from dsv32_jax.agents.synthesis.general.environment import GeneralEnvironment
from dsv32_jax.agents.synthesis.general.schema import KEY, Domain
from dsv32_jax.agents.synthesis.general.solver import Solver
from dsv32_jax.agents.synthesis.general.verifier import Verifier
from dsv32_jax.agents.synthesis.roles import (
  Author,
  AuthorError,
  Draft,
  ModelAuthor,
)
from dsv32_jax.agents.synthesis.tasks import TaskRecord
from dsv32_jax.agents.types import Policy

_TRIES_A_TASK = 25
_WEAK_ANSWERS = 40
_PINS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workshop:
  """An environment that tasks are being made for."""

  domain: Domain
  rows: data.Rows
  database: sqlite3.Connection
  solver: Solver
  verifier: Verifier


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneralFamily:
  """Databases with typed tools, and tasks over them.

  Attributes:
    domains: names of the domains in turn; empty for all of them.
    rounds: least and most rounds of hardening.
    policy: a model that writes the conditions instead of the procedural author;
      what pins its answer down at the end stays procedural, and the record says
      so. Such a family makes tasks in one process (`workers=1`).
    policy_name: of the model.
  """

  domains: tuple[str, ...] = ()
  rounds: tuple[int, int] = (3, 7)
  policy: Policy | None = None
  policy_name: str = ''

  name = 'general'

  def __post_init__(self):
    unknown = set(self.domains) - set(domains.DOMAINS)
    if unknown:
      raise ValueError(
        f'domains: got {sorted(unknown)}, expected some of '
        f'{list(domains.DOMAINS)}'
      )

  def make(
    self, *, seed: int, index: int, tasks: int, database: pathlib.Path
  ) -> Made:
    """Makes environment `index`; see `Family.make`."""
    rng = random.Random(f'general/{seed}/{index}')
    names = self.domains or tuple(domains.DOMAINS)
    domain = domains.DOMAINS[names[index % len(names)]]
    rows = data.generate(domain, rng)
    data.store(rows, database)
    connection = data.connect(database)
    found: list[TaskRecord] = []
    rejected: collections.Counter[str] = collections.Counter()
    try:
      workshop = Workshop(
        domain=domain,
        rows=rows,
        database=connection,
        solver=Solver(domain, connection),
        verifier=Verifier(domain, connection),
      )
      while len(found) < tasks:
        if rejected.total() >= _TRIES_A_TASK * tasks:
          break
        try:
          found.append(self._task(workshop, seed, index, len(found), rng))
        except Rejected as reason:
          rejected[str(reason)] += 1
    finally:
      connection.close()
    return Made(tasks=tuple(found), rejected=dict(sorted(rejected.items())))

  def environment(
    self, task: TaskRecord, database: pathlib.Path
  ) -> GeneralEnvironment:
    """Opens a task for one episode."""
    return GeneralEnvironment(task, domains.DOMAINS[task.domain], database)

  def check(self, task: TaskRecord, database: pathlib.Path) -> None:
    """Runs the reference solution again, and an answer changed in one field.

    Raises:
      ValueError: saying which check failed.
    """
    environment = self.environment(task, database)
    try:
      by_name = {tool.spec.name: tool for tool in environment.tools}
      solution.run(task.solution, by_name)
      score = environment.score()
      if score.reward != 1:
        raise ValueError(f'{task.id}: the reference fails: {score.reasons}')
    finally:
      environment.close()

  def _task(
    self,
    workshop: Workshop,
    seed: int,
    index: int,
    number: int,
    rng: random.Random,
  ) -> TaskRecord:
    domain = workshop.domain
    entities = [row[KEY] for row in workshop.rows[domain.given.table]]
    size = min(rng.randint(*domain.rows), len(entities))
    # In the order of the table: dates and periods follow each other.
    chosen = sorted(rng.sample(range(len(entities)), size))
    given = tuple(entities[i] for i in chosen)
    hidden = workshop.solver.solve(given, domain.base, shuffle=rng).answer
    if hidden is None:
      raise Rejected('no plain answer')
    author = self._author(workshop, given, hidden, rng)
    rounds = rng.randint(*self.rounds)
    draft, nodes = write_draft(author, workshop, given, rounds)
    found = (*domain.base, *map(constraints.from_json, draft))
    written = len(found)
    found, answer = self._pinned(workshop, given, found, rng)
    made_by = author.name
    if self.policy is not None and len(found) > written:
      made_by += '+procedural'
    text = wording.prompt(domain, given, found, rng)
    self._refuse_weak_answers(workshop, given, found, text, rng)
    source = solution.write(domain, given, found)
    calls, submitted = run_solution(workshop, source)
    score = workshop.verifier.score(submitted, given, found)
    if score.reward != 1 or json.loads(submitted) != answer:
      raise Rejected('reference fails')
    space = sum(
      math.log10(len(workshop.rows[field.table])) for field in domain.fields
    )
    families = collections.Counter(map(constraints.family, found))
    return TaskRecord(
      id=f'general-{index:05d}-{number}',
      family='general',
      domain=domain.name,
      environment=f'general-{index:05d}',
      seed=seed,
      index=index,
      made_by=made_by,
      prompt=text,
      spec={
        'given': list(given),
        'constraints': [constraints.to_json(one) for one in found],
      },
      solution=source,
      answer=submitted,
      difficulty={
        'rows': len(given),
        'fields': len(domain.fields),
        'constraints': len(found),
        'rounds': rounds,
        'log10_space': round(space * len(given), 2),
        'solver_nodes': nodes,
        'tool_calls': calls,
        **{f'family/{name}': count for name, count in families.items()},
      },
      names=tuple(given),
    )

  def _author(
    self,
    workshop: Workshop,
    given: Sequence[str],
    hidden: baselines.Answer,
    rng: random.Random,
  ) -> Author:
    procedural = ProceduralAuthor(
      workshop.domain, workshop.rows, given, hidden, rng
    )
    if self.policy is None:
      return procedural
    return ModelAuthor(
      self.policy,
      name=self.policy_name,
      brief=f'{wording.describe(workshop.domain)}\nRows: {", ".join(given)}',
      examples=[*procedural.propose(), *procedural.harden([], 2)],
      seed=rng.randrange(1 << 30),
    )

  def _pinned(
    self,
    workshop: Workshop,
    given: Sequence[str],
    found: tuple[constraints.Constraint, ...],
    rng: random.Random,
  ) -> tuple[tuple[constraints.Constraint, ...], baselines.Answer]:
    """Adds conditions until no answer one field away passes any more."""
    _, submitted = run_solution(
      workshop, solution.write(workshop.domain, given, found)
    )
    # Whatever is added leaves this answer standing, and those that the
    # solution looks at before it stay wrong: it remains the reference's.
    answer = json.loads(submitted)
    near = [
      one
      for one in baselines.mutants(workshop.domain, workshop.rows, answer)
      if passes(workshop.verifier, one, found)
    ]
    author = ProceduralAuthor(
      workshop.domain, workshop.rows, given, answer, rng
    )
    for _ in range(_PINS):
      if not near:
        break
      row, field = _difference(near[0], answer)
      options = [one for one in author.pinning(row, field) if one not in found]
      if not options:
        break
      left, best = min(
        (
          (
            [x for x in near if workshop.verifier.holds(one, x)],
            one,
          )
          for one in options
        ),
        key=lambda pair: len(pair[0]),
      )
      if len(left) < len(near):
        near, found = left, (*found, best)
    if near:
      raise Rejected('a mutated answer passes')
    if workshop.solver.solve(given, found).answer is None:
      raise Rejected('not proved solvable')
    return found, answer

  def _refuse_weak_answers(
    self,
    workshop: Workshop,
    given: Sequence[str],
    found: Sequence[constraints.Constraint],
    text: str,
    rng: random.Random,
  ) -> None:
    domain, rows = workshop.domain, workshop.rows
    for name, answerer in (
      ('random', baselines.random_answer),
      ('greedy', baselines.greedy_answer),
    ):
      refuse(
        name,
        (
          passes(workshop.verifier, answerer(domain, rows, given, rng), found)
          for _ in range(_WEAK_ANSWERS)
        ),
      )
    guess = baselines.toolless_answer(domain, text, given, rng)
    score = workshop.verifier.score(json.dumps(guess), given, found)
    refuse('tool-less', [score.reward > 0])


def write_draft(
  author: Author, workshop: Workshop, given: Sequence[str], rounds: int
) -> tuple[Draft, int]:
  """Lets an author propose and harden; what has no answer is repaired.

  Args:
    author: who writes.
    workshop: of the environment.
    given: the given field of each row.
    rounds: of hardening.

  Returns:
    The draft, and the solver's nodes in the last proof.

  Raises:
    Rejected: without a first draft that can be met.
  """
  draft, nodes = [], 0
  for level in range(rounds + 1):
    try:
      new = author.harden(draft, level) if level else author.propose()
      wrong, nodes_now = complaint(workshop, given, new)
      if wrong and not level:
        new = author.repair(new, wrong)
        wrong, nodes_now = complaint(workshop, given, new)
    except AuthorError:
      # This level has nothing for the domain; a later one may.
      if not level:
        raise Rejected('no draft') from None
      continue
    if not wrong:
      draft, nodes = new, nodes_now
  if not draft:
    raise Rejected('no draft')
  return draft, nodes


def complaint(
  workshop: Workshop, given: Sequence[str], draft: Draft
) -> tuple[str, int]:
  """What is wrong with a draft ('' if nothing), and the solver's nodes."""
  try:
    found = drafts.read(workshop.domain, len(given), draft)
  except ValueError as error:
    return str(error), 0
  solved = workshop.solver.solve(given, (*workshop.domain.base, *found))
  if solved.answer is not None:
    return '', solved.nodes
  return (
    'no answer meets all of it' if solved.is_proof else 'no answer was found'
  ), solved.nodes


def _difference(
  one: baselines.Answer, other: baselines.Answer
) -> tuple[int, str]:
  return next(
    (index, field)
    for index, (row, with_it) in enumerate(zip(one, other, strict=True))
    for field in row
    if row[field] != with_it[field]
  )


def passes(
  verifier: Verifier,
  answer: baselines.Answer,
  found: Sequence[constraints.Constraint],
) -> bool:
  """Whether an answer inside the space meets everything."""
  return all(verifier.holds(one, answer) for one in found)


def run_solution(workshop: Workshop, source: str) -> tuple[int, str]:
  """Runs a solution over tools of its own: calls made, text submitted.

  Raises:
    Rejected: it failed, or submitted nothing.
  """
  submitted: list[str] = []

  def submit(text: str) -> str:
    submitted.append(text)
    return 'received'

  made = tools.make(workshop.domain, workshop.database, submit)
  try:
    trace = solution.run(source, {tool.spec.name: tool for tool in made})
  except solution.SolutionError:
    raise Rejected('reference fails') from None
  if not submitted:
    raise Rejected('reference fails')
  return len(trace), submitted[0]
