import itertools
from typing import get_args

import pytest

from dsv32_jax.rl.speciale.analyses import (
  Analysis,
  AnalysisError,
  format_analysis,
  found_share,
  issue_score,
  meta_score,
  parse_analysis,
  true_analysis,
)
from dsv32_jax.rl.speciale.derivations import (
  Fault,
  FaultKind,
  Verdict,
  score_of,
)

RULE2, JUMP3, VALUE3, GOAL5 = (
  Fault(step=2, kind='rule'),
  Fault(step=3, kind='jump'),
  Fault(step=3, kind='value'),
  Fault(step=5, kind='goal'),
)


def truth(*faults):
  return Verdict(faults=faults, notes=('',) * len(faults))


@pytest.mark.parametrize(
  ('faults', 'score'),
  [
    ((), 1.0),
    ((RULE2,), 0.5),
    ((RULE2, JUMP3), 0.5),
    ((RULE2, VALUE3), 0.0),
    ((GOAL5,), 0.0),
    ((Fault(step=1, kind='form'),), 0.0),
  ],
)
def test_score_forgives_presentation_by_half_and_substance_not(faults, score):
  assert score_of(faults) == score


# issues cited, score claimed, true faults: quality.
META = [
  ((), 1.0, (), 1.0),
  # Nothing is claimed that is not there: the score pays for what was missed.
  ((), 1.0, (VALUE3,), 1.0),
  # A score that nothing justifies.
  ((), 0.0, (VALUE3,), 0.0),
  ((), 0.5, (), 0.0),
  ((VALUE3,), 0.5, (VALUE3,), 0.0),
  ((VALUE3,), 0.0, (VALUE3,), 1.0),
  ((VALUE3,), 0.0, (VALUE3, GOAL5), 1.0),
  # The right step for the wrong reason.
  ((JUMP3,), 0.5, (VALUE3,), 0.5),
  ((VALUE3,), 0.0, (JUMP3,), 0.5),
  # A step without fault.
  ((RULE2,), 0.5, (VALUE3,), 0.0),
  ((RULE2, VALUE3), 0.0, (VALUE3,), 0.0),
  ((JUMP3, VALUE3), 0.0, (VALUE3,), 0.5),
  ((RULE2,), 0.5, (), 0.0),
]


@pytest.mark.parametrize(('issues', 'score', 'faults', 'quality'), META)
def test_meta_score_asks_whether_issues_exist_and_justify(
  issues, score, faults, quality
):
  analysis = Analysis(issues=issues, score=score)
  assert meta_score(analysis, truth(*faults)) == quality


def test_true_analysis_has_full_quality_and_finds_all():
  for faults in itertools.chain.from_iterable(
    itertools.combinations((RULE2, JUMP3, VALUE3, GOAL5), n) for n in range(5)
  ):
    verdict = truth(*faults)
    analysis = true_analysis(verdict)
    assert meta_score(analysis, verdict) == 1
    assert found_share(analysis.issues, verdict) == 1
    assert parse_analysis(format_analysis(analysis)) == analysis


def test_found_share_counts_true_faults_that_are_cited():
  assert found_share((VALUE3, RULE2), truth(VALUE3, GOAL5)) == 0.5
  assert found_share((), truth(VALUE3)) == 0
  assert found_share((VALUE3,), truth()) == 1
  assert issue_score(VALUE3, truth(JUMP3)) == 0.5


@pytest.mark.parametrize('kind', get_args(FaultKind))
def test_analysis_reads_back_as_written(kind):
  text = f'step 12: {kind}\nscore: 0.5'
  analysis = parse_analysis(f'\n {text} \n\n')
  assert analysis.issues == (Fault(step=12, kind=kind),)
  assert format_analysis(analysis) == text


@pytest.mark.parametrize(
  ('text', 'complaint'),
  [
    ('', 'empty'),
    ('step 1: value', 'as the last line'),
    ('score: 0.7', 'as the last line'),
    ('score: 1.0', 'as the last line'),
    ('score: 1\nstep 1: value', 'as the last line'),
    ('score: 1\nscore: 1', "got 'score: 1'"),
    ('step 1: bad\nscore: 0', "got 'step 1: bad'"),
    ('step one: value\nscore: 0', 'expected step NUMBER'),
    ('I think so.\nscore: 1', "got 'I think so.'"),
    ('step 1: value\nstep 1: value\nscore: 0', 'twice'),
    (
      ''.join(f'step {n}: jump\n' for n in range(65)) + 'score: 0.5',
      'got 65 issues',
    ),
  ],
)
def test_text_that_is_no_analysis_is_refused(text, complaint):
  with pytest.raises(AnalysisError, match=complaint):
    parse_analysis(text)
