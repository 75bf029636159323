import pytest

from dsv32_jax.chat import ControlTokens, Message
from dsv32_jax.data.tokenizer import ByteTokenizer
from dsv32_jax.inference.engine import Engine, EngineConfig
from dsv32_jax.inference.requests import Completion
from dsv32_jax.inference.sampling import Sampling
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.rl.speciale.policy import (
  EnginePolicy,
  Prompt,
  read_completion,
  seed_of,
)
from tests.support import tiny_configs


def make_engine():
  cfg = tiny_configs.config(vocab_size=272)
  model, variables = DeepSeekV32(cfg), tiny_configs.variables(cfg)
  config = EngineConfig(max_batch=2, max_waiting=3, max_tokens=48, page_size=16)
  return Engine(model, variables, config)


def policy(engine, mode='thinking'):
  return EnginePolicy(
    engine,
    ByteTokenizer(),
    mode=mode,
    max_new_tokens=6,
    sampling=Sampling(temperature=1.0),
  )


def prompts(*seeds):
  message = Message(role='user', content='Compute 2+3.')
  return [Prompt(messages=(message,), seed=seed) for seed in seeds]


@pytest.mark.slow
def test_engine_answers_more_prompts_than_may_wait_in_order():
  replies = policy(make_engine())(prompts(1, 2, 3, 1, 5, 6, 7, 2))
  assert len(replies) == 8
  assert replies[0] == replies[3]
  assert replies[1] == replies[7]
  assert len({reply.reasoning + reply.content for reply in replies}) > 2
  assert all(1 <= reply.num_tokens <= 6 for reply in replies)


def read(text, mode, reason='stop'):
  tokenizer = ByteTokenizer()
  tokens = []
  for part in text:
    special = tokenizer.special_ids
    tokens += (
      [special[part]] if part in special else tokenizer.encode(part).tolist()
    )
  completion = Completion(
    prompt=(1,),
    tokens=tuple(tokens),
    logprobs=(0.0,) * len(tokens),
    sampling_logprobs=(0.0,) * len(tokens),
    top_logprobs=(),
    text='',
    finish_reason=reason,
  )
  controls = ControlTokens.from_tokenizer(tokenizer)
  return read_completion(completion, tokenizer, controls, mode=mode)


_END, _EOS = '</think>', '<｜end▁of▁sentence｜>'


def test_thoughts_are_counted_up_to_their_end():
  reply = read(['abc', _END, 'de', _EOS], 'thinking')
  assert (reply.reasoning, reply.content) == ('abc', 'de')
  assert reply.num_reasoning_tokens == 3
  assert reply.num_tokens == 7
  assert reply.is_finished
  assert read(['de', _EOS], 'chat').num_reasoning_tokens == 0


def test_reply_that_is_cut_off_or_breaks_the_grammar_is_not_finished():
  cut = read(['abc'], 'thinking', reason='length')
  assert not cut.is_finished
  assert cut.num_reasoning_tokens == 3
  broken = read(['abc', _EOS], 'thinking')
  assert not broken.is_finished
  assert broken.error is not None


def test_seeds_differ_by_what_they_are_for():
  seeds = {
    seed_of(seed, what, place)
    for seed in range(5)
    for what in 'ab'
    for place in range(50)
  }
  assert len(seeds) == 500
  assert all(0 <= seed < 2**32 for seed in seeds)
