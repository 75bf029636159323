import http.server
import json
import threading

import pytest

from dsv32_jax.chat import Message
from dsv32_jax.rl.speciale.endpoint import EndpointPolicy, read_reply
from dsv32_jax.rl.speciale.policy import Prompt


class Server:
  """An endpoint that answers by a function of the body and of how often it was
  asked the same."""

  def __init__(self, answer):
    self.bodies, self.headers = [], []
    counts, lock, outer = {}, threading.Lock(), self

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        with lock:
          outer.bodies.append(body)
          outer.headers.append((self.path, dict(self.headers)))
          text = body['messages'][-1]['content']
          counts[text] = counts.get(text, 0) + 1
          status, reply = answer(text, counts[text])
        data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        self.wfile.write(data)

      def log_message(self, *_):
        pass

    self._server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    self.url = f'http://127.0.0.1:{self._server.server_port}/v1/'
    self._thread = threading.Thread(target=self._server.serve_forever)

  def __enter__(self):
    self._thread.start()
    return self

  def __exit__(self, *_):
    self._server.shutdown()
    self._thread.join()
    self._server.server_close()


def completion(content, **more):
  return {
    'choices': [
      {
        'message': {'content': content, 'reasoning_content': 'think'},
        'finish_reason': more.pop('finish_reason', 'stop'),
      }
    ],
    'usage': {'completion_tokens': 20, **more},
  }


def prompts(*texts):
  return [
    Prompt(messages=(Message(role='user', content=text),), seed=7)
    for text in texts
  ]


def test_endpoint_answers_in_order_and_a_lost_prompt_costs_itself():
  def answer(text, count):
    if text == 'busy':
      return (429, b'') if count < 3 else (200, completion('late'))
    if text == 'refused':
      return 400, b'no'
    if text == 'nonsense':
      return 200, {'choices': []}
    if text == 'html':
      return 200, b'<html>'
    return 200, completion(f'reply to {text}')

  with Server(answer) as server:
    policy = EndpointPolicy(
      server.url, 'm', api_key='k', attempts=3, pause_s=0.001, parallel=3
    )
    texts = ('a', 'busy', 'refused', 'nonsense', 'html', 'b')
    replies = policy(prompts(*texts))
  assert [reply.content for reply in replies] == [
    'reply to a', 'late', '', '', '', 'reply to b',
  ]  # fmt: skip
  assert [reply.error is None for reply in replies] == [
    True, True, False, False, False, True,
  ]  # fmt: skip
  assert replies[2].error.startswith('400')
  assert not replies[2].is_finished
  assert replies[0].reasoning == 'think'
  asked = [body['messages'][-1]['content'] for body in server.bodies]
  assert asked.count('refused') == 1
  assert asked.count('busy') == 3
  path, headers = server.headers[0]
  assert path == '/v1/chat/completions'
  assert headers['Authorization'] == 'Bearer k'
  assert server.bodies[0]['seed'] == 7


def test_endpoint_that_is_not_there_costs_replies_and_not_the_run():
  with Server(lambda text, count: (200, completion(''))) as server:
    url = server.url
  policy = EndpointPolicy(url, 'm', attempts=2, pause_s=0.001, timeout_s=1.0)
  reply = policy(prompts('a'))[0]
  assert 'refused' in reply.error
  assert not reply.is_finished


def test_reply_counts_reasoning_as_told_or_by_characters():
  told = completion(
    '0123456789', completion_tokens_details={'reasoning_tokens': 9}
  )
  assert read_reply(told).num_reasoning_tokens == 9
  # 'think' is a third of the characters.
  assert read_reply(completion('0123456789')).num_reasoning_tokens == 7
  cut = read_reply(completion('x', finish_reason='length'))
  assert not cut.is_finished


def test_endpoint_with_a_wrong_address_is_refused():
  with pytest.raises(ValueError, match="base_url: got 'localhost'"):
    EndpointPolicy('localhost', 'm')
  with pytest.raises(ValueError, match='attempts: got 0'):
    EndpointPolicy('http://x', 'm', attempts=0)
