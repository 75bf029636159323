"""A server in this process, and clients of it."""

import asyncio
import contextlib
import dataclasses
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai

from dsv32_jax import inference, serving
from dsv32_jax.serving.loading import Loaded
from dsv32_jax.serving.server import Server, address, bind

# Four programs: every request fits one page, prompts run in pieces of one
# width, and with or without the likeliest tokens.
ENGINE = inference.EngineConfig(
  max_batch=4,
  max_waiting=64,
  page_size=4096,
  max_tokens=4096,
  prefill_chunk=16,
  decode_steps=1,
)


@dataclasses.dataclass
class Running:
  """A server that runs.

  Attributes:
    url: without the path.
    service: its inside.
    server: its process's part.
  """

  url: str
  service: serving.Service
  server: Server

  def client(self, **options: Any) -> openai.OpenAI:
    """A client that doesn't try again."""
    defaults = {'api_key': 'any', 'max_retries': 0, 'timeout': 60.0}
    return openai.OpenAI(base_url=f'{self.url}/v1', **defaults | options)

  def stats(self) -> inference.EngineStats:
    return self.service.running.engine.stats()

  def connect(self, timeout: float = 60) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(
      self.url.removeprefix('http://'), timeout=timeout
    )

  def ask(
    self, method: str, path: str, body: Any = None, **headers: str
  ) -> tuple[int, dict[str, str], bytes]:
    """One request over a connection of its own: status, headers, body."""
    with contextlib.closing(self.connect()) as connection:
      data = body if isinstance(body, bytes | None) else json.dumps(body)
      connection.request(method, path, data, headers)
      answer = connection.getresponse()
      found = {name.lower(): value for name, value in answer.getheaders()}
      return answer.status, found, answer.read()


@contextlib.contextmanager
def running(
  loaded: Loaded,
  config: inference.EngineConfig = ENGINE,
  **settings: Any,
) -> Iterator[Running]:
  """Serves on a free port until the end of the block."""
  engine = inference.Engine(
    loaded.model, loaded.variables, config, tokenizer=loaded.tokenizer
  )
  with inference.EngineThread(engine) as engine_thread:
    service = serving.Service(
      engine_thread,
      loaded.tokenizer,
      serving.Settings(**{'model': 'scripted', **settings}),
    )
    server, listener = Server(service), bind('127.0.0.1', 0)
    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
      loops.append(asyncio.get_running_loop())
      await server.serve(sockets=[listener])

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    wait_for(lambda: server.started)
    try:
      yield Running(address(listener), service, server)
    finally:
      if thread.is_alive():
        loops[0].call_soon_threadsafe(service.cancel_all)
        loops[0].call_soon_threadsafe(server.begin_end)
      thread.join(30)
      assert not thread.is_alive(), 'the server does not end'


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
  """Polls until it holds."""
  until = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < until, f'not in {seconds} s'
    time.sleep(0.01)
