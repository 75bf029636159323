"""The application: routes, keys, limits, errors, counts."""

import asyncio
import hmac
import time
from typing import Any

import prometheus_client
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsv32_jax.serving import errors, protocol, streaming
from dsv32_jax.serving.chat_completions import ChatReply
from dsv32_jax.serving.replies import Envelope, Reply
from dsv32_jax.serving.service import Service
from dsv32_jax.serving.text_completions import TextReply

_PATHS = (
  '/v1/chat/completions',
  '/v1/completions',
  '/v1/models',
  '/health',
  '/metrics',
)
# A body that is too large is read to its end, so that the client gets to read
# the answer, unless it is larger than this many times the limit.
_DRAIN = 8
_CLIENT_LEFT = 499


def make_app(service: Service) -> ASGIApp:
  """The ASGI application of a service; the engine's thread runs already."""
  handlers = _Handlers(service)
  app = Starlette(
    routes=[
      Route('/v1/chat/completions', handlers.chat, methods=['POST']),
      Route('/v1/completions', handlers.complete, methods=['POST']),
      Route('/v1/models', handlers.models),
      Route('/v1/models/{name:path}', handlers.model),
      Route('/health', handlers.health),
      Route('/metrics', handlers.metrics),
    ],
    exception_handlers={
      errors.ApiError: _on_api_error,
      HTTPException: _on_http_error,
      Exception: _on_error,
    },
  )
  app.router.redirect_slashes = False
  return _Counted(_Keyed(app, service.settings.api_key), service)


class _Handlers:
  def __init__(self, service: Service):
    self._service = service

  async def chat(self, request: Request) -> Any:
    return await self._answer(request, protocol.ChatRequest, ChatReply)

  async def complete(self, request: Request) -> Any:
    return await self._answer(request, protocol.CompletionRequest, TextReply)

  async def _answer(self, request: Request, kind: Any, make_reply: Any) -> Any:
    service = self._service
    begin = time.perf_counter()
    if service.is_draining:
      raise errors.shutting_down()
    data = await _read(request, service.settings.max_body_bytes)

    def prepare() -> tuple[Any, Reply]:
      body = protocol.parse(kind, data)
      self._check_model(body.model)
      return body, make_reply(body, service)

    # A long prompt takes a while to encode: others are served meanwhile.
    body, reply = await asyncio.to_thread(prepare)
    generation = service.generate(reply.requests, begin=begin)
    envelope = Envelope(reply.prefix, service.settings.model)
    if body.stream:
      return streaming.EventStream(
        reply, generation, envelope, include_usage=body.include_usage
      )
    return streaming.WholeAnswer(reply, generation, envelope)

  async def models(self, request: Request) -> Response:
    del request
    return JSONResponse({'object': 'list', 'data': [self._model()]})

  async def model(self, request: Request) -> Response:
    self._check_model(request.path_params['name'])
    return JSONResponse(self._model())

  async def health(self, request: Request) -> Response:
    del request
    running = self._service.running
    if self._service.is_draining:
      return JSONResponse({'status': 'shutting down'}, 503)
    if not running.alive:
      return JSONResponse({'status': 'failed', 'error': running.error}, 503)
    return JSONResponse({'status': 'ok'})

  async def metrics(self, request: Request) -> Response:
    del request
    return Response(
      self._service.metrics.render(),
      media_type=prometheus_client.CONTENT_TYPE_LATEST,
    )

  def _model(self) -> dict[str, Any]:
    return {
      'id': self._service.settings.model,
      'object': 'model',
      'created': self._service.started,
      'owned_by': 'dsv32_jax',
      'max_model_len': self._service.max_tokens,
    }

  def _check_model(self, name: str) -> None:
    served = self._service.settings.model
    if name != served:
      raise errors.ApiError(
        404,
        f'model: got {name[:200]!r}, expected {served!r}',
        param='model',
        code='model_not_found',
      )


async def _read(request: Request, limit: int) -> bytes:
  """The body.

  Raises:
    ApiError: 413, if it is larger than the limit; 400, if it breaks off.
  """
  pieces, size = [], 0
  try:
    async for piece in request.stream():
      size += len(piece)
      if size <= limit:
        pieces.append(piece)
      elif size > limit * _DRAIN:
        break
  except ClientDisconnect:
    # Nobody reads the answer; it only ends the request.
    request.scope[streaming.LEFT] = True
    raise errors.invalid(None, 'the body: broke off') from None
  if size > limit:
    raise errors.ApiError(
      413,
      f'the body: got more than {limit} bytes, expected at most so many',
      code='request_too_large',
      headers={'Connection': 'close'},
    )
  return b''.join(pieces)


async def _on_api_error(request: Request, error: Any) -> Response:
  del request
  return error.response()


async def _on_http_error(request: Request, error: Any) -> Response:
  """Paths and methods that are not there."""
  code = {404: 'not_found', 405: 'method_not_allowed'}.get(error.status_code)
  return errors.ApiError(
    error.status_code,
    f'{request.method} {request.url.path[:200]}: {error.detail}',
    code=code,
    headers=error.headers,
  ).response()


async def _on_error(request: Request, error: Exception) -> Response:
  del request, error
  return errors.internal().response()


class _Keyed:
  """Refuses requests without the key, but for /health and /metrics."""

  def __init__(self, app: ASGIApp, key: str | None):
    self._app = app
    self._expected = None if key is None else f'Bearer {key}'.encode()

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if (
      self._expected is None
      or scope['type'] != 'http'
      or scope['path'] in ('/health', '/metrics')
    ):
      return await self._app(scope, receive, send)
    given = dict(scope['headers']).get(b'authorization', b'')
    # As long to compare whatever was given.
    if hmac.compare_digest(given, self._expected):
      return await self._app(scope, receive, send)
    error = errors.ApiError(
      401,
      'the Authorization header: expected Bearer and the key of this server',
      code='invalid_api_key',
      headers={'WWW-Authenticate': 'Bearer'},
    )
    return await error.response()(scope, receive, send)


class _Counted:
  """Counts and times answers."""

  def __init__(self, app: ASGIApp, service: Service):
    self._app = app
    self._metrics = service.metrics

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope['type'] != 'http':
      return await self._app(scope, receive, send)
    status = 500

    async def note(message: Message) -> None:
      nonlocal status
      if message['type'] == 'http.response.start':
        status = message['status']
      await send(message)

    begin = time.perf_counter()
    try:
      await self._app(scope, receive, note)
    finally:
      if scope.get(streaming.LEFT):
        status = _CLIENT_LEFT
      # A name of our own for all others: anybody can make up paths.
      path = scope['path'] if scope['path'] in _PATHS else 'other'
      self._metrics.requests.labels(path, str(status)).inc()
      seconds = time.perf_counter() - begin
      self._metrics.request_seconds.labels(path).observe(seconds)
