import dataclasses

import numpy as np
import pytest

from dsv32_jax.inference import Completion
from dsv32_jax.rl.types import Group, Response, Scored

L, A, K = 2, 3, 4


def completion(num_prompt=3, num_new=2, *, prompt=None, record=True, width=K):
  """What an engine answers, with records that tell places apart."""
  rng = np.random.default_rng(num_prompt)
  if prompt is None:
    prompt = tuple(range(10, 10 + num_prompt))
  fed = len(prompt) - 1 + num_new
  tokens = tuple(range(20, 20 + num_new))
  experts = rng.integers(0, 8, (fed, L, A))
  selected = np.full((fed, L + 1, width), -1)
  selected[..., 0] = np.arange(fed)[:, None]
  split = len(prompt) - 1
  return Completion(
    prompt=prompt,
    tokens=tokens,
    logprobs=(-9.0,) * num_new,
    sampling_logprobs=tuple(-0.5 * (n + 1) for n in range(num_new)),
    top_logprobs=((),) * num_new,
    text='',
    finish_reason='stop',
    experts=experts[split:] if record else None,
    prompt_experts=experts[:split] if record and split else None,
    kept=tuple(
      None if n % 2 else np.array([1, token]) for n, token in enumerate(tokens)
    )
    if record
    else None,
    selected=selected[split:] if record else None,
    prompt_selected=selected[:split] if record and split else None,
  )


def test_response_of_a_completion_is_its_tokens_and_records():
  answer = completion()
  found = Response.from_completion(answer, weight_version=7, temperature=0.7)
  assert found.tokens.tolist() == [10, 11, 12, 20, 21]
  assert found.is_policy.tolist() == [False] * 3 + [True] * 2
  assert found.sampling_logprobs.tolist() == [0, 0, 0, -0.5, -1]
  assert (found.prompt_length, found.num_policy_tokens) == (3, 2)
  assert found.policy_tokens.tolist() == [20, 21]
  assert (found.weight_version, found.temperature) == (7, 0.7)
  assert found.experts.shape == (4, L, A)
  np.testing.assert_array_equal(found.experts[:2], answer.prompt_experts)
  np.testing.assert_array_equal(found.selected[2:], answer.selected)
  assert found.kept[0].tolist() == [1, 20]
  assert found.kept[1] is None


def test_response_to_a_prompt_of_one_token_has_no_record_of_it_alone():
  found = Response.from_completion(completion(num_prompt=1))
  assert found.experts.shape == (2, L, A)


def test_response_without_records_has_none():
  found = Response.from_completion(completion(record=False))
  assert found.kept is found.experts is found.selected is None


def test_continued_response_appends_and_keeps_the_first_records():
  first = Response.from_completion(completion())
  tool = (90, 91)
  # The engine's tables have grown: it may select from more keys now.
  second = completion(
    num_new=3, prompt=(*first.tokens.tolist(), *tool), width=K + 2
  )
  found = first.continued(second, weight_version=3)
  assert found.tokens.tolist() == [10, 11, 12, 20, 21, 90, 91, 20, 21, 22]
  assert np.flatnonzero(found.is_policy).tolist() == [3, 4, 7, 8, 9]
  assert found.sampling_logprobs.tolist() == [
    0, 0, 0, -0.5, -1, 0, 0, -0.5, -1, -1.5,
  ]  # fmt: skip
  assert len(found.kept) == found.num_policy_tokens == 5
  assert found.prompt_length == 3
  assert found.weight_version == 3
  # Tokens fed in the first turn are as they were; the token that was sampled
  # last in it is fed in the second.
  np.testing.assert_array_equal(found.experts[:4], first.experts)
  np.testing.assert_array_equal(found.experts[4:6], second.prompt_experts[4:])
  np.testing.assert_array_equal(found.experts[6:], second.experts)
  assert found.selected.shape == (9, L + 1, K + 2)
  np.testing.assert_array_equal(found.selected[:4, :, :K], first.selected)
  assert np.all(found.selected[:4, :, K:] == -1)


def test_continued_response_refuses_another_beginning():
  first = Response.from_completion(completion())
  with pytest.raises(ValueError, match='does not begin with the 5 tokens'):
    first.continued(completion(prompt=(10, 11, 12, 20, 22, 90)))
  with pytest.raises(ValueError, match='got a prompt of 3 tokens'):
    first.continued(completion())


def test_continued_response_refuses_records_of_one_turn():
  first = Response.from_completion(completion())
  prompt = (*first.tokens.tolist(), 90)
  with pytest.raises(ValueError, match='recorded for one turn only'):
    first.continued(completion(prompt=prompt, record=False))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'tokens': np.zeros((2, 2), np.int32)}, r'tokens: got shape \(2, 2\)'),
    ({'is_policy': np.ones(4, bool)}, r'is_policy: got shape \(4,\)'),
    ({'is_policy': np.ones(5, bool)}, 'expected a prompt before it'),
    (
      {'sampling_logprobs': np.full(5, np.nan, np.float32)},
      'sampling_logprobs: got a value that is not finite',
    ),
    ({'temperature': 0.0}, 'temperature: got 0.0'),
    ({'kept': (None,)}, 'kept: got 1 sets for 2 sampled tokens'),
    (
      {'kept': (None, np.array([1, 20]))},
      'got 0 times token 21 in the set of sampled token 1',
    ),
    (
      {'kept': (np.array([20, 20]), np.array([21]))},
      'got 2 times token 20 in the set of sampled token 0',
    ),
    (
      {'kept': (np.array([], np.int32), np.array([21]))},
      'got 0 times token 20',
    ),
    ({'experts': np.zeros((5, L, A), np.int32)}, r'expected \[4, layers'),
    ({'selected': np.zeros((4, L), np.int32)}, r'selected: got shape \(4, 2\)'),
  ],
)
def test_response_refuses_what_does_not_fit(changes, message):
  found = Response.from_completion(completion())
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(found, **changes)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'finish_reason': 'error', 'error': 'no luck'}, 'no luck'),
    ({'tokens': ()}, 'got no new token'),
    ({'prompt_experts': None}, 'prompt_experts: got None with experts'),
  ],
)
def test_response_refuses_a_completion_to_learn_nothing_from(changes, message):
  answer = dataclasses.replace(completion(), **changes)
  with pytest.raises(ValueError, match=message):
    Response.from_completion(answer)


def test_group_knows_its_rewards():
  response = Response.from_completion(completion())

  def group(*rewards):
    return Group(
      problem='p', domain='mathematics', mode='chat',
      responses=tuple(Scored(response=response, reward=r) for r in rewards),
    )  # fmt: skip

  assert group(1.0, 0.5).rewards.tolist() == [1.0, 0.5]
  assert group(0.3, 0.3).has_equal_rewards
  assert not group(0.3, 0.4).has_equal_rewards
  with pytest.raises(ValueError, match="got none for problem 'p'"):
    group()
  with pytest.raises(ValueError, match='reward: got nan'):
    group(float('nan'))
