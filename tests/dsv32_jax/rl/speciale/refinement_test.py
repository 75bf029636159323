import random

import pytest

from dsv32_jax.chat import Message
from dsv32_jax.rl.speciale.policy import Reply
from dsv32_jax.rl.speciale.prompts import (
  Attempt,
  DerivationDialogue,
  Review,
)
from dsv32_jax.rl.speciale.refinement import (
  Candidate,
  RefineConfig,
  SearchConfig,
  best_candidates,
  issues_first,
  refine,
  search,
)
from dsv32_jax.rl.speciale.tasks import TaskSize, make_task
from tests.support.scripted_prover import ScriptedProver

DIALOGUE = DerivationDialogue()


class Toy:
  """Proofs are numbers, better the higher; a review is told its score."""

  def ask_proof(self, task):
    return (Message(role='user', content='new'),)

  def ask_refinement(self, task, proof, analysis):
    return (Message(role='user', content=f'mend {proof} {analysis}'),)

  def ask_review(self, task, proof):
    return (Message(role='user', content=f'review {proof}'),)

  def ask_meta(self, task, proof, analysis):
    raise AssertionError('not asked for here')

  def read_attempt(self, reply):
    if reply.content == '?':
      return None
    proof, score = reply.content.split('/')
    return Attempt(proof=proof, analysis=f'z{proof}', score=float(score))

  def read_review(self, reply):
    if reply.content == '?':
      return None
    return Review(text=reply.content, score=float(reply.content.split(':')[1]))

  def read_meta(self, reply):
    raise AssertionError('not asked for here')


class Script:
  """Replies by a function of the text and the count of prompts before it."""

  def __init__(self, answer):
    self.asked, self.calls, self._answer = [], [], answer

  def __call__(self, prompts):
    self.calls.append(len(prompts))
    replies = []
    for prompt in prompts:
      text = prompt.messages[-1].content
      content = self._answer(text, len(self.asked))
      self.asked.append(text)
      replies.append(Reply(content=content, num_tokens=1))
    return replies


def test_refine_feeds_attempts_back_until_the_self_score_is_one():
  answers = {'new': '1/0', 'mend 1 z1': '2/0.5', 'mend 2 z2': '3/1'}
  script = Script(lambda text, _: answers[text])
  found = refine(script, Toy(), ['a'], RefineConfig(rounds=9))[0]
  assert script.asked == ['new', 'mend 1 z1', 'mend 2 z2']
  assert found.stopped == 'passed'
  assert found.best.proof == '3'
  assert found.num_tokens == (1, 1, 1)


def test_refine_stops_at_the_cap_with_the_best_by_self_score():
  scores = ['1/0', '2/0.5', '3/0.5', '4/0']
  script = Script(lambda text, count: scores[count])
  found = refine(script, Toy(), ['a'], RefineConfig(rounds=4))[0]
  assert found.stopped == 'rounds'
  assert [a.proof for a in found.attempts] == ['1', '2', '3', '4']
  assert found.best.proof == '3'


def test_refine_goes_back_to_the_last_attempt_that_could_be_read():
  answers = ['?', '1/0', '?', '2/1']
  script = Script(lambda text, count: answers[count])
  found = refine(script, Toy(), ['a'], RefineConfig(rounds=9))[0]
  assert script.asked == ['new', 'new', 'mend 1 z1', 'mend 1 z1']
  assert found.attempts[0] is None
  assert found.stopped == 'passed'


def test_refine_asks_for_open_tasks_only_and_for_them_together():
  def answer(text, count):
    # The second of three tasks is done in round one, the others in round two.
    return {1: '9/1'}.get(count, '1/0' if count < 3 else '2/1')

  script = Script(answer)
  found = refine(script, Toy(), ['a', 'b', 'c'], RefineConfig(rounds=5))
  assert script.calls == [3, 2]
  assert [len(one.attempts) for one in found] == [2, 1, 2]


def test_refine_without_a_readable_reply_has_no_best():
  script = Script(lambda text, count: '?')
  found = refine(script, Toy(), ['a'], RefineConfig(rounds=2))[0]
  assert found.best is None
  assert found.stopped == 'rounds'


@pytest.mark.parametrize(
  'config',
  [
    SearchConfig(proofs=6, analyses=5, kept=4, pairs=3, rounds=2),
    pytest.param(SearchConfig(rounds=2), marks=pytest.mark.slow),
  ],
)
def test_search_asks_as_often_as_the_paper_says(config):
  # Every proof is new and no review passes.
  def answer(text, count):
    return 'r:0.5' if text.startswith('review') else f'{count}/0'

  script = Script(answer)
  found = search(script, Toy(), 'a', config)
  # So many proofs with so many reviews; then pairs of a kept proof and a
  # review, one new proof each.
  refined = config.kept * config.pairs
  a_round = [refined, refined * config.analyses]
  start = [config.proofs, config.proofs * config.analyses]
  assert script.calls == start + a_round * 2
  assert (found.rounds, found.stopped) == (2, 'rounds')
  assert len(found.pool) == config.proofs + 2 * refined
  assert found.num_tokens == sum(script.calls)


def test_search_has_the_papers_sizes_by_default():
  assert SearchConfig() == SearchConfig(
    proofs=64, analyses=64, kept=64, pairs=8, rounds=16
  )


def test_search_ends_when_a_proof_passes_all_its_checks():
  def answer(text, count):
    if text.startswith('review'):
      # Proofs are worth what they say; '3' passes.
      return 'r:1' if text == 'review 3' else 'r:0'
    return '1/1' if text == 'new' else f'{int(text.split()[1]) + 1}/1'

  script = Script(answer)
  config = SearchConfig(proofs=4, analyses=3, kept=2, pairs=2, rounds=9)
  found = search(script, Toy(), 'a', config)
  assert found.stopped == 'passed'
  assert found.rounds == 2
  # Four equal proofs are one, and its reviews are asked for once.
  assert [c.attempt.proof for c in found.pool] == ['1', '2', '3']
  assert found.best.attempt.proof == '3'
  assert script.asked.count('review 1') == 3


def test_search_does_not_pass_on_a_review_that_cannot_be_read():
  def answer(text, count):
    if text.startswith('review'):
      return '?' if count % 2 else 'r:1'
    return '1/1'

  config = SearchConfig(proofs=1, analyses=4, kept=1, pairs=1, rounds=2)
  found = search(Script(answer), Toy(), 'a', config)
  assert found.stopped == 'rounds'
  assert found.pool[0].mean_score == 1


def test_search_without_a_readable_proof_is_empty():
  found = search(Script(lambda text, count: '?'), Toy(), 'a')
  assert (found.stopped, found.pool, found.best) == ('empty', (), None)
  assert found.unreadable == 64


def test_search_may_have_another_verifier():
  prover = Script(lambda text, count: f'{count}/1')
  verifier = Script(lambda text, count: 'r:1')
  config = SearchConfig(proofs=2, analyses=3)
  search(prover, Toy(), 'a', config, verifier=verifier)
  assert prover.asked == ['new', 'new']
  assert sorted(verifier.asked) == ['review 0'] * 3 + ['review 1'] * 3


def candidate(name, *scores, round=0):
  return Candidate(
    attempt=Attempt(proof=name, analysis='', score=1.0),
    reviews=tuple(
      None if s is None else Review(text=f'{s}', score=s) for s in scores
    ),
    round=round,
  )


def test_best_candidates_go_by_mean_score_then_by_round():
  pool = [
    candidate('a', 0.0, 1.0),
    candidate('b', 1.0, 1.0),
    candidate('c', 0.5, 0.5, round=1),
    candidate('d', None, None),
    candidate('e', None, 1.0, 0.5),
  ]
  order = [c.attempt.proof for c in best_candidates(pool, 4)]
  assert order == ['b', 'e', 'c', 'a']
  assert not pool[4].passes
  assert pool[1].passes


def test_issues_come_first_and_in_random_order():
  reviews = [
    None if i % 7 == 0 else Review(text=str(i), score=(1.0, 0.5, 0.0)[i % 3])
    for i in range(30)
  ]
  seen = set()
  for seed in range(20):
    chosen = issues_first(reviews, 8, random.Random(seed))
    assert len({r.text for r in chosen}) == 8
    assert all(r.score < 1 for r in chosen)
    seen.add(tuple(r.text for r in chosen))
  assert len(seen) == 20
  issues = sum(r is not None and r.score < 1 for r in reviews)
  chosen = issues_first(reviews, issues + 2, random.Random(0))
  assert [r.score == 1 for r in chosen] == [False] * issues + [True] * 2


def test_refinement_of_derivations_mends_what_an_honest_prover_got_wrong():
  rng = random.Random(0)
  tasks = [make_task('solve', TaskSize(), rng)[0] for _ in range(6)]
  honest = ScriptedProver(right=0.3, mends=0.5, blind=0.0, unreadable=0.1)
  found = refine(honest, DIALOGUE, tasks, RefineConfig(rounds=16), seed=3)
  assert all(one.stopped == 'passed' for one in found)
  again = ScriptedProver(right=0.3, mends=0.5, blind=0.0, unreadable=0.1)
  assert (
    refine(again, DIALOGUE, tasks, RefineConfig(rounds=16), seed=3) == found
  )
  assert any(text.startswith('Mend: ') for text in honest.asked)


@pytest.mark.parametrize('field', ['proofs', 'analyses', 'kept', 'rounds'])
def test_search_of_nothing_is_refused(field):
  with pytest.raises(ValueError, match=f'{field}: got 0'):
    SearchConfig(**{field: 0})
