"""What marks an answer, by the name that a problem gives."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from dsv32_jax.rl.problems import gym_datasets
from dsv32_jax.rl.rewards import boxed, programs
from dsv32_jax.rl.rewards.tools import Tools
from dsv32_jax.rl.rewards.types import Job, Mark
from dsv32_jax.rl.rewards.workers import Call


@runtime_checkable
class Scorer(Protocol):
  """Marks a batch of answers to problems that name it."""

  def __call__(self, jobs: Sequence[Job], tools: Tools) -> list[Mark]:
    """One mark a job, in their order.

    What goes wrong with one job is the `error` of its mark; an exception says
    that the scorer itself cannot work.

    Args:
      jobs: responses that parsed.
      tools: processes for what may hang, sandboxes for what may do anything.
    """
    ...


_SCORERS: dict[str, Scorer] = {}


def register(name: str, scorer: Scorer) -> None:
  """Makes a scorer known by name.

  Raises:
    ValueError: if another scorer has the name.
  """
  if _SCORERS.get(name, scorer) is not scorer:
    raise ValueError(f'name: got {name!r}, which another scorer has')
  _SCORERS[name] = scorer


def find(name: str) -> Scorer:
  """The scorer of that name.

  Raises:
    ValueError: if there is none.
  """
  if name not in _SCORERS:
    raise ValueError(
      f'scorer: got {name!r}, expected one of {sorted(_SCORERS)}'
    )
  return _SCORERS[name]


def one_by_one(score: Callable[[Job], float | Mark]) -> Scorer:
  """A scorer that marks in this process, and must not be able to hang.

  Args:
    score: of one job; an exception costs that job its mark.
  """

  def scorer(jobs: Sequence[Job], tools: Tools) -> list[Mark]:
    del tools
    return [_guarded(score, job) for job in jobs]

  return scorer


def in_workers(call_of: Callable[[Job], Call]) -> Scorer:
  """A scorer that marks in processes of its own, which may be ended.

  Args:
    call_of: what is to be called for a job; it returns the score. Its module is
      one of `tools.MODULES`.
  """

  def scorer(jobs: Sequence[Job], tools: Tools) -> list[Mark]:
    replies = tools.run([call_of(job) for job in jobs])
    return [
      Mark(0.0, reply.error) if reply.error else Mark(float(reply.value))
      for reply in replies
    ]

  return scorer


def either(
  is_harmless: Callable[[Job], bool], here: Scorer, away: Scorer
) -> Scorer:
  """A scorer that marks harmless jobs `here` and the others `away`."""

  def scorer(jobs: Sequence[Job], tools: Tools) -> list[Mark]:
    marks: dict[int, Mark] = {}
    harmless = [is_harmless(job) for job in jobs]
    for kind, chosen in ((True, here), (False, away)):
      indices = [index for index, value in enumerate(harmless) if value is kind]
      if indices:
        found = chosen([jobs[index] for index in indices], tools)
        marks.update(zip(indices, found, strict=True))
    return [marks[index] for index in range(len(jobs))]

  return scorer


def _guarded(score: Callable[[Job], float | Mark], job: Job) -> Mark:
  try:
    found = score(job)
    return found if isinstance(found, Mark) else Mark(float(found))
  except Exception as error:
    return Mark(0.0, f'{type(error).__name__}: {error}'[:300])


def _exact(job: Job) -> float:
  """The answer is the reference's, white space at the ends apart."""
  reference = job.problem.reference
  if isinstance(reference, dict):
    reference = reference['answer']
  return float(job.message.content.strip() == str(reference))


def _gym(job: Job) -> float:
  answer = job.message.content.strip()
  return gym_datasets.score(job.problem.reference, answer)


def _gym_call(job: Job) -> Call:
  answer = job.message.content.strip()
  return Call('gym_datasets', 'score', (job.problem.reference, answer))


def _programs(jobs: Sequence[Job], tools: Tools) -> list[Mark]:
  return programs.score(jobs, tools.run_programs)


def _rubric(jobs: Sequence[Job], tools: Tools) -> list[Mark]:
  return tools.judge(jobs)


def _speciale(job: Job) -> Mark:
  """The marks of derivations and of reviews (docs/speciale.md)."""
  from dsv32_jax.rl.speciale import scorers as speciale

  scores = speciale.score(job.problem, job.message)
  return Mark(
    scores.total,
    components={
      f'speciale/{name}': value for name, value in scores.components.items()
    },
  )


register('exact', one_by_one(_exact))
register(
  'gym',
  either(
    lambda job: gym_datasets.cannot_hang(job.problem.reference['family']),
    one_by_one(_gym),
    in_workers(_gym_call),
  ),
)
register(
  'boxed',
  either(
    boxed.is_plain, one_by_one(boxed.mark_plain), in_workers(boxed.call_of)
  ),
)
register('program', _programs)
register('rubric', _rubric)
for _name in ('proof', 'review', 'meta'):
  register(f'speciale/{_name}', one_by_one(_speciale))
