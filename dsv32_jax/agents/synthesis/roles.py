"""Who writes tasks: propose, repair and harden behind one interface.

The paper's agents are language models. Embedded here is a procedural author for
each family (`general/author.py`), which is no model; `ModelAuthor` gives the
seat to whatever answers as a `Policy`. Every task says which of them made it.

A draft is a JSON list of conditions in the family's own form. Authors are not
trusted: the family checks the form of a draft, and a solver whether it can be
met, whoever wrote it.
"""

import json
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from dsv32_jax.agents.types import Policy, PolicyError, Query
from dsv32_jax.chat import Message

Draft = list[dict[str, Any]]


class AuthorError(Exception):
  """An author that wrote no draft."""


@runtime_checkable
class Author(Protocol):
  """Writes the conditions of one task.

  Attributes:
    name: as `TaskRecord.made_by` has it.
  """

  @property
  def name(self) -> str: ...

  def propose(self) -> Draft:
    """A simple task.

    Raises:
      AuthorError: there is none.
    """
    ...

  def repair(self, draft: Draft, complaint: str) -> Draft:
    """A draft without what the complaint says.

    Raises:
      AuthorError: there is none.
    """
    ...

  def harden(self, draft: Draft, level: int) -> Draft:
    """A harder one: the draft and more; levels count from 1.

    Raises:
      AuthorError: there is none.
    """
    ...


class ModelAuthor:
  """An author that asks a policy.

  Args:
    policy: who replies.
    name: of the model.
    brief: what the environment holds, and the form of conditions.
    examples: conditions in that form.
    seed: of the replies.
  """

  def __init__(
    self,
    policy: Policy,
    *,
    name: str,
    brief: str,
    examples: Sequence[dict[str, Any]],
    seed: int,
  ):
    self._policy = policy
    self._name = name
    self._brief = (
      f'{brief}\nConditions are a JSON list, for example:\n'
      f'{json.dumps(list(examples))}\nReply with such a list only.'
    )
    self._seed = seed
    self._asked = 0

  @property
  def name(self) -> str:
    return f'model:{self._name}'

  def propose(self) -> Draft:
    return self._ask('Write two simple conditions for a new task.')

  def repair(self, draft: Draft, complaint: str) -> Draft:
    return self._ask(
      f'These conditions do not work: {complaint}\n{json.dumps(draft)}\n'
      'Write the list again, mended.'
    )

  def harden(self, draft: Draft, level: int) -> Draft:
    return self._ask(
      f'Conditions so far:\n{json.dumps(draft)}\nWrite the list again with one '
      f'more condition that makes the task harder (level {level}).'
    )

  def _ask(self, what: str) -> Draft:
    self._asked += 1
    query = Query(
      messages=(Message(role='user', content=f'{self._brief}\n\n{what}'),),
      seed=self._seed + self._asked,
    )
    try:
      reply = self._policy.reply(query)
    except PolicyError as error:
      raise AuthorError(f'policy: {error}') from error
    content = reply.message.content if reply.message else ''
    begin, end = content.find('['), content.rfind(']')
    try:
      draft = json.loads(content[begin : end + 1])
    except (ValueError, RecursionError):
      raise AuthorError('reply: no JSON list of conditions') from None
    if not isinstance(draft, list) or not all(
      isinstance(one, dict) for one in draft
    ):
      raise AuthorError('reply: a list of something else than conditions')
    return draft
