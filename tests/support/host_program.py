"""A program of several processes without a model: `python -m ... MODE`.

The other arguments are flags of `dsv32_jax.training.flags.define_hosts`.
"""

import time
from typing import Any

from dsv32_jax.sharding.hosts import agreement
from dsv32_jax.training import flags

STEPS = 2000


def main(argv: list[str]) -> None:
  del argv
  mode = _MODE.value
  index, count = agreement.process()
  print(f'process {index} of {count} in mode {mode}')
  if mode == 'all_fail':
    raise ValueError('seed: got 3, expected 4')
  if mode == 'main_fails':
    agreement.from_main(lambda: int('x'))
  if mode == 'one_differs':
    agreement.check_same('corpus', str(index))
  if mode == 'one_fails' and index == 1:
    raise TypeError('a bug')
  if mode == 'devices':
    print(f'{_sum_over_devices():g} from all devices')
    return
  shared = agreement.from_main(lambda: {'by': index, 'pair': (1, 2)})
  assert shared == {'by': 0, 'pair': [1, 2]}
  with agreement.interrupts() as interrupts:
    for step in range(1, STEPS):
      agreement.barrier('step')
      if step == 1:
        print('running', flush=True)
      if interrupts.check():
        raise SystemExit(f'process {index} stops after step {step}')
      time.sleep(0.01)


def _sum_over_devices() -> Any:
  import jax
  import jax.numpy as jnp
  from jax.sharding import NamedSharding, PartitionSpec

  mesh = jax.make_mesh((jax.device_count(),), ('all',))
  ones = jax.make_array_from_callback(
    (jax.device_count(),),
    NamedSharding(mesh, PartitionSpec('all')),
    lambda index: jnp.ones(1),
  )
  total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))
  return float(total(ones))


if __name__ == '__main__':
  from absl import flags as absl_flags

  _MODE = absl_flags.DEFINE_string('mode', 'run', 'What happens.')
  flags.run(main, hosts=flags.define_hosts())
