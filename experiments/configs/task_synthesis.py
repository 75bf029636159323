r"""Task sets of the agentic families.

Paper: arXiv:2512.02556, section 3.2 and table 1: 1,827 environments with 4,417
general-agent tasks.

    python experiments/synthesize_tasks.py --workdir=runs/tasks \
      --config=experiments/configs/task_synthesis.py:sample

Presets:
  smoke   24 tasks in 12 environments, each domain once. Seconds.
  sample  200 tasks in 84 environments. Under two minutes on two cores.
  paper   the paper's numbers.
Two of the twelve domains are held out in each.
"""

from dsv32_jax.agents.synthesis.pipeline import FamilyPlan, PipelineConfig
from dsv32_jax.training import flags

HELD_OUT = ('clinic_appointments', 'software_releases')


def get_config(preset: str = 'sample'):
  """The ConfigDict of a preset; see the module's docstring."""
  known = {'smoke': (12, 24), 'sample': (84, 200), 'paper': (1827, 4417)}
  if preset not in known:
    raise ValueError(f'preset: got {preset!r}, expected one of {list(known)}')
  environments, tasks = known[preset]
  plan = FamilyPlan(environments=environments, tasks=tasks, held_out=HELD_OUT)
  return flags.to_config_dict(PipelineConfig(families={'general': plan}))
