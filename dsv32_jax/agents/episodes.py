"""Many episodes at once, each in a thread of its own.

The policy is shared, so an engine sees the queries of all of them as one batch.
"""

import dataclasses
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures

from dsv32_jax import chat
from dsv32_jax.agents.loop import Budgets, EpisodeError, Manage, run_episode
from dsv32_jax.agents.types import Environment, Policy, Trajectory
from dsv32_jax.chat import Mode
from dsv32_jax.chat.errors import one_line


@dataclasses.dataclass(frozen=True, kw_only=True)
class Episode:
  """One episode that is to be run.

  Attributes:
    task: id of the task.
    make: gives its environment, at its beginning; called in the thread that the
      episode runs in.
    seed: of the episode.
    mode: of the replies.
    budgets: of the episode.
    manage: gives what keeps its context within the window (`loop.Manage`).
  """

  task: str
  make: Callable[[], Environment]
  seed: int = 0
  mode: Mode = 'thinking'
  budgets: Budgets = dataclasses.field(default_factory=Budgets)
  manage: Callable[[], Manage] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
  """An episode that has no trajectory, as its program failed.

  Attributes:
    task: id of the task.
    seed: of the episode.
    error: one line.
    trace: where it was raised, for people.
  """

  task: str
  seed: int
  error: str
  trace: str = ''


def run_episodes(
  episodes: Iterable[Episode],
  policy: Policy,
  *,
  parallel: int = 16,
  tokenizer: chat.ChatTokenizer | None = None,
) -> Iterator[Trajectory | Failure]:
  """Runs episodes, some at a time; gives them in their order.

  An environment or tool that fails costs its own episode; so does one that
  cannot be made or closed. Episodes are taken as there is room for them, a few
  more than run, so there may be any number. Stop asking, or close the iterator,
  and no further one begins.

  Args:
    episodes: what to run.
    policy: who replies, in all of them.
    parallel: how many run at a time.
    tokenizer: as for `run_episode`.

  Raises:
    ValueError: parallel below 1.
  """
  if parallel < 1:
    raise ValueError(f'parallel: got {parallel}, expected at least 1')
  return _run(episodes, policy, parallel, tokenizer)


def _run(
  episodes: Iterable[Episode],
  policy: Policy,
  parallel: int,
  tokenizer: chat.ChatTokenizer | None,
) -> Iterator[Trajectory | Failure]:
  waiting: list[futures.Future] = []
  closing = threading.Event()

  def run(episode: Episode) -> Trajectory | Failure | None:
    return None if closing.is_set() else _one(episode, policy, tokenizer)

  with futures.ThreadPoolExecutor(parallel, 'episode') as threads:
    try:
      for episode in episodes:
        waiting.append(threads.submit(run, episode))
        # One slow episode in front holds back the others no sooner than this.
        while waiting[0].done() or len(waiting) >= 4 * parallel:
          yield waiting.pop(0).result()
          if not waiting:
            break
      while waiting:
        yield waiting.pop(0).result()
    finally:
      closing.set()


def _one(
  episode: Episode, policy: Policy, tokenizer: chat.ChatTokenizer | None
) -> Trajectory | Failure:
  environment = None
  try:
    environment = episode.make()
    found = run_episode(
      policy,
      environment,
      budgets=episode.budgets,
      tokenizer=tokenizer,
      mode=episode.mode,
      seed=episode.seed,
      task=episode.task,
      manage=episode.manage() if episode.manage else None,
    )
  # A program of an environment may call sys.exit; that is not ours to obey.
  except (Exception, SystemExit) as error:
    found = _failure(episode, error)
  if environment is not None:
    try:
      environment.close()
    except (Exception, SystemExit) as error:
      # A failure that came before says more.
      if isinstance(found, Trajectory):
        found = _failure(episode, error)
  return found


def _failure(episode: Episode, error: BaseException) -> Failure:
  text = str(error)
  if not isinstance(error, EpisodeError):
    text = f'task {episode.task!r}, seed {episode.seed}: ' + one_line(
      f'{type(error).__name__}: {error}'
    )
  return Failure(
    task=episode.task,
    seed=episode.seed,
    error=text,
    trace=''.join(traceback.format_exception(error)),
  )
