import pytest

from dsv32_jax.rl.speciale import analyses, sources
from dsv32_jax.rl.speciale.derivations import Task, check, parse_derivation
from dsv32_jax.rl.speciale.labels import (
  LabelConfig,
  Opinion,
  auto_label,
  label_proofs,
)
from dsv32_jax.rl.speciale.policy import Reply
from tests.support.scripted_prover import ScriptedProver


def opinion(score, valid=0, of=0):
  return Opinion(score=score, checks=(True,) * valid + (False,) * (of - valid))


FINE = opinion(1.0)
ZERO, NOT_ZERO = opinion(0.0, 3, 4), opinion(0.0, 2, 4)
HALF, NOT_HALF = opinion(0.5, 4, 4), opinion(0.5, 0, 4)


# opinions, k: label.
CASES = [
  ([FINE, FINE, FINE], 1, 1.0),
  ([ZERO, ZERO, FINE], 2, 0.0),
  # One valid analysis is not two.
  ([ZERO, FINE, FINE], 2, None),
  # A tie is no majority, so no analysis here has a valid issue.
  ([NOT_ZERO, NOT_HALF, FINE], 1, 1.0),
  ([HALF, HALF, FINE], 2, 0.5),
  # Half is not the lowest score once anybody says 0: to be discarded.
  ([HALF, HALF, NOT_ZERO], 2, None),
  ([HALF, HALF, ZERO], 2, None),
  ([HALF, HALF, ZERO], 1, 0.0),
  ([ZERO, NOT_ZERO, ZERO, HALF], 2, 0.0),
]


@pytest.mark.parametrize(('opinions', 'lowest', 'label'), CASES)
def test_label_follows_the_valid_analyses_with_the_lowest_score(
  opinions, lowest, label
):
  assert auto_label(opinions, lowest=lowest).score == label
  assert auto_label(opinions[::-1], lowest=lowest).score == label


def test_label_without_what_it_needs_is_refused():
  with pytest.raises(ValueError, match='opinions: got none'):
    auto_label([], lowest=1)
  with pytest.raises(ValueError, match='lowest: got 0'):
    auto_label([FINE], lowest=0)
  with pytest.raises(ValueError, match=r'opinions\[1\].checks: got none'):
    auto_label([FINE, Opinion(score=0.5)], lowest=1)
  with pytest.raises(ValueError, match='checks: got 0'):
    LabelConfig(checks=0)


def test_labels_of_a_verifier_that_often_sees_nothing_are_still_true():
  source = sources.make(
    'speciale/review', {'kinds': ['compute', 'solve'], 'right_share': 0.2}
  )
  problems = [source.problem('held_out', i) for i in range(3)]
  proofs = [
    (Task(**p.reference['task']), p.reference['proof']) for p in problems
  ]
  verifier = ScriptedProver(right=0.0, blind=0.4)
  config = LabelConfig(analyses=12, checks=2, lowest=2)
  found = label_proofs(verifier, source.dialogue, proofs, config, seed=1)
  truth = [check(task, parse_derivation(text)).score for task, text in proofs]
  assert [one.label.score for one in found] == truth
  assert len(set(truth)) > 1
  checks = sum(text.startswith('Judge: ') for text in verifier.asked)
  below = sum(o.score < 1 for one in found for o in one.opinions)
  assert checks == 2 * below
  assert len(verifier.asked) == 3 * 12 + checks
  tokens = sum(one.num_tokens for one in found)
  assert tokens == 3 * 12 * 5 + checks * 2


def test_proof_whose_analyses_cannot_be_read_gets_no_label():
  source = sources.make('speciale/review', {'kinds': ['compute']})
  problem = source.problem('held_out', 0)
  proofs = [(Task(**problem.reference['task']), problem.reference['proof'])]
  found = label_proofs(
    lambda prompts: [Reply(content='?') for _ in prompts],
    source.dialogue,
    proofs,
  )
  assert found[0].label.score is None
  assert found[0].opinions == ()


def test_check_that_cannot_be_read_speaks_against_an_analysis():
  source = sources.make(
    'speciale/review', {'kinds': ['compute'], 'right_share': 0.0}
  )
  problem = source.problem('held_out', 0)
  task = Task(**problem.reference['task'])
  truth = check(task, parse_derivation(problem.reference['proof']))
  text = analyses.format_analysis(analyses.true_analysis(truth))
  found = label_proofs(
    lambda prompts: [Reply(content=text) for _ in prompts],
    source.dialogue,
    [(task, problem.reference['proof'])],
    LabelConfig(analyses=3, checks=2, lowest=1),
    # Answers analyses where a quality was asked for.
    meta_verifier=lambda prompts: [Reply(content=text) for _ in prompts],
  )
  assert found[0].label.score == 1.0
  assert all(not any(o.checks) for o in found[0].opinions)
