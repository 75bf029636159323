"""Answers on the wire: server-sent events, and clients that leave."""

import asyncio
import json
import traceback
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from dsv32_jax.serving import errors
from dsv32_jax.serving.replies import Envelope, Reply
from dsv32_jax.serving.service import Generation

_Result = TypeVar('_Result')
# Where the application finds that a client has left.
LEFT = 'dsv32_jax.client_left'


class ClientLeft(Exception):
  """Nobody waits for the answer any more."""


async def unless_left(
  scope: Scope, receive: Receive, work: Coroutine[Any, Any, _Result]
) -> _Result:
  """Does the work unless the client leaves meanwhile.

  Raises:
    ClientLeft: it has; the work is cancelled then.
  """
  doing = asyncio.ensure_future(work)
  leaving = asyncio.ensure_future(_left(receive))
  try:
    await asyncio.wait((doing, leaving), return_when=asyncio.FIRST_COMPLETED)
    if not doing.done():
      scope[LEFT] = True
      raise ClientLeft
    return doing.result()
  finally:
    for task in (doing, leaving):
      task.cancel()
    # Until it is over, what the work holds is not free.
    await asyncio.gather(doing, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
  while (await receive())['type'] != 'http.disconnect':
    pass


class WholeAnswer:
  """An answer in one piece, as an ASGI application."""

  def __init__(self, reply: Reply, generation: Generation, envelope: Envelope):
    self._reply = reply
    self._generation = generation
    self._envelope = envelope

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    try:
      response = await unless_left(scope, receive, self._collect())
    except ClientLeft:
      return
    except errors.ApiError as error:
      response = error.response()
    finally:
      self._generation.close()
    await response(scope, receive, send)

  async def _collect(self) -> Response:
    reply = self._reply
    async for reports in self._generation.reports():
      for index, progress in reports:
        reply.chunks(index, progress)
    choices = [reply.choice(index) for index in range(len(reply.requests))]
    body = self._envelope.wrap(
      reply.whole_object, choices, usage=reply.usage.body()
    )
    return JSONResponse(body)


class EventStream:
  """An answer in chunks, each an event, as an ASGI application."""

  def __init__(
    self,
    reply: Reply,
    generation: Generation,
    envelope: Envelope,
    *,
    include_usage: bool,
  ):
    self._reply = reply
    self._generation = generation
    self._envelope = envelope
    self._include_usage = include_usage

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    try:
      await unless_left(scope, receive, self._send(send))
    except (ClientLeft, OSError):
      # OSError: a server that says so when one sends.
      scope[LEFT] = True
    finally:
      self._generation.close()

  async def _send(self, send: Send) -> None:
    await send(
      {
        'type': 'http.response.start',
        'status': 200,
        'headers': [
          (b'content-type', b'text/event-stream; charset=utf-8'),
          (b'cache-control', b'no-cache'),
          # A proxy shall not wait for more.
          (b'x-accel-buffering', b'no'),
        ],
      }
    )
    async for events in self._events():
      await send(
        {'type': 'http.response.body', 'body': events, 'more_body': True}
      )
    await send({'type': 'http.response.body', 'body': b'', 'more_body': False})

  async def _events(self) -> AsyncIterator[bytes]:
    """Events; an error is the last one, as the status is sent already."""
    reply = self._reply
    more = {'usage': None} if self._include_usage else {}

    def event(choice: dict[str, Any]) -> bytes:
      return _event(self._envelope.wrap(reply.chunk_object, [choice], **more))

    try:
      for index in range(len(reply.requests)):
        if opening := reply.opening(index):
          yield b''.join(map(event, opening))
      async for reports in self._generation.reports():
        chunks = [
          event(choice)
          for index, progress in reports
          for choice in reply.chunks(index, progress)
        ]
        if chunks:
          yield b''.join(chunks)
    except errors.ApiError as error:
      yield _event(error.body())
      return
    except Exception:
      traceback.print_exc()
      yield _event(errors.internal().body())
      return
    if self._include_usage:
      usage = reply.usage.body()
      yield _event(self._envelope.wrap(reply.chunk_object, [], usage=usage))
    yield b'data: [DONE]\n\n'


def _event(body: Mapping[str, Any]) -> bytes:
  text = json.dumps(body, ensure_ascii=False, separators=(',', ':'))
  return f'data: {text}\n\n'.encode()
