"""A model behind an OpenAI-compatible endpoint as a policy."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from dsv32_jax import chat
from dsv32_jax.agents.policies.openai_http import ChatEndpoint, EndpointError
from dsv32_jax.agents.types import PolicyError, Query, Reply
from dsv32_jax.chat import ChatError, Message, Mode, ParseErrorCode

# How our server (docs/serving.md), vLLM and SGLang are told to think or not.
MODE_FIELDS: Mapping[Mode, Mapping[str, Any]] = {
  'thinking': {'chat_template_kwargs': {'thinking': True}},
  'chat': {'chat_template_kwargs': {'thinking': False}},
}
_FIELDS = ('content', 'reasoning_content', 'reasoning', 'tool_calls')


class EndpointPolicy:
  """Asks for each reply anew; the endpoint keeps nothing.

  It sees messages, not tokens: in a trajectory with tokens those of its replies
  are encoded, and no basis for training on what it sampled.
  """

  def __init__(
    self,
    endpoint: ChatEndpoint,
    model: str,
    *,
    temperature: int | float = 1.0,
    top_p: int | float = 0.95,
    mode_fields: Mapping[Mode, Mapping[str, Any]] = MODE_FIELDS,
    extra: Mapping[str, Any] | None = None,
  ):
    """Sends nothing yet.

    Args:
      endpoint: where.
      model: its name there.
      temperature: of the draws.
      top_p: of the draws.
      mode_fields: what a request has for each mode; empty where the endpoint
        takes no such field.
      extra: more fields of each request.
    """
    self._endpoint = endpoint
    self._body = {
      'model': model,
      'temperature': temperature,
      'top_p': top_p,
      **(extra or {}),
    }
    self._mode_fields = mode_fields

  def reply(self, query: Query) -> Reply:
    """See `Policy`."""
    body = {
      **self._body,
      **self._mode_fields.get(query.mode, {}),
      **_request(query.messages),
      'max_tokens': query.max_new_tokens,
      'seed': query.seed,
    }
    try:
      answer = self._endpoint.ask(body, within_s=query.timeout_s)
    except EndpointError as error:
      ending = 'wall' if error.is_late else 'policy_error'
      raise PolicyError(str(error), ending=ending) from None
    return _reply(answer)


def _request(messages: Sequence[Message]) -> dict[str, Any]:
  """A conversation as a request: tools and format stand beside the messages."""
  out, request = [], {}
  tools = [tool for message in messages for tool in message.tools]
  if tools:
    request['tools'] = [chat.tool_to_openai(tool) for tool in tools]
  for message in _with_ids(messages):
    if message.response_format is not None:
      request['response_format'] = message.response_format
    if message.role == 'developer':
      # V3.2's own kind of user message; elsewhere the name means 'system'.
      message = Message(role='user', content=message.content)
    elif message.role == 'system':
      message = Message(role='system', content=message.content)
      if not message.content:
        continue
    out.append(chat.message_to_openai(message))
  return request | {'messages': out}


def _with_ids(messages: Sequence[Message]) -> list[Message]:
  """The messages, with an id for each call and result that has none."""
  out: list[Message] = []
  waiting: list[str] = []
  for index, message in enumerate(messages):
    if message.tool_calls:
      calls = tuple(
        dataclasses.replace(call, id=call.id or f'call_{index}_{number}')
        for number, call in enumerate(message.tool_calls)
      )
      waiting = [call.id for call in calls]
      message = dataclasses.replace(message, tool_calls=calls)
    elif message.role == 'tool':
      if message.tool_call_id in waiting:
        waiting.remove(message.tool_call_id)
      elif waiting and not message.tool_call_id:
        message = dataclasses.replace(message, tool_call_id=waiting.pop(0))
    out.append(message)
  return out


def _reply(answer: Mapping[str, Any]) -> Reply:
  """The reply in an answer of `ChatEndpoint.ask`.

  Raises:
    PolicyError: it has none.
  """
  usage, finish = answer['usage'], answer['finish_reason']
  counted = usage.get('completion_tokens')
  num_tokens = counted if type(counted) is int and counted > 0 else 0
  raw = {key: answer['message'].get(key) for key in _FIELDS}
  text = raw['content'] if isinstance(raw['content'], str) else ''
  if finish == 'content_filter':
    raise PolicyError('the endpoint kept its reply back (content_filter)')
  message, error = None, ParseErrorCode.MISSING_EOS
  if finish != 'length':
    try:
      (message,) = chat.messages_from_openai([{'role': 'assistant', **raw}])
      error = None
    except ChatError as problem:
      # What the model wrote, not how the server packed it.
      if problem.field.endswith('.function.arguments'):
        error = ParseErrorCode.BAD_JSON
      elif problem.field.endswith('.name'):
        error = ParseErrorCode.BAD_NAME
      else:
        raise PolicyError(
          f'the endpoint answered no message: {problem}'
        ) from None
  if message is not None:
    ids = [call.id for call in message.tool_calls]
    if len(set(ids)) < len(ids):
      # Results go by order then.
      calls = tuple(
        dataclasses.replace(call, id='') for call in message.tool_calls
      )
      message = dataclasses.replace(message, tool_calls=calls)
  return Reply(
    message=message,
    text=text,
    error=error,
    num_tokens=num_tokens,
    was_cut=finish == 'length',
  )
