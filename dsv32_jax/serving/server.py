"""The process: a socket, uvicorn, and an orderly end."""

import asyncio
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from dsv32_jax.serving.app import make_app
from dsv32_jax.serving.service import Service

# What is left of a connection after its last answer: nothing to wait for.
_CLOSE_SECONDS = 2


def bind(host: str, port: int) -> socket.socket:
  """A socket at an address; port 0 takes any that is free.

  Clients are turned away until it is served.

  Raises:
    ValueError: the address can't be had.
  """
  family = socket.AF_INET6 if ':' in host else socket.AF_INET
  # With the protocol said, asyncio sends every piece at once (TCP_NODELAY);
  # else each answer would wait 40 ms for the client's acknowledgement.
  listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
  listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    listener.bind((host, port))
  except (OSError, OverflowError) as error:
    listener.close()
    raise ValueError(f'port: got {host}:{port}: {error}') from None
  return listener


def address(listener: socket.socket) -> str:
  """The URL of a listening socket."""
  host, port = listener.getsockname()[:2]
  return f'http://[{host}]:{port}' if ':' in host else f'http://{host}:{port}'


def serve(
  service: Service,
  listener: socket.socket,
  *,
  on_ready: Callable[[], None] | None = None,
) -> None:
  """Serves until SIGTERM or SIGINT, and returns after an orderly end.

  From the signal on, new work is answered with 503 and /health says so; what
  runs may go on for `shutdown_seconds` and is cancelled then. A second signal
  cancels at once.

  Args:
    service: what is served.
    listener: of `bind`.
    on_ready: called when requests are taken.
  """
  server = Server(service, on_ready=on_ready)
  asyncio.run(server.serve(sockets=[listener]))


class Server(uvicorn.Server):
  """uvicorn's server with the end described at `serve`."""

  def __init__(
    self,
    service: Service,
    *,
    on_ready: Callable[[], None] | None = None,
    **options: Any,
  ):
    self._service = service
    self._on_ready = on_ready
    self._loop: asyncio.AbstractEventLoop | None = None
    self._ending: asyncio.Task | None = None
    super().__init__(
      uvicorn.Config(
        make_app(service),
        http='h11',
        loop='asyncio',
        lifespan='off',
        log_level='warning',
        access_log=False,
        timeout_graceful_shutdown=_CLOSE_SECONDS,
        server_header=False,
        **options,
      )
    )

  async def startup(self, sockets: list[socket.socket] | None = None) -> None:
    self._loop = asyncio.get_running_loop()
    await super().startup(sockets)
    if self._on_ready is not None:
      self._on_ready()

  def handle_exit(self, sig: int, frame: FrameType | None) -> None:
    """On a signal; Python runs it between two steps of the main thread."""
    del sig, frame
    if self._loop is not None:
      self._loop.call_soon_threadsafe(self.begin_end)

  def begin_end(self) -> None:
    """Drains; when called again, ends at once."""
    if self._ending is None:
      self._service.begin_drain()
      self._ending = asyncio.ensure_future(self._drain())
    else:
      self._service.cancel_all()
      self.should_exit = True

  async def _drain(self) -> None:
    loop = asyncio.get_running_loop()
    until = loop.time() + self._service.settings.shutdown_seconds
    while self._service.num_generating and loop.time() < until:
      await asyncio.sleep(0.02)
    self._service.cancel_all()
    self.should_exit = True
