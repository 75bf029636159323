import json

import numpy as np
import pytest

from dsv32_jax.evaluation import rl_report


def evaluation(step: int, passed: list[int], *, problems=None) -> dict:
  rate = float(np.mean(passed))
  one = {
    'pass@1': rate,
    'low': max(rate - 0.1, 0.0),
    'high': rate + 0.1,
    'n': len(passed),
    'samples': 1,
    'passed': passed,
    'problems': problems or [f'p{i}' for i in range(len(passed))],
    'length': 5.0,
    'truncated': 0.25,
  }
  return {'step': step, 'flops': 1.0, 'ways': {'sampled': {'words': one}}}


@pytest.fixture
def workdir(tmp_path):
  config = {
    'config': {'seed': 3},
    'versions': {'jax': '0.0'},
    'git': {'commit': 'abc', 'changed': True},
    'command': ['rl.py', '--workdir=x'],
  }
  (tmp_path / 'config.json').write_text(json.dumps(config))
  lines = []
  for step in range(1, 9):
    line = {
      'step': step,
      'batch': float((step - 1) // 2),
      'entropy': 1.0 / step,
      'kl/words': 0.01 * step,
      'grpo/ratio_max': 1.0 + step,
      'grad_norm/main': 'NaN' if step == 3 else 1.0,
      'time/update_s': 0.5,
      'time/total_s': 2.0 * step,
      'compute/rollout_flops': 10.0 * step,
      'compute/scoring_flops': 5.0 * step,
      'compute/training_flops': 35.0 * step,
      'compute/evaluation_flops': 1.0,
      'compute/rl_flops': 50.0 * step,
      'compute/rl_over_pretraining': 0.05 * step,
    }
    if step % 2:
      line |= {
        'reward/mean': 0.1 * step,
        'reward/words': 0.1 * step,
        'rollout/responses': 16.0,
        'time/rollout_s': 1.0,
      }
    lines.append(json.dumps(line))
  # A crash may have cut the last line short.
  (tmp_path / 'metrics.jsonl').write_text('\n'.join(lines) + '\n{"step": 9, "b')
  example = {'step': 0, 'batch': 0, 'prompt': 'a|b', 'text': 'c', 'reward': 1.0}
  (tmp_path / 'examples.jsonl').write_text(json.dumps(example) + '\n' * 2)
  (tmp_path / 'evaluation').mkdir()
  for found in (
    evaluation(0, [1, 0, 0, 0, 0, 0, 0, 0]),
    evaluation(8, [0, 1, 1, 1, 1, 0, 1, 0]),
  ):
    path = tmp_path / 'evaluation' / f'step_{found["step"]:08d}.json'
    path.write_text(json.dumps(found))
  return tmp_path


def test_report_tells_gain_compute_and_every_metric(workdir):
  path = rl_report.write(workdir)
  text = path.read_text(encoding='utf-8')
  assert 'Held-out words, sampled: pass@1 12.5% before, 62.5% after' in text
  assert '(+50.0 points, 5.0 times), n 8.' in text
  assert 'RL took 40.0% of the FLOPs before it' in text
  assert '| before RL (pre-training, cold start) | 1.000e+03 |  |' in text
  assert '| training | 2.800e+02 | 70.0% |' in text
  assert '| samples a second while sampling | 16.0 |  |' in text
  assert '| entropy | 1 | 0.125 | 0.125 | 1 |' in text
  # What would end a cell of the table does not.
  assert 'a\\|b' in text
  page = path.with_suffix('.html').read_text(encoding='utf-8')
  assert page.count('data:image/png;base64,') == 3
  assert 'http' not in page.replace('https://', 'http').split('<style>')[0]
  reward = json.loads((workdir / 'report' / 'reward.json').read_text())
  assert reward['axis'] == 'compute/rl_over_pretraining'
  assert reward['reward']['reward/words']['x'] == pytest.approx(
    [0.05, 0.15, 0.25, 0.35]
  )
  ends = reward['held_out']['words/sampled']
  assert ends['x'] == pytest.approx([0.0, 0.4])
  assert ends['y'] == [0.125, 0.625]


def test_gain_has_the_paired_interval_of_its_differences(workdir):
  (gain,) = rl_report.collect(workdir)['gains']
  differences = np.array([-1, 1, 1, 1, 1, 0, 1, 0])
  assert gain['gain'] == differences.mean()
  error = 1.959964 * differences.std(ddof=1) / np.sqrt(8)
  assert gain['gain_error'] == pytest.approx(error)
  assert gain['ratio'] == 5.0


def test_report_refuses_accuracies_on_different_problems(workdir):
  other = evaluation(8, [0] * 8, problems=[f'q{i}' for i in range(8)])
  path = workdir / 'evaluation' / 'step_00000008.json'
  path.write_text(json.dumps(other))
  with pytest.raises(ValueError, match=r'words was asked other problems'):
    rl_report.write(workdir)


def test_report_of_a_directory_without_steps_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r'found no steps in'):
    rl_report.write(tmp_path)
