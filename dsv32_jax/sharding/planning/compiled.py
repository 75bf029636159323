r"""The plan against the program: a train step compiled for virtual devices.

The step that training runs is lowered with shapes in the place of arrays and
compiled for as many virtual CPU devices as the mesh has, in a process of its
own (their number is fixed when jax starts). Nothing is allocated. Its arguments
are compared with the planned state, its collectives with the planned ones.

Layers are loops, so all 61 compile as fast as two. (One of a kind is no loop:
XLA then keeps what a loop gathers again.)

  python -m dsv32_jax.sharding.planning.compiled '{"preset": ...}'
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.sharding import mesh, specs
from dsv32_jax.sharding import parallel as parallel_lib
from dsv32_jax.sharding.parallel import Parallel
from dsv32_jax.sharding.planning import collectives, hlo, request, weights
from dsv32_jax.sharding.planning.request import Request
from dsv32_jax.training import compiled_step, optimizer, stages, step
from dsv32_jax.training import state as state_lib
from dsv32_jax.training.batch import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
  """What was planned and what was compiled, in bytes of one device.

  Attributes:
    state: (planned, compiled) arguments: parameters, biases, optimizer state.
    by_kind: (planned, compiled) of each kind of collective, a step.
    seconds: that lowering and compiling took.
    found: the program's collectives, largest first.
  """

  state: tuple[int, int]
  by_kind: Mapping[str, tuple[int, int]]
  seconds: float
  found: list[Any]


def compare(options: Mapping[str, Any], *, timeout: int = 600) -> Comparison:
  """Compiles a request in a process of its own, and compares.

  Args:
    options: what `request.make` takes; beside these `layers`, a number of dense
      and of MoE layers and whether there is an MTP module, instead of all;
      `compute_dtype`, the type of products; `dump`, a file for the program.
    timeout: seconds.

  Raises:
    RuntimeError: with the end of the process's messages, if it fails.
  """
  devices = 1
  for size in options['sizes'].values():
    devices *= size
  environment = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
  }
  done = subprocess.run(
    (sys.executable, '-m', __name__, json.dumps(dict(options))),
    env=environment,
    capture_output=True,
    text=True,
    check=False,
    timeout=timeout,
  )
  if done.returncode:
    raise RuntimeError(f'compiling the step failed: {done.stderr[-2000:]}')
  values = json.loads(done.stdout.splitlines()[-1])
  return Comparison(
    state=tuple(values['state']),
    by_kind={k: tuple(v) for k, v in values['by_kind'].items()},
    seconds=values['seconds'],
    found=values['found'],
  )


def report(options: Mapping[str, Any], *, timeout: int = 600) -> list[str]:
  """`compare` as text, with products in float32.

  The CPU backend multiplies no bfloat16: it would gather what it converted.
  """
  result = compare({'compute_dtype': 'float32', **options}, timeout=timeout)
  planned, compiled = result.state
  lines = [
    f'compiled in {result.seconds:.0f} s, products in float32',
    f'parameters and optimizer state, bytes a device: planned {planned:,}, '
    f'compiled {compiled:,}',
    'collectives, bytes a device and step:',
  ]
  for kind, (planned, compiled) in sorted(result.by_kind.items()):
    share = f'{compiled / planned:.4f}' if planned else 'not planned'
    lines.append(f'  {kind:18s} {planned:18,} {compiled:18,} {share}')
  return lines


def shrunk(asked: Request, dense: int, moe: int, mtp: bool) -> Request:
  """A request with so many layers, at full width."""
  return dataclasses.replace(
    asked,
    model=dataclasses.replace(
      asked.model,
      num_hidden_layers=dense + moe,
      first_k_dense_replace=dense,
      num_nextn_predict_layers=int(mtp),
    ),
  )


def lower(asked: Request) -> Any:
  """The compiled step of a request, for this process's devices."""
  sizes = dict(asked.sizes)
  parallel = Parallel(
    mesh.make_mesh(sizes, jax.devices()[: asked.num_devices]),
    asked.parallel.rules,
  )
  model = DeepSeekV32(asked.model)
  stage = stages.build(asked.stage, asked.model)
  tx = optimizer.build(asked.stage, stage)
  with parallel_lib.use(parallel):
    variables = state_lib.variable_shapes(model, parallel)
    state = jax.eval_shape(
      lambda variables: state_lib.create(variables, stage, tx), variables
    )
    trainable, _ = optimizer.split(variables['params'], stage)
    state = dataclasses.replace(
      state,
      step=_placed(state.step, compiled_step.whole(parallel)),
      params=variables['params'],
      router_bias=variables['router_bias'],
      opt_state=jax.tree.map(
        _placed,
        state.opt_state,
        specs.mirrored(state.opt_state, trainable, parallel),
      ),
    )
    data = asked.stage.data
    rows = specs.rows(parallel, 2)
    ids, weight = (
      jax.ShapeDtypeStruct(
        (data.batch_size, data.seq_len), dtype, sharding=rows
      )
      for dtype in (jnp.int32, jnp.float32)
    )
    batch = Batch(ids, ids, weight, ids, ids)
    whole = compiled_step.whole(parallel)
    finite = jax.ShapeDtypeStruct((), jnp.bool_, sharding=whole)
    key: Any = _placed(jax.eval_shape(lambda: jax.random.key(0)), whole)
    step_fn = step.make_train_step(
      model, stage, tx, specs.of_leaves(variables['params'])
    )
    return compiled_step.compile_step(step_fn, (state, finite), batch, key)


def _placed(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def worker(options: dict[str, Any]) -> dict[str, Any]:
  """What the process of `compare` prints."""
  layers = options.pop('layers', None)
  compute = options.pop('compute_dtype', None)
  dump = options.pop('dump', None)
  asked = request.make(**options)
  if layers is not None:
    asked = shrunk(asked, *layers)
  if compute:
    precision = dataclasses.replace(asked.model.precision, compute=compute)
    asked = dataclasses.replace(
      asked, model=dataclasses.replace(asked.model, precision=precision)
    )
  planned = weights.build(asked)
  began = time.perf_counter()
  compiled = lower(asked)
  seconds = time.perf_counter() - began
  text = compiled.as_text()
  if dump:
    with open(dump, 'w', encoding='utf-8') as file:
      file.write(text)
  found = hlo.collectives(text, asked.sizes, unknown_trips=0)
  messages = collectives.plan(asked, planned.weights)
  by_kind: dict[str, list[int]] = {}
  for message in messages:
    by_kind.setdefault(message.kind, [0, 0])[0] += message.total
  for kind, total in hlo.totals(found).items():
    by_kind.setdefault(kind, [0, 0])[1] = total
  return {
    'state': [
      specs.bytes_a_device((planned.variables, planned.opt_state)),
      # `step` is the one leaf of the state that is neither.
      hlo.argument_bytes(text, 'carry[0]') - 4,
    ],
    'by_kind': by_kind,
    'seconds': seconds,
    'found': [
      dataclasses.asdict(one)
      for one in sorted(found, key=lambda one: -one.total)
    ],
  }


if __name__ == '__main__':
  print(json.dumps(worker(json.loads(sys.argv[1]))))
