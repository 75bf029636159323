"""Whatever is sent, the answer is an error that clients can read."""

import contextlib
import json
import socket

from tests.support import malformed


def test_malformed_bodies_are_all_refused_in_the_apis_shape(server, client):
  """Bar 6: 500 of them, over connections that stay open."""
  before = server.stats()
  with contextlib.closing(server.connect(timeout=10)) as connection:
    for path, body in malformed.bodies(500, seed=1):
      connection.request(
        'POST', path, body, {'content-type': 'application/json'}
      )
      answer = connection.getresponse()
      content = answer.read()
      shown = (path, body[:300], answer.status, content[:300])
      assert 400 <= answer.status < 500, shown
      ((key, error),) = json.loads(content).items()
      assert key == 'error', shown
      assert set(error) == {'message', 'type', 'param', 'code'}, shown
      assert error['type'] == 'invalid_request_error', shown
      assert error['message'], shown
      assert len(error['message'].splitlines()) == 1, shown
  # None of them reached the engine, and it serves on.
  assert server.stats() == before
  reply = client.chat.completions.create(
    model='scripted', messages=[{'role': 'user', 'content': 'x'}], temperature=0
  )
  assert reply.choices[0].message.content.startswith('Hello')


def test_bytes_that_are_not_http_leave_the_server_well(server, client):
  host, port = server.url.removeprefix('http://').split(':')
  for data in (
    b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03' + bytes(range(256)),
    b'POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n',
    b'POST /v1/completions HTTP/1.1\r\nHost: x\r\n' + b'A: ' + b'b' * 100_000,
    b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{',
  ):
    with socket.create_connection((host, int(port)), timeout=5) as raw:
      raw.sendall(data)
      raw.shutdown(socket.SHUT_WR)
      with contextlib.suppress(ConnectionError):
        while raw.recv(4096):
          pass
  assert client.models.list().data[0].id == 'scripted'
