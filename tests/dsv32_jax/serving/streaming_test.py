"""Clients that leave, and many at a time."""

import contextlib
import socket
import threading

import pytest

from tests.support import scripted_model, serving

TICK = scripted_model.ids(scripted_model.ENDLESS)[:1]
ENDLESS = {'model': 'scripted', 'prompt': TICK, 'max_tokens': 4000}


def _is_idle(server):
  stats = server.stats()
  return stats.running == stats.waiting == server.service.num_generating == 0


def test_client_that_leaves_a_stream_frees_its_pages(server, client):
  cancelled = server.stats().finished.get('cancelled', 0)
  stream = client.completions.create(**ENDLESS, n=3, stream=True)
  for _, chunk in zip(range(6), stream, strict=False):
    assert chunk.choices[0].text in scripted_model.ENDLESS
  assert server.stats().free_pages == 1
  begun = server.stats().new_tokens
  stream.close()
  serving.wait_for(lambda: _is_idle(server), seconds=5)
  stats = server.stats()
  assert stats.free_pages == stats.total_pages == 4
  assert stats.finished['cancelled'] == cancelled + 3
  # Long before they would have ended.
  assert stats.new_tokens - begun < 3 * 3000


@pytest.mark.parametrize('stream', [True, False])
def test_client_that_is_cut_off_while_it_waits_frees_its_place(server, stream):
  """In the queue and without an answer so far; the connection just breaks."""
  with contextlib.closing(server.connect()) as first:
    body = serving.json.dumps(ENDLESS | {'n': 4})
    first.request('POST', '/v1/completions', body)
    serving.wait_for(lambda: server.stats().running == 4)
    second = server.connect()
    body = serving.json.dumps(ENDLESS | {'stream': stream})
    second.request('POST', '/v1/completions', body)
    serving.wait_for(lambda: server.stats().waiting == 1)
    second.sock.shutdown(socket.SHUT_RDWR)
    second.close()
    serving.wait_for(lambda: server.stats().waiting == 0, seconds=5)
    assert server.stats().running == 4
  serving.wait_for(lambda: _is_idle(server), seconds=5)
  assert server.stats().free_pages == 4
  *_, content = server.ask('GET', '/metrics')
  left = 'dsv32_requests_total{path="/v1/completions",status="499"}'
  assert left in content.decode()


def test_requests_at_the_same_time_do_not_mix(server):
  """More than run together, each with a reply of its own."""
  answers = {}

  def ask(number):
    with server.client() as client:
      stream = client.completions.create(
        model='scripted',
        prompt=scripted_model.ids(scripted_model.ENDLESS)[number % 2 :][:1],
        max_tokens=5 + number,
        temperature=0,
        stream=True,
      )
      answers[number] = ''.join(chunk.choices[0].text for chunk in stream)

  threads = [threading.Thread(target=ask, args=(n,)) for n in range(12)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)
  for number in range(12):
    first, second = scripted_model.ENDLESS[:: -1 if number % 2 == 0 else 1]
    words = [first, second] * 20
    assert answers[number] == ''.join(words[: 5 + number])
