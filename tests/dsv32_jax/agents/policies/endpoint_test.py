"""Against a real server on this machine, which answers what it is told to."""

import contextlib
import http.server
import json
import socket
import threading
import time

import pytest

from dsv32_jax.agents.loop import Budgets, run_episode
from dsv32_jax.agents.policies import EndpointPolicy
from dsv32_jax.agents.policies.openai_http import ChatEndpoint
from dsv32_jax.agents.types import PolicyError, Query
from dsv32_jax.chat import Message, ParseErrorCode, ToolCall, ToolSpec
from tests.support import agent_episodes

STOCK = ToolSpec(name='stock', parameters={'type': 'object'})
QUERY = Query(
  messages=(
    Message(role='system', tools=(STOCK,)),
    Message(role='user', content='Is A-7 in stock?'),
  ),
  max_new_tokens=99,
  seed=5,
)


def _completion(message, finish='stop', **more):
  choice = {'index': 0, 'message': message, 'finish_reason': finish}
  return json.dumps({'choices': [choice], **more}).encode()


def _said(content, **more):
  return _completion({'role': 'assistant', 'content': content} | more)


class Server:
  """Gives its answers in turn, the last for ever; keeps what it was sent.

  An answer is (status, body), or a function of the handler.
  """

  def __init__(self, *answers):
    self._answers = list(answers)
    self.requests = []
    outer = self

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_POST(self):
        body = self.rfile.read(int(self.headers['Content-Length']))
        outer.requests.append((self.path, self.headers, json.loads(body)))
        answers = outer._answers
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if callable(answer):
          answer(self)
          return
        status, body = answer
        self.send_response(status)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

      def log_message(self, *_):
        pass

    self._server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    self._server.handle_error = lambda *_: None
    self.url = f'http://127.0.0.1:{self._server.server_port}/v1'

  def policy(self, **options):
    options = {'attempts': 3, 'timeout_s': 20.0, 'pause_s': 0.01} | options
    return EndpointPolicy(ChatEndpoint(self.url, **options), 'm')

  def __enter__(self):
    self._thread = threading.Thread(
      target=self._server.serve_forever, args=(0.01,)
    )
    self._thread.start()
    return self

  def __exit__(self, *_):
    self._server.shutdown()
    self._server.server_close()
    self._thread.join()


def test_request_and_reply_are_as_the_api_has_them():
  call = {
    'id': 'c1',
    'type': 'function',
    'function': {'name': 'stock', 'arguments': '{"sku": "A-7"}'},
  }
  answer = _completion(
    {
      'role': 'assistant',
      'content': None,
      'reasoning_content': 'I look.',
      'tool_calls': [call],
      'provider_specific': {'x': 1},
    },
    'tool_calls',
    usage={'completion_tokens': 17},
  )
  with Server((200, answer)) as server:
    reply = server.policy(api_key='secret').reply(QUERY)
  ((path, headers, body),) = server.requests
  assert path == '/v1/chat/completions'
  assert headers['Authorization'] == 'Bearer secret'
  assert body == {
    'model': 'm',
    'temperature': 1.0,
    'top_p': 0.95,
    'max_tokens': 99,
    'seed': 5,
    'chat_template_kwargs': {'thinking': True},
    'tools': [
      {
        'type': 'function',
        'function': {'name': 'stock', 'parameters': {'type': 'object'}},
      }
    ],
    # The system message had tools only.
    'messages': [{'role': 'user', 'content': 'Is A-7 in stock?'}],
  }
  assert reply.message == Message(
    role='assistant',
    reasoning='I look.',
    tool_calls=(ToolCall(name='stock', arguments={'sku': 'A-7'}, id='c1'),),
  )
  assert (reply.num_tokens, reply.error, reply.was_cut) == (17, None, False)


def test_calls_and_results_without_ids_are_given_matching_ones():
  calls = (ToolCall(name='a'), ToolCall(name='b', id='own'), ToolCall(name='c'))
  query = Query(
    messages=(
      Message(role='developer', content='Go.', tools=(STOCK,)),
      Message(role='assistant', tool_calls=calls),
      Message(role='tool', content='1'),
      Message(role='tool', content='2', tool_call_id='own'),
      Message(role='tool', content='3'),
    ),
    mode='chat',
  )
  with Server((200, _said('Done.'))) as server:
    server.policy().reply(query)
  ((_, _, body),) = server.requests
  assert body['chat_template_kwargs'] == {'thinking': False}
  assert [one['role'] for one in body['messages']] == [
    'user',
    'assistant',
    *['tool'] * 3,
  ]
  asked = [call['id'] for call in body['messages'][1]['tool_calls']]
  answered = [one['tool_call_id'] for one in body['messages'][2:]]
  assert asked == answered == ['call_1_0', 'own', 'call_1_2']


@pytest.mark.parametrize(
  ('message', 'finish', 'error', 'was_cut'),
  [
    ({'content': 'I thi'}, 'length', ParseErrorCode.MISSING_EOS, True),
    (
      {'tool_calls': [{'function': {'name': 'f', 'arguments': '{"a": '}}]},
      'tool_calls',
      ParseErrorCode.BAD_JSON,
      False,
    ),
    (
      {'tool_calls': [{'function': {'name': 'a"b', 'arguments': '{}'}}]},
      'tool_calls',
      ParseErrorCode.BAD_NAME,
      False,
    ),
  ],
)
def test_what_the_model_got_wrong_is_its_reply(message, finish, error, was_cut):
  with Server((200, _completion(message, finish))) as server:
    reply = server.policy().reply(QUERY)
  assert (reply.message, reply.error, reply.was_cut) == (None, error, was_cut)
  assert len(server.requests) == 1


def test_calls_of_the_same_id_are_taken_by_order():
  call = {'id': 'x', 'function': {'name': 'f', 'arguments': ''}}
  with Server((200, _said(None, tool_calls=[call, call]))) as server:
    reply = server.policy().reply(QUERY)
  assert reply.message.tool_calls == (ToolCall(name='f'),) * 2


GOOD = (200, _said('Done.', reasoning_content='So.'))


def _hang_up(handler):
  handler.connection.shutdown(socket.SHUT_RDWR)


def _half(handler):
  handler.send_response(200)
  handler.send_header('Content-Length', '1000')
  handler.end_headers()
  handler.wfile.write(b'{"choices": [')
  handler.wfile.flush()
  handler.connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
  'fault',
  [
    (500, b'out of memory'),
    (429, b'{"error": {"message": "busy"}}'),
    (200, b'<html>a proxy</html>'),
    (200, b'[1]'),
    (200, b'{"choices": []}'),
    (200, b'\xff\xfe'),
    _hang_up,
    _half,
  ],
)
def test_fault_that_may_pass_is_tried_again_and_told_if_it_does_not(fault):
  with Server(fault, fault, GOOD) as server:
    assert server.policy().reply(QUERY).message.content == 'Done.'
  assert len(server.requests) == 3
  with Server(fault) as server:
    with pytest.raises(PolicyError, match='the endpoint') as error:
      server.policy().reply(QUERY)
  assert len(server.requests) == 3
  assert error.value.ending == 'policy_error'
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('answer', 'problem'),
  [
    ((400, b'max_tokens\nis too high'), r'400 Bad Request: max_tokens\\nis'),
    ((401, b''), '401 Unauthorized'),
    ((200, _completion({'content': 3})), 'content: got a number, expected'),
    ((200, _completion({'content': ''}, 'content_filter')), 'kept its reply'),
  ],
)
def test_fault_that_stays_is_told_at_once(answer, problem):
  with Server(answer) as server:
    with pytest.raises(PolicyError, match=problem):
      server.policy().reply(QUERY)
  assert len(server.requests) == 1


def test_endpoint_that_is_gone_ends_the_episode_with_its_address():
  with contextlib.closing(socket.socket()) as taken:
    taken.bind(('127.0.0.1', 0))
    url = f'http://127.0.0.1:{taken.getsockname()[1]}/v1'
    policy = EndpointPolicy(ChatEndpoint(url, attempts=2, pause_s=0.0), 'm')
    found = run_episode(policy, agent_episodes.GeneratedEnvironment(0))
  assert (found.ending, found.score.reward) == ('policy_error', 0.0)
  assert found.error.startswith(f'{url}/chat/completions: the endpoint failed')
  assert 'Connection refused' in found.error


def _drip(handler):
  """Never silent for long, and never done."""
  handler.send_response(200)
  handler.end_headers()
  with contextlib.suppress(OSError):
    for _ in range(200):
      handler.wfile.write(b' ')
      handler.wfile.flush()
      time.sleep(0.02)


@pytest.mark.parametrize('answer', [_drip, lambda _: time.sleep(1.0)])
def test_endpoint_that_takes_too_long_is_given_up(answer):
  with Server(answer) as server:
    began = time.monotonic()
    with pytest.raises(PolicyError, match='TimeoutError') as error:
      server.policy(attempts=1, timeout_s=0.2).reply(QUERY)
    assert time.monotonic() - began < 0.9
    assert error.value.ending == 'policy_error'
    # The same when it is the episode's own time: that is no fault of it.
    found = run_episode(
      server.policy(),
      agent_episodes.GeneratedEnvironment(0),
      budgets=Budgets(wall_s=0.2),
    )
  assert found.ending == 'wall'


def test_episode_through_the_endpoint_calls_tools_until_the_answer():
  calls = [
    {
      'id': f'c{index}',
      'type': 'function',
      'function': {'name': name, 'arguments': arguments},
    }
    for index, (name, arguments) in enumerate(
      [('keep', '{"key": "a"}'), ('nothing', '{}'), ('count', '')]
    )
  ]
  with Server((200, _said(None, tool_calls=calls)), GOOD) as server:
    found = run_episode(
      server.policy(),
      agent_episodes.GeneratedEnvironment(1),
      tokenizer=agent_episodes.PairTokenizer(),
    )
  assert found.ending == 'answered'
  assert [one.tool_call_id for one in found.steps[0].results] == [
    'c0',
    'c1',
    'c2',
  ]
  assert found.tokens
  sent = server.requests[1][2]['messages']
  assert [one['role'] for one in sent[-4:]] == ['assistant', *['tool'] * 3]


@pytest.mark.parametrize(
  ('options', 'problem'),
  [
    ({'base_url': 'localhost:8000'}, 'base_url: got'),
    ({'attempts': 0}, 'attempts: got 0, expected at least 1'),
    ({'timeout_s': 0}, 'timeout_s: got 0, expected more than 0'),
  ],
)
def test_options_that_cannot_be_used_are_refused(options, problem):
  with pytest.raises(ValueError, match=problem):
    ChatEndpoint(**{'base_url': 'http://localhost'} | options)
