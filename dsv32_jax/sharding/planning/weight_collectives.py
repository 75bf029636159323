"""Collectives of weights: gathered before products, gradients summed and cut.

Routed experts and the embedding have regions of their own and are not here.
"""

import math
from collections.abc import Iterator

from dsv32_jax.sharding import axes
from dsv32_jax.sharding.planning.messages import (
  Planned,
  compute_itemsize,
  has_mtp,
  runs_mtp,
)
from dsv32_jax.sharding.planning.request import Request
from dsv32_jax.sharding.planning.weights import Weight
from dsv32_jax.training import stages


def weight_collectives(
  request: Request, weights: tuple[Weight, ...], stage: stages.Stage
) -> Iterator[Planned]:
  """Those of all matrices and vectors that a step uses.

  Args:
    request: the layout.
    weights: of `weights.build`.
    stage: which of them train.
  """
  parallel, sizes = request.parallel, request.sizes
  micro = request.stage.micro_batches
  tokens = parallel.axes_of(axes.BATCH) + parallel.axes_of(axes.SEQUENCE)
  for weight in weights:
    if weight.is_expert or weight.path[0] == 'embedding':
      continue  # They have regions of their own, see below.
    if not _is_used(weight, stage):
      continue
    over = weight.gathered(sizes)
    size = weight.product_itemsize(compute_itemsize(request))
    # One layer's, as one device holds it after the gather.
    whole = weight.size // weight.layers
    whole //= weight.cut(sizes) // math.prod(sizes[name] for name in over)
    name = _subject(weight)
    count = weight.layers * micro
    if over and not weight.is_vector:
      # Outside of the layers' loops one gather serves both directions; two
      # heads share it unless each has its part of the vocabulary.
      again = _is_gathered_again(weight, stage, request.model.remat)
      if weight.path[0] == 'lm_head' and parallel.axes_of(axes.VOCAB):
        again = has_mtp(request)
      yield Planned(
        subject=name,
        kind='all-gather',
        axes=over,
        bytes=whole * size,
        count=count * (1 + again),
        hides=True,
      )
    if not weight.trains:
      continue
    if weight.is_vector:
      yield from _vector_gradients(request, weight)
      continue
    rest = tuple(axis for axis in tokens if axis not in over)
    if weight.path[0] == 'lm_head' and runs_mtp(stage):
      # Each head's part is summed over devices before the two are added.
      count *= 1 + has_mtp(request)
    for kind, axes_, bytes_ in (
      ('reduce-scatter', over, whole),
      ('all-reduce', rest, whole // math.prod(sizes[axis] for axis in over)),
    ):
      yield Planned(
        subject=f'gradients of {name}',
        kind=kind,
        axes=axes_,
        bytes=bytes_ * size,
        count=count,
        hides=True,
      )


# Of a layer whose indexer alone trains, what its loss is made again from.
_WARMUP_AGAIN = {
  'none': (),
  'save_attention': ('w_dq', 'w_ik'),
  'full': (
    *('w_dq', 'w_dkv', 'w_kr', 'w_uq', 'w_qr', 'w_uk'),
    *('w_iq', 'w_ik', 'w_iw'),
  ),
}


def _is_used(weight: Weight, stage: stages.Stage) -> bool:
  """Whether a step multiplies with it: the warm-up ends with an attention."""
  if stage.lm_loss:
    return True
  if 'mtp' in weight.path:
    return bool({'attention', 'w_eh'} & set(weight.path))
  return weight.path[0] != 'lm_head'


def _is_gathered_again(weight: Weight, stage: stages.Stage, remat: str) -> int:
  """Whether a layer's backward pass gathers it a second time."""
  if 'main' in stage.trainable:
    return int(weight.in_block)
  again = 'attention' in weight.path and weight.path[-1] in _WARMUP_AGAIN[remat]
  return int(again)


def _vector_gradients(request: Request, weight: Weight) -> Iterator[Planned]:
  """Sums over tokens, first of a row's and then over rows, in float32."""
  for logical in (axes.SEQUENCE, axes.BATCH):
    yield Planned(
      subject='gradients of norms',
      kind='all-reduce',
      axes=request.parallel.axes_of(logical),
      bytes=4 * weight.size // weight.layers,
      count=weight.layers * request.stage.micro_batches,
      hides=True,
    )


def _subject(weight: Weight) -> str:
  if weight.path[0] == 'lm_head':
    return 'output head'
  if weight.is_vector:
    return 'norms'
  if 'attention' in weight.path:
    return 'attention'
  return 'other matrices'
