"""A general task as an episode's environment."""

import pathlib
from collections.abc import Sequence

from dsv32_jax.agents.synthesis.general import constraints, data, tools
from dsv32_jax.agents.synthesis.general.schema import Domain
from dsv32_jax.agents.synthesis.general.verifier import Verifier
from dsv32_jax.agents.synthesis.tasks import TaskRecord
from dsv32_jax.agents.types import Score
from dsv32_jax.chat import Message

_SYSTEM = (
  'Solve the task with the tools; they are the only way to the facts. '
  'Hand in the answer by submit_result.'
)


class GeneralEnvironment:
  """One episode of a general task.

  Args:
    task: a record of the family.
    domain: that the task is of.
    database: its environment's file.
  """

  def __init__(self, task: TaskRecord, domain: Domain, database: pathlib.Path):
    self._task = task
    self._connection = data.connect(database)
    self._verifier = Verifier(domain, self._connection)
    self._tools = tools.make(domain, self._connection, self._submit)
    self._given = tuple(task.spec['given'])
    self._constraints = tuple(
      constraints.from_json(one) for one in task.spec['constraints']
    )
    self._submitted: str | None = None

  @property
  def tools(self) -> Sequence[tools.FunctionTool]:
    return self._tools

  @property
  def is_over(self) -> bool:
    return self._submitted is not None

  def start(self) -> Sequence[Message]:
    specs = tuple(tool.spec for tool in self._tools)
    return (
      Message(role='system', content=_SYSTEM, tools=specs),
      Message(role='user', content=self._task.prompt),
    )

  def score(self, messages: Sequence[Message] = ()) -> Score:
    """Judges what was submitted; what was only said does not count."""
    del messages
    if self._submitted is None:
      return Score(reward=0.0, reasons=('nothing was submitted',))
    return self._verifier.score(self._submitted, self._given, self._constraints)

  def close(self) -> None:
    self._connection.close()

  def _submit(self, text: str) -> str:
    # The first one counts, as the episode is over with it.
    if self._submitted is None:
      self._submitted = text
    return 'received'
