"""Answers to a suite's problems, drawn from a model through the engine."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence

import numpy as np

from dsv32_jax import chat, inference
from dsv32_jax.checkpoints import integrity
from dsv32_jax.evaluation.suites import human_eval
from dsv32_jax.evaluation.suites.runner import Sample

MODES = ('completion', 'chat', 'thinking')
_ASK = (
  'Complete this Python function. Answer with the whole function in one code '
  'block.\n\n```python\n{prompt}```'
)


def samples(
  engine: inference.Engine,
  tokenizer: chat.ChatTokenizer,
  problems: Sequence[human_eval.Problem],
  *,
  mode: str,
  per_problem: int = 1,
  max_new_tokens: int = 512,
  sampling: inference.Sampling = inference.GREEDY,
  seed: int = 0,
) -> list[Sample]:
  """Draws samples.

  Args:
    engine: with the model, and with the tokenizer.
    tokenizer: of the model.
    problems: what to answer.
    mode: 'completion' continues the prompt; 'chat' and 'thinking' ask for it in
      the chat format.
    per_problem: samples of each problem.
    max_new_tokens: of each sample, as far as the engine has room.
    sampling: how tokens are drawn.
    seed: of the whole; samples of a problem have the seeds 0, 1, ... of it.

  Returns:
    All samples of a problem, then those of the next; without a program where
    the prompt leaves no room for one.

  Raises:
    ValueError: for another mode.
    RuntimeError: a request that the engine could not finish.
  """
  if mode not in MODES:
    raise ValueError(f'mode: got {mode!r}, expected one of {list(MODES)}')
  asked = [(p, i) for p in problems for i in range(per_problem)]
  found: list[Sample] = []
  # As many as may wait at a time.
  size = engine.config.max_waiting
  for begin in range(0, len(asked), size):
    tickets = []
    for problem, index in asked[begin : begin + size]:
      prompt = _prompt(problem, tokenizer, mode)
      room = engine.max_tokens - len(prompt)
      ticket = None
      if room > 0:
        request = inference.Request(
          prompt=prompt,
          max_new_tokens=min(max_new_tokens, room),
          sampling=sampling,
          seed=_seed(seed, problem.id, index),
          stop_ids=(tokenizer.eos_id,),
          stop_strings=human_eval.STOPS if mode == 'completion' else (),
        )
        ticket = engine.submit(request)
      tickets.append((problem, index, ticket))
    engine.run()
    for problem, index, ticket in tickets:
      sample = Sample(problem=problem, program=None, mode=mode, seed=index)
      if ticket is not None:
        completion = ticket.result(0)
        if completion.finish_reason == 'error':
          raise RuntimeError(f'{problem.id}: {completion.error}')
        sample = dataclasses.replace(
          sample,
          program=_program(problem, completion, tokenizer, mode),
          tokens=len(completion.tokens),
          steps=1,
        )
      found.append(sample)
  return found


def hash_of_weights(directory: pathlib.Path) -> str:
  """16 hex digits that tell the weights of a checkpoint from others.

  Of a stage they are of its last manifest, which has the hash of every file; of
  a Hugging Face directory of its safetensors files.

  Raises:
    ValueError: if it holds neither.
  """
  digest = hashlib.sha256()
  manifests = sorted(directory.rglob(integrity.MANIFEST))
  files = manifests[-1:] or sorted(directory.glob('*.safetensors'))
  if not files:
    raise ValueError(
      f'checkpoint: got {directory}, expected a sealed stage or safetensors'
    )
  for path in files:
    with open(path, 'rb') as file:
      digest.update(path.relative_to(directory).as_posix().encode())
      digest.update(hashlib.file_digest(file, 'sha256').digest())
  return digest.hexdigest()[:16]


def _prompt(
  problem: human_eval.Problem, tokenizer: chat.ChatTokenizer, mode: str
) -> tuple[int, ...]:
  if mode == 'completion':
    return tuple(int(token) for token in tokenizer.encode(problem.prompt))
  message = chat.Message(
    role='user', content=_ASK.format(prompt=problem.prompt)
  )
  return tuple(chat.encode([message], tokenizer, mode=_chat_mode(mode)))


def _program(
  problem: human_eval.Problem,
  completion: inference.Completion,
  tokenizer: chat.ChatTokenizer,
  mode: str,
) -> str:
  if mode == 'completion':
    return human_eval.continued(problem, completion.text)
  controls = chat.ControlTokens.from_tokenizer(tokenizer)
  text = controls.decode(completion.tokens, tokenizer)
  reply = chat.parse(text, mode=_chat_mode(mode), recover=True)
  return human_eval.said(problem, reply.content)


def _chat_mode(mode: str) -> chat.Mode:
  return 'thinking' if mode == 'thinking' else 'chat'


def _seed(*names: int | str) -> int:
  numbers = [
    name if isinstance(name, int) else int.from_bytes(name.encode())
    for name in names
  ]
  return int(np.random.SeedSequence(numbers).generate_state(1, np.uint32)[0])
