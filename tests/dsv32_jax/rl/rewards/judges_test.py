import http.server
import json
import re
import threading
import time

import pytest

from dsv32_jax.chat import Message
from dsv32_jax.config.rewards import JudgeConfig
from dsv32_jax.rl.problems import Criterion, Problem
from dsv32_jax.rl.rewards import judges
from dsv32_jax.rl.rewards.types import Job

PROBLEM = Problem(
  id='p',
  domain='writing',
  mode='chat',
  messages=(Message(role='user', content='Write about the sea.'),),
  scorer='rubric',
  rubric=(
    Criterion(
      text='Uses the word salt.',
      weight=3.0,
      kind='contains',
      arguments={'words': ['salt']},
    ),
    Criterion(
      text='Has at most 4 words.',
      kind='length',
      arguments={'unit': 'words', 'most': 4},
    ),
  ),
)


class Grader(http.server.BaseHTTPRequestHandler):
  """Reads the question as it is put, and grades as its server is told to."""

  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
    with self.server.lock:
      self.server.asked.append((self.path, dict(self.headers), body))
      number = len(self.server.asked) - 1
    question = body['messages'][-1]['content']
    reply = re.search(r'<<<REPLY\n(.*)\nREPLY>>>', question, re.DOTALL)[1]
    try:
      answer = self.server.grade(reply, body, number)
    except RuntimeError:
      self.send_error(500)
      return
    data = json.dumps(
      {'choices': [{'message': {'role': 'assistant', 'content': answer}}]}
    ).encode()
    self.send_response(200)
    self.send_header('Content-Type', 'application/json')
    self.end_headers()
    self.wfile.write(data)

  def log_message(self, *_):
    pass


@pytest.fixture
def server():
  made = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Grader)
  made.asked, made.lock = [], threading.Lock()
  made.grade = lambda reply, body, number: json.dumps(
    {'scores': [float('salt' in reply), float(len(reply.split()) <= 4)]}
  )
  made.daemon_threads = True
  thread = threading.Thread(target=made.serve_forever, args=(0.01,))
  thread.start()
  yield made
  made.shutdown()
  thread.join()
  made.server_close()


def endpoint(server, **options):
  return judges.make_judge(
    JudgeConfig(
      kind='openai',
      base_url=f'http://127.0.0.1:{server.server_port}/v1',
      model='grader',
      **{'timeout_s': 5.0, **options},
    )
  )


def marks(judge, *replies, parallel=1):
  jobs = [Job(PROBLEM, Message(role='assistant', content=r)) for r in replies]
  return judges.marks(jobs, judge, parallel=parallel)


def test_both_judges_give_the_same_marks(server):
  replies = ['salt', 'salt a b c d', 'a b', 'a b c d e']
  expected = [1.0, 0.75, 0.25, 0.0]
  for judge in (judges.make_judge(JudgeConfig()), endpoint(server)):
    assert [mark.score for mark in marks(judge, *replies)] == expected


def test_endpoint_is_asked_in_the_openai_form(server, monkeypatch):
  monkeypatch.setenv('JUDGE_KEY', 'k-1')
  judge = endpoint(server, api_key_variable='JUDGE_KEY', max_tokens=77)
  marks(judge, 'salt')
  ((path, headers, body),) = server.asked
  assert path == '/v1/chat/completions'
  assert headers['Authorization'] == 'Bearer k-1'
  assert (body['model'], body['max_tokens'], body['temperature']) == (
    'grader',
    77,
    0.0,
  )
  question = body['messages'][-1]['content']
  assert 'Write about the sea.' in question
  assert '1. Uses the word salt.\n2. Has at most 4 words.' in question


def test_several_samples_are_averaged_with_seeds_of_their_own(server):
  server.grade = lambda reply, body, number: (
    f'I think: {{"scores": [{body["seed"] / 4}, 1]}}'
  )
  (mark,) = marks(endpoint(server, samples=3), 'salt')
  assert mark.score == pytest.approx((3 * 0.25 + 1) / 4)
  assert [body['seed'] for *_, body in server.asked] == [0, 1, 2]
  assert {body['temperature'] for *_, body in server.asked} == {1.0}


def test_verdict_that_cannot_be_read_is_left_out_of_the_mean(server):
  answers = ['no idea', '{"scores": [1, 0]}', '{"scores": [1]}']
  server.grade = lambda reply, body, number: answers[body['seed']]
  (mark,) = marks(endpoint(server, samples=3), 'salt')
  assert (mark.score, mark.error) == (0.75, None)


@pytest.mark.parametrize(
  ('answer', 'error'),
  [
    ('no idea', 'no JSON object'),
    ('{"scores": [1, 2]}', 'not in 0 to 1'),
    ('{"scores": [1, true]}', 'score True'),
    ('{"scores": ["1", 1]}', "score '1'"),
    ('{"scores": [1, 1, 1]}', 'no 2 scores'),
    ('{"scores": [NaN, 1]}', 'not in 0 to 1'),
    ('{"points": [1, 1]}', 'no 2 scores'),
    ('{nonsense}', 'JSONDecodeError'),
  ],
)
def test_bad_verdict_costs_its_reply(server, answer, error):
  server.grade = lambda reply, body, number: answer
  (mark,) = marks(endpoint(server), 'salt')
  assert mark.score == 0
  assert error in mark.error
  assert '\n' not in mark.error


def test_endpoint_that_fails_or_hangs_costs_its_reply_only(server):
  def grade(reply, body, number):
    if reply == 'fail':
      raise RuntimeError
    if reply == 'hang':
      time.sleep(3)
    return '{"scores": [1, 1]}'

  server.grade = grade
  judge = endpoint(server, timeout_s=0.5)
  found = marks(judge, 'salt', 'fail', 'hang', 'salt', parallel=4)
  assert [mark.score for mark in found] == [1.0, 0.0, 0.0, 1.0]
  assert '500' in found[1].error
  assert 'time' in found[2].error


def test_endpoint_that_is_not_there_costs_its_reply(server):
  judge = judges.make_judge(
    JudgeConfig(kind='openai', base_url='http://127.0.0.1:9/v1', model='m')
  )
  (mark,) = marks(judge, 'salt')
  assert 'refused' in mark.error


def test_rubric_that_needs_a_reader_is_an_error_of_the_programmatic_judge():
  problem = Problem(
    id='p',
    domain='writing',
    mode='chat',
    messages=PROBLEM.messages,
    rubric=(Criterion(text='Is it kind?'),),
  )
  job = Job(problem, Message(role='assistant', content='a'))
  (mark,) = judges.marks([job], judges.ProgrammaticJudge(), parallel=1)
  assert 'for a model that judges' in mark.error


def test_problem_without_rubric_is_an_error():
  problem = Problem(
    id='p', domain='writing', mode='chat', messages=PROBLEM.messages
  )
  job = Job(problem, Message(role='assistant', content='a'))
  (mark,) = judges.marks([job], judges.ProgrammaticJudge(), parallel=1)
  assert mark.error == 'the problem has no rubric'
