import json
import pathlib

import numpy as np
import pytest

from dsv32_jax.evaluation import distillation, distillation_report

PAIR = 'mathematics-chat'
COUNTS = {
  'sampled': 8,
  'unparsed': 1,
  'wrong': 2,
  'repeated': 1,
  'over_cap': 1,
  'kept': 3,
  'prompts': 4,
  'prompts_solved': 3,
}
# Problems that each model solves, of 100.
SOLVED = {'base': 10, PAIR: 90, 'student': 86, 'mixed': 89}


@pytest.fixture
def workdir(tmp_path) -> pathlib.Path:
  """What a chain leaves, with made-up answers."""

  def put(name: str, content: object) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))

  domains = {
    'mathematics': {'unpopulated': '', 'modes': ['chat']},
    'agentic_search': {
      'unpopulated': 'its tasks come later',
      'modes': ['chat'],
    },
  }
  put(
    'config.json',
    {
      'config': {'domains': domains, 'seed': 3},
      'versions': {'python': '3.12'},
      'git': {},
      'command': ['distill'],
    },
  )
  put(
    f'steps/samples.{PAIR}.json',
    {'counts': COUNTS, 'seconds_of_last_session': 2.0},
  )
  for model, solved in SOLVED.items():
    scores = [float(number < solved) for number in range(100)]
    for part in range(2):
      here = slice(50 * part, 50 * (part + 1))
      content = {
        'problems': [f'p{number}' for number in range(100)][here],
        'scores': scores[here],
      }
      put(f'evaluation/{model}/{PAIR}/part-{part:05d}.json', content)
    summary = {'problems': 100, 'mean_tokens': 4.5, 'accuracy': solved / 100}
    step = {
      'pairs': {PAIR: summary},
      'weights': f'hash of {model}',
      'seconds_of_last_session': 1.0,
    }
    put(f'steps/evaluate.{model}.json', step)
  return tmp_path


def test_collect_gives_accuracies_and_paired_differences(workdir):
  found = distillation.collect(workdir)
  row = found['pairs'][PAIR]
  assert row['base']['value'] == 0.1
  assert row['specialist']['n'] == 100
  assert row['specialist_base']['value'] == pytest.approx(0.8)
  assert row['student_specialist']['value'] == pytest.approx(-0.04)
  assert row['mixed_specialist']['value'] == pytest.approx(-0.01)
  # Four differences of -1 and 96 of 0.
  half = 1.959964 * np.std([-1] * 4 + [0] * 96, ddof=1) / 10
  assert row['student_specialist']['low'] == pytest.approx(-0.04 - half)
  assert row['weights']['mixed'] == 'hash of mixed'
  assert found['samples'] == {PAIR: COUNTS}
  assert found['unpopulated'] == {'agentic_search': 'its tasks come later'}


def test_collect_models_that_answered_different_problems_are_refused(workdir):
  path = workdir / 'evaluation' / 'student' / PAIR / 'part-00001.json'
  part = json.loads(path.read_text())
  part['problems'][0] = 'another'
  path.write_text(json.dumps(part))
  with pytest.raises(ValueError, match='student answered different problems'):
    distillation.collect(workdir)


def test_collect_evaluation_that_lacks_a_part_is_refused(workdir):
  (workdir / 'evaluation' / 'mixed' / PAIR / 'part-00000.json').unlink()
  with pytest.raises(ValueError, match=f'mixed/{PAIR}: holds 50 problems'):
    distillation.collect(workdir)


def test_collect_step_that_is_not_done_is_refused(workdir):
  (workdir / 'steps' / 'evaluate.student.json').unlink()
  with pytest.raises(ValueError, match=r'expected step evaluate\.student'):
    distillation.collect(workdir)


def test_report_holds_the_tables_and_says_what_is_met(workdir):
  path = distillation_report.write(workdir, distillation.collect(workdir))
  text = path.read_text()
  assert '| mathematics-chat | 100 | 10.0 (5.5 to 17.4) | 90.0 (' in text
  assert '-4.0 (-7.9 to -0.1)' in text
  assert '| yes |' in text
  assert 'agentic_search | its tasks come later' in text
  page = (workdir / 'report.html').read_text()
  assert 'data:image/png;base64,' in page
  assert 'src="http' not in page
  saved = json.loads((workdir / 'report' / 'results.json').read_text())
  assert saved['pairs'][PAIR]['base']['value'] == 0.1


def test_report_names_what_is_missed(workdir):
  found = distillation.collect(workdir)
  found['pairs'][PAIR]['specialist_base']['value'] = 0.19
  found['pairs'][PAIR]['mixed_specialist']['value'] = -0.031
  [_, differences, *_] = distillation_report.sections(found)
  assert differences.table[1][0][-1] == 'missed: specialist, mixed'
