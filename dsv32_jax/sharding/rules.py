"""Named rule sets: which mesh axes each logical axis is cut over.

A rule set names, for every logical axis of `axes`, mesh axes in order; what
isn't named is whole. Within one array a mesh axis is used once: dims listed in
`_FIRST` choose first, the others take what is left. So `embed` over (fsdp,
expert) means fsdp alone in a weight whose experts are already over `expert`.

Source of the axes: DeepSeek-V3 report (arXiv:2412.19437) section 3.2 for
experts; design of the logical names as in flax.linen.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from dsv32_jax.sharding import axes

MESH_AXES = ('data', 'fsdp', 'context', 'expert', 'tensor')
"""Outermost first: `tensor` neighbours talk most and sit closest, then those
that exchange tokens (`expert`), then those that gather keys (`context`)."""

# These dims have one mesh axis that makes sense; others are cut to save memory.
_FIRST = (axes.BATCH, axes.SEQUENCE, axes.EXPERTS, axes.HEADS, axes.MLP,
          axes.EXPERT_MLP, axes.VOCAB)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RuleSet:
  """One way to lay a model out.

  Attributes:
    name: how a config chooses it.
    mesh_axes: of each logical axis, outermost first.
  """

  name: str
  # A dict has no hash; the name tells sets apart.
  mesh_axes: Mapping[str, tuple[str, ...]] = dataclasses.field(hash=False)

  def __post_init__(self):
    for logical, names in self.mesh_axes.items():
      if logical not in axes.LOGICAL_AXES:
        raise ValueError(f'rules {self.name!r}: unknown logical axis {logical}')
      for name in names:
        if name not in MESH_AXES:
          raise ValueError(f'rules {self.name!r}: unknown mesh axis {name}')

  @property
  def used(self) -> frozenset[str]:
    """Mesh axes that any logical axis is cut over."""
    return frozenset(
      name for names in self.mesh_axes.values() for name in names
    )

  def spec(self, logical_axes: Sequence[str | None]) -> PartitionSpec:
    """The partition of an array whose dims have these logical axes."""
    taken: set[str] = set()
    entries: list[Any] = [None] * len(logical_axes)
    order = sorted(
      range(len(logical_axes)), key=lambda i: logical_axes[i] not in _FIRST
    )
    for i in order:
      logical = logical_axes[i]
      if logical is None:
        continue
      names = tuple(
        name for name in self.mesh_axes.get(logical, ()) if name not in taken
      )
      taken.update(names)
      entries[i] = names[0] if len(names) == 1 else (names or None)
    return PartitionSpec(*entries)


_TENSOR = dict.fromkeys((axes.HEADS, axes.MLP, axes.VOCAB), ('tensor',))


def _cut_weights(*names: str) -> dict[str, tuple[str, ...]]:
  """Cuts every matrix: each has one of these dims."""
  return dict.fromkeys((axes.EMBED, axes.Q_LATENT, axes.KV_LATENT), names)


RULE_SETS = {
  rules.name: rules
  for rules in (
    RuleSet('fsdp', {axes.BATCH: ('data', 'fsdp'), **_cut_weights('fsdp')}),
    RuleSet(
      'fsdp_expert',
      {
        axes.BATCH: ('data', 'fsdp', 'expert'),
        axes.EXPERTS: ('expert',),
        **_cut_weights('fsdp', 'expert'),
      },
    ),
    RuleSet(
      'fsdp_expert_context',
      {
        axes.BATCH: ('data', 'fsdp', 'expert'),
        axes.SEQUENCE: ('context',),
        axes.EXPERTS: ('expert',),
        **_cut_weights('fsdp', 'expert', 'context'),
      },
    ),
    RuleSet(
      'fsdp_tensor_expert',
      {
        axes.BATCH: ('data', 'fsdp', 'expert'),
        axes.EXPERTS: ('expert',),
        axes.EXPERT_MLP: ('tensor',),
        **_TENSOR,
        **_cut_weights('fsdp', 'expert'),
      },
    ),
    # No optimizer state to spread: weights whole but for experts and heads.
    RuleSet(
      'decode_expert',
      {
        axes.BATCH: ('data', 'expert'),
        axes.EXPERTS: ('expert',),
        **_TENSOR,
      },
    ),
  )
}


def check_divides(
  rules: RuleSet,
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
  shape: Sequence[int],
  logical_axes: Sequence[str | None],
  *,
  what: str,
) -> None:
  """Refuses a dimension that its mesh axes cannot divide.

  Raises:
    ValueError: naming the array, the axis, the dimension and both numbers.
  """
  spec = rules.spec(logical_axes)
  for logical, size, names in zip(logical_axes, shape, spec, strict=True):
    names = (names,) if isinstance(names, str) else (names or ())
    parts = math.prod(mesh.shape[name] for name in names)
    if size % parts:
      raise ValueError(
        f'{what}: dimension {logical!r} of size {size} is not divisible by the '
        f'{parts} devices of mesh axes {", ".join(names)} (rules '
        f'{rules.name!r}); choose other sizes or rules'
      )
