"""POST /v1/chat/completions: messages to a prompt, text back to a message."""

import uuid
from typing import Any

from dsv32_jax import chat
from dsv32_jax.inference.requests import Progress, Request
from dsv32_jax.serving import errors, replies
from dsv32_jax.serving.protocol import ChatRequest
from dsv32_jax.serving.service import Service


class ChatReply:
  """The answer to one chat request; see `replies.Reply`.

  Raises:
    ApiError: 400, for messages, tools or formats that cannot be used and for a
      prompt that is too long.
  """

  chunk_object = 'chat.completion.chunk'
  whole_object = 'chat.completion'
  prefix = 'chatcmpl'

  def __init__(self, body: ChatRequest, service: Service):
    self._tokenizer = service.tokenizer
    self._mode: chat.Mode = 'thinking' if body.is_thinking() else 'chat'
    self._wants_logprobs = bool(body.logprobs)
    try:
      prompt = self._read(body, service)
    except chat.ChatError as error:
      raise errors.invalid(error.field or 'messages', str(error)) from None
    asked = body.max_completion_tokens or body.max_tokens
    new = service.room(prompt, asked, field='messages')
    self.requests = [
      Request(
        prompt=tuple(prompt),
        max_new_tokens=new,
        sampling=body.sampling(),
        seed=seed,
        stop_ids=(service.tokenizer.eos_id,),
        stop_strings=body.stops,
        top_logprobs=body.top_logprobs or 0,
      )
      for seed in body.seeds()
    ]
    self.usage = replies.Usage(len(prompt))
    self._choices = [
      _Choice(
        chat.CompletionParser(
          self._mode,
          tools=self._tools or None,
          response_format=self._format,
          recover=True,
        ),
        uses_calls=self._uses_calls,
      )
      for _ in self.requests
    ]

  def _read(self, body: ChatRequest, service: Service) -> list[int]:
    """Takes over the tools and the format, and renders the prompt."""
    self._uses_calls = body.uses_tools()
    tools = chat.tools_from_openai(body.tools)
    self._tools = tools if self._uses_calls else ()
    chat.check_response_format(body.response_format)
    # Plain text is what there is without a format.
    is_text = (body.response_format or {}).get('type') == 'text'
    self._format = None if is_text else body.response_format
    messages = chat.messages_from_openai(body.messages)
    # Before another message is put in front: errors say the client's index.
    chat.check_ready(messages, mode=self._mode)
    messages = chat.with_request(
      messages, tools=self._tools, response_format=self._format
    )
    return chat.encode(
      messages,
      service.tokenizer,
      mode=self._mode,
      controls=service.controls,
    )

  def opening(self, index: int) -> list[dict[str, Any]]:
    delta = {'role': 'assistant', 'content': ''}
    return [_chunk(index, delta, None)]

  def chunks(self, index: int, progress: Progress) -> list[dict[str, Any]]:
    self.usage.completion_tokens += len(progress.tokens)
    progress, is_end = replies.without_end(
      progress, self.requests[index], self._tokenizer
    )
    choice = self._choices[index]
    deltas = choice.feed(progress.text + (chat.EOS if is_end else ''))
    logprobs = None
    if self._wants_logprobs and progress.tokens:
      entries = self._logprobs(progress)
      choice.logprobs += entries
      logprobs = {'content': entries, 'refusal': None}
    if progress.finish_reason is not None:
      deltas += choice.finish(progress.finish_reason, is_whole=is_end)
    if logprobs and not deltas:
      deltas = [{}]
    out = [_chunk(index, delta, None) for delta in deltas]
    if logprobs:
      out[0]['logprobs'] = logprobs
    if choice.finish_reason is not None:
      last = _chunk(index, {}, choice.finish_reason)
      if choice.warnings:
        last['warnings'] = choice.warnings
      out.append(last)
    return out

  def choice(self, index: int) -> dict[str, Any]:
    choice = self._choices[index]
    logprobs = None
    if self._wants_logprobs:
      logprobs = {'content': choice.logprobs, 'refusal': None}
    whole: dict[str, Any] = {
      'index': index,
      'message': choice.message(),
      'logprobs': logprobs,
      'finish_reason': choice.finish_reason,
    }
    if choice.warnings:
      whole['warnings'] = choice.warnings
    return whole

  def _logprobs(self, progress: Progress) -> list[dict[str, Any]]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
      text, data = replies.token_text(self._tokenizer, token)
      return {'token': text, 'logprob': replies.finite(logprob), 'bytes': data}

    top = progress.top_logprobs or ((),) * len(progress.tokens)
    return [
      {
        **entry(token, logprob),
        'top_logprobs': [entry(*other) for other in others],
      }
      for token, logprob, others in zip(
        progress.tokens, progress.logprobs, top, strict=True
      )
    ]


class _Choice:
  """One message that is being written.

  Attributes:
    finish_reason: as the API has it, when it has ended.
    logprobs: entries so far.
    warnings: what was wrong with what the model wrote.
  """

  def __init__(self, parser: chat.CompletionParser, *, uses_calls: bool):
    self._parser = parser
    self._uses_calls = uses_calls
    self._ids: list[str] = []
    self._text = {'reasoning_content': '', 'content': ''}
    self._calls: list[dict[str, Any]] = []
    self._num_finished = 0
    self.finish_reason: str | None = None
    self.logprobs: list[dict[str, Any]] = []
    self.warnings: list[str] = []

  def feed(self, text: str) -> list[dict[str, Any]]:
    return self._deltas(self._parser.feed(text) if text else [])

  def finish(self, reason: str, *, is_whole: bool) -> list[dict[str, Any]]:
    deltas = self._deltas(self._parser.finish())
    # Of one that was cut off, whatever is missing may have been to come.
    if is_whole:
      self.warnings = [str(failure) for failure in self._parser.failures]
    self.finish_reason = reason
    if self._num_finished and reason == 'stop':
      self.finish_reason = 'tool_calls'
    return deltas

  def message(self) -> dict[str, Any]:
    content = self._text['content']
    # The last one may have been cut off.
    calls = self._calls[: self._num_finished]
    message: dict[str, Any] = {
      'role': 'assistant',
      'content': content if content or not calls else None,
      'refusal': None,
    }
    if self._text['reasoning_content']:
      message['reasoning_content'] = self._text['reasoning_content']
    if calls:
      message['tool_calls'] = calls
    return message

  def _deltas(self, events: Any) -> list[dict[str, Any]]:
    """Streamed pieces of the message, which are kept as well."""
    out: list[dict[str, Any]] = []
    for event in events:
      match event:
        case chat.ReasoningDelta():
          self._text['reasoning_content'] += event.text
          out.append({'reasoning_content': event.text})
        case chat.ContentDelta():
          self._text['content'] += event.text
          out.append({'content': event.text})
        case chat.CallStarted() if self._uses_calls:
          call = {
            'id': f'call_{uuid.uuid4().hex}',
            'type': 'function',
            'function': {'name': event.name, 'arguments': ''},
          }
          self._calls.append(call)
          streamed = {**call, 'function': dict(call['function'])}
          out.append({'tool_calls': [{'index': event.index, **streamed}]})
        case chat.ArgumentsDelta() if self._uses_calls:
          function = self._calls[event.index]['function']
          function['arguments'] += event.text
          piece = {'index': event.index, 'function': {'arguments': event.text}}
          out.append({'tool_calls': [piece]})
        case chat.CallFinished() if self._uses_calls:
          self._num_finished += 1
    return out


def _chunk(
  index: int, delta: dict[str, Any], finish_reason: str | None
) -> dict[str, Any]:
  return {
    'index': index,
    'delta': delta,
    'logprobs': None,
    'finish_reason': finish_reason,
  }
