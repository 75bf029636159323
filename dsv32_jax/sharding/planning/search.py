"""Every mesh of a number of GPUs, its plan, and which are best."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dsv32_jax.sharding.planning import request
from dsv32_jax.sharding.planning.plan import Plan, make_plan
from dsv32_jax.sharding.rules import MESH_AXES, RULE_SETS

TRAINING_RULES = tuple(
  name for name in RULE_SETS if not name.startswith('decode')
)

# Without rematerialisation no layer of V3.2 fits.
REMATS = ('full', 'save_attention')


def meshes(gpus: int, rules: str) -> Iterator[dict[str, int]]:
  """All ways to cut a number of GPUs into the axes that rules use."""
  names = [
    name
    for name in MESH_AXES
    if name == 'data' or name in RULE_SETS[rules].used
  ]
  divisors = [n for n in range(1, gpus + 1) if gpus % n == 0]
  for head in itertools.product(divisors, repeat=len(names) - 1):
    product = 1
    for size in head:
      product *= size
    if gpus % product == 0:
      yield dict(zip(names, (*head, gpus // product), strict=True))


def search(
  gpus: int,
  *,
  rules: Sequence[str] = TRAINING_RULES,
  remats: Sequence[str] = REMATS,
  options: Mapping[str, Any],
) -> list[Plan]:
  """Plans of all meshes, rules, micro-batches and remat policies.

  Args:
    gpus: how many.
    rules: rule sets to try.
    remats: remat policies to try.
    options: the other arguments of `request.make`.

  Returns:
    All that the rules can divide, those that fit first, fastest first.
  """
  plans = []
  for name in rules:
    for sizes in meshes(gpus, name):
      for remat in remats:
        plans += _plans(
          {**options, 'rules': name, 'sizes': sizes, 'remat': remat}
        )
  return sorted(plans, key=lambda p: (not p.memory.fits, p.step_seconds))


def _plans(options: Mapping[str, Any]) -> Iterator[Plan]:
  """One layout with every number of micro-batches, from fewest rows up.

  More rows at a time need more memory: the first that does not fit is the last.
  """
  try:
    asked = request.make(**options)
  except ValueError:
    return  # These rules cannot cut this model or batch over this mesh.
  most = asked.stage.micro_batches
  for micro in range(most, 0, -1):
    if most % micro:
      continue
    try:
      part: dict[str, Any] = {**options, 'micro_batches': micro}
      plan = make_plan(request.make(**part))
    except ValueError:
      return
    yield plan
    if not plan.memory.fits:
      return


def checked(gpus: int | None, options: Mapping[str, Any]) -> list[Plan]:
  """`search` of what a user asks for.

  Raises:
    ValueError: no number of GPUs, unknown options, or a model that no rules can
      cut over so many GPUs.
  """
  if gpus is None or gpus < 1:
    raise ValueError(f'gpus: got {gpus}, expected a number of H100s to search')
  # What is wrong on one device is the user's mistake, not a mesh's.
  whole: dict[str, Any] = {**options, 'rules': 'fsdp', 'sizes': {}}
  request.make(**whole)
  plans = search(gpus, options=options)
  if not plans:
    raise ValueError(
      f'gpus: got {gpus}, expected a number that some mesh can divide the '
      f'model and the batch over; no rules of {", ".join(TRAINING_RULES)} can'
    )
  return plans


def best(options: Mapping[str, Any]) -> Plan:
  """A layout with the number of micro-batches that is fastest, if any fits.

  Args:
    options: arguments of `request.make`; `micro_batches`, if given, is kept.

  Raises:
    ValueError: as `request.make` and `make_plan` do.
  """
  first = make_plan(request.make(**options))
  if options.get('micro_batches') is not None:
    return first
  fitting = [one for one in _plans(options) if one.memory.fits]
  return min(fitting, key=lambda one: one.step_seconds, default=first)


def recipe(plan: Plan, options: Mapping[str, Any]) -> list[Plan]:
  """Plans of both stages of the paper: this one, and the other stage's.

  The other stage takes the same mesh if its batch can be cut over it and it
  fits; else the best mesh of as many GPUs, if any fits.
  """
  kind = plan.request.stage.kind
  if kind not in request.STAGES:
    return []
  plans: dict[str, Plan] = {kind: plan}
  for other in request.STAGES:
    if other == kind:
      continue
    asked = {**options, 'stage': other, 'batch_size': None}
    sizes = {n: s for n, s in plan.request.sizes.items() if s > 1}
    candidates = []
    for remat in REMATS:
      same = {'rules': plan.request.rules, 'sizes': sizes, 'remat': remat}
      candidates += _plans({**asked, **same})
    if not any(one.memory.fits for one in candidates):
      candidates = search(
        plan.request.num_devices, rules=(plan.request.rules,), options=asked
      )
    fitting = [one for one in candidates if one.memory.fits]
    if fitting:
      plans[other] = min(fitting, key=lambda one: one.step_seconds)
  return [plans[name] for name in request.STAGES if name in plans]
