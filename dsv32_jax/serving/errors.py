"""Errors in the shape that clients of the OpenAI API read."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

INVALID, SERVER, RATE = (
  'invalid_request_error',
  'server_error',
  'rate_limit_error',
)


class ApiError(Exception):
  """An answer other than what was asked for.

  Attributes:
    status: of HTTP.
    message: one line.
    kind: the API's `type`.
    param: the field that is to blame, if one is.
    code: for programs to tell errors apart.
    headers: of the response.
  """

  def __init__(
    self,
    status: int,
    message: str,
    *,
    kind: str = INVALID,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
  ):
    super().__init__(message)
    self.status = status
    self.message = ' '.join(message.split())
    self.kind = kind
    self.param = param
    self.code = code
    self.headers = dict(headers or {})

  def body(self) -> dict[str, Any]:
    return {
      'error': {
        'message': self.message,
        'type': self.kind,
        'param': self.param,
        'code': self.code,
      }
    }

  def response(self) -> JSONResponse:
    return JSONResponse(self.body(), self.status, self.headers)


def invalid(
  param: str | None, message: str, *, code: str | None = None
) -> ApiError:
  """400: a request that can never be served."""
  return ApiError(400, message, param=param, code=code)


def queue_full(message: str) -> ApiError:
  """429: come again."""
  return ApiError(
    429,
    message,
    kind=RATE,
    code='queue_full',
    headers={'Retry-After': '1'},
  )


def shutting_down() -> ApiError:
  """503: no new work, and unfinished work is given up in the end."""
  return ApiError(
    503,
    'the server is shutting down',
    kind=SERVER,
    code='shutting_down',
    headers={'Retry-After': '5', 'Connection': 'close'},
  )


def internal(message: str = 'the server failed; its log says why') -> ApiError:
  """500: not the request's fault."""
  return ApiError(500, message, kind=SERVER, code='internal_error')
