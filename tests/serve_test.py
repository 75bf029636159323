"""Runs experiments/serve.py as a user would."""

import os
import pathlib
import signal
import subprocess
import sys
import urllib.request

import openai
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def _start(*arguments: str, **variables: str) -> subprocess.Popen:
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  environment.pop('XLA_FLAGS', None)
  return subprocess.Popen(
    (sys.executable, 'experiments/serve.py', '--port=0', *arguments),
    cwd=ROOT,
    env=environment | variables,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_serve_answers_and_ends_in_order_on_a_signal():
  process = _start(
    '--preset=tiny',
    '--max_tokens=256',
    # One program for prompts and one for decoding.
    '--page_size=256',
    '--prefill_chunk=16',
    '--decode_steps=1',
    '--shutdown_seconds=60',
    DSV32_API_KEY='secret',
  )
  try:
    line = process.stdout.readline()
    assert line.startswith('tiny: http://127.0.0.1:'), process.stderr.read()
    base = line.split()[-1]
    with urllib.request.urlopen(f'{base.removesuffix("/v1")}/health') as answer:
      assert answer.status == 200
    with openai.OpenAI(base_url=base, api_key='wrong') as stranger:
      with pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with openai.OpenAI(base_url=base, api_key='secret') as client:
      chunks = client.chat.completions.create(
        model='tiny',
        messages=[{'role': 'user', 'content': 'hello'}],
        max_tokens=200,
        stream=True,
      )
      next(chunks)
      process.send_signal(signal.SIGTERM)
      # It goes on to the end, and so does the process.
      assert list(chunks)[-1].choices[0].finish_reason in ('stop', 'length')
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert 'Traceback' not in errors
    assert output == ''
  finally:
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ((), 'expected one of them'),
    (('--preset=tiny', '--max_batch=0'), 'max_batch: got 0'),
    (('--preset=tiny', '--host=300.1.1.1'), '300.1.1.1'),
  ],
)
def test_serve_that_cannot_start_says_why_in_one_line(arguments, message):
  process = _start(*arguments)
  output, errors = process.communicate(timeout=120)
  assert process.returncode == 1
  (line,) = errors.strip().splitlines()
  assert line.startswith('error: ')
  assert message in line
  assert output == ''
