"""Summaries that a policy writes."""

from collections.abc import Callable, Sequence

from dsv32_jax.agents.context.strategies import Summarise
from dsv32_jax.agents.types import Policy, PolicyError, Query
from dsv32_jax.chat import Message, Mode

_REQUEST = (
  'The context is nearly full and will be cleared. Write down, for yourself, '
  'what you need to go on: what was found and where, what was ruled out, what '
  'is left to do. Make no calls.'
)


def summarise_with(
  policy: Policy,
  *,
  mode: Mode = 'chat',
  tokens: Callable[[Sequence[Message]], Sequence[int]] | None = None,
  seed: int = 0,
) -> Summarise:
  """A summariser that asks a policy.

  Args:
    policy: writes.
    mode: of its reply.
    tokens: ids of a conversation, for a policy that reads ids.
    seed: of its draws.
  """

  def summarise(messages: Sequence[Message], max_tokens: int) -> str:
    asked = (*messages, Message(role='user', content=_REQUEST))
    reply = policy.reply(
      Query(
        messages=asked,
        mode=mode,
        tokens=tuple(tokens(asked)) if tokens else (),
        max_new_tokens=max_tokens,
        seed=seed,
      )
    )
    if reply.message is None:
      raise PolicyError(f'summary: the reply did not parse ({reply.error})')
    return reply.message.content

  return summarise
