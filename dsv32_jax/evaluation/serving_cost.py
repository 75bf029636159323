"""Attention blocks as a server runs them, to be timed: sparse against dense.

The blocks are the model's own module over a cache that is full already, of
random rows. Both modes read the same memory: pages in any order for the sparse
one, whole rows for the dense one.

Letters: B requests, T new tokens of each, D hidden_size, A pages of all
requests, O tokens a page, N pages of a request, X latent row width,
I index_head_dim.
"""

import collections
import dataclasses
import functools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from dsv32_jax.config.model import DENSE, SPARSE, ModelConfig
from dsv32_jax.functional import latent_cache
from dsv32_jax.functional.normalization import rms_norm
from dsv32_jax.modules.attention_core import AttentionContext
from dsv32_jax.modules.dsa import DeepSeekSparseAttention
from dsv32_jax.modules.feed_forward import swiglu
from dsv32_jax.modules.moe import swiglu_experts
from pallas_kernels.benchmarks import costs, measure

MODES = ('sparse', 'dense')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
  """What is computed in one call.

  Attributes:
    cfg: the model.
    layers: attention blocks, one after the other.
    batch: B.
    cached: tokens that each request has in the cache.
    new: T; 1 in decoding.
    page_size: O.
    index_format: of cached indexer keys, 'compute' or 'fp8'.
  """

  cfg: ModelConfig
  layers: int
  batch: int
  cached: int
  new: int
  page_size: int = 64
  index_format: str = 'fp8'

  @property
  def capacity(self) -> int:
    """Tokens a request has room for: whole pages."""
    tokens = self.cached + self.new
    return -(-tokens // self.page_size) * self.page_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operands:
  """What a call is given.

  Attributes:
    params: of each block.
    caches: of each block, in pages.
    h_BTD: what goes into the first block.
    pages_BN: pages of each request, shuffled.
  """

  params: list[Any]
  caches: list[latent_cache.LatentCache]
  h_BTD: Array
  pages_BN: Array


def make(work: Workload, *, seed: int = 0) -> Operands:
  """Random weights, caches and tokens."""
  cfg = work.cfg
  N = work.capacity // work.page_size
  A = work.batch * N
  keys = jax.random.split(jax.random.key(seed), 2 * work.layers + 2)
  return Operands(
    params=[_make_block(key, cfg) for key in keys[: work.layers]],
    caches=[
      _make_cache(key, cfg, A, work.page_size, work.index_format)
      for key in keys[work.layers : -2]
    ],
    h_BTD=jax.random.normal(
      keys[-1],
      (work.batch, work.new, cfg.hidden_size),
      jnp.dtype(cfg.precision.compute),
    ),
    pages_BN=jax.random.permutation(
      keys[-2], jnp.arange(A, dtype=jnp.int32)
    ).reshape(work.batch, N),
  )


@functools.partial(jax.jit, static_argnames='cfg')
def _make_block(key: Array, cfg: ModelConfig) -> Any:
  one = Workload(cfg=cfg, layers=1, batch=1, cached=0, new=1)
  context = _context(one, jnp.zeros((1,), jnp.int32), None)
  h_BTD = jnp.zeros((1, 1, cfg.hidden_size), jnp.dtype(cfg.precision.compute))
  layer = DeepSeekSparseAttention(cfg, SPARSE)
  return nn.meta.unbox(layer.init(key, h_BTD, context)['params'])


@functools.partial(
  jax.jit, static_argnames=('cfg', 'areas', 'area_size', 'index_format')
)
def _make_cache(
  key: Array,
  cfg: ModelConfig,
  areas: int,
  area_size: int,
  index_format: str,
) -> latent_cache.LatentCache:
  empty = latent_cache.init(
    areas=areas,
    area_size=area_size,
    latent_dim=cfg.kv_lora_rank + cfg.qk_rope_head_dim,
    index_dim=cfg.index_head_dim,
    dtype=jnp.dtype(cfg.precision.compute),
    index_format=index_format,
  )
  of_latents, of_keys, of_scales = jax.random.split(key, 3)

  def random(key: Array, old: Array, spread: float) -> Array:
    def page(key: Array) -> Array:
      x = spread * jax.random.normal(key, old.shape[1:])
      return x.astype(old.dtype)

    # Some at a time, so that no float32 copy of it all exists.
    return jax.lax.map(page, jax.random.split(key, areas), batch_size=1024)

  scale = empty.k_scale_AO
  if scale is not None:
    scale = jax.random.uniform(of_scales, scale.shape, minval=1 / 128)
  return latent_cache.LatentCache(
    random(of_latents, empty.latent_AOX, 1.0),
    # Float8 ends at 448.
    random(of_keys, empty.k_index_AOI, 1.0 if scale is None else 50.0),
    scale,
  )


def step(work: Workload, mode: str) -> Callable[..., tuple[Array, list]]:
  """The blocks as a function (params, caches, h_BTD, pages_BN).

  It returns (h_BTD, caches). Every block adds its output to its input,
  normalised first, and appends to its cache.

  Raises:
    ValueError: a mode that isn't among `MODES`.
  """
  if mode not in MODES:
    raise ValueError(f'mode: got {mode!r}, expected one of {MODES}')
  cfg = work.cfg
  attention = SPARSE
  if mode == 'dense':
    # A few queries read the latents themselves; many expand them first.
    attention = dataclasses.replace(DENSE, absorbed=work.new == 1)
  layer = DeepSeekSparseAttention(cfg, attention)
  paged = mode == 'sparse'
  length_B = jnp.full((work.batch,), work.cached, jnp.int32)

  def run(params, caches, h_BTD, pages_BN):
    after = []
    context = _context(work, length_B, pages_BN if paged else None)
    for variables, cache in zip(params, caches, strict=True):
      shapes = jax.tree.map(lambda x: x.shape, cache)
      if not paged:
        cache = jax.tree.map(lambda x: _in_rows(x, work), cache)
      scale_D = jnp.ones((cfg.hidden_size,), jnp.float32)
      u_BTD, aux = layer.apply(
        {'params': variables},
        rms_norm(h_BTD, scale_D, epsilon=cfg.rms_norm_eps),
        context,
        cache,
      )
      h_BTD = h_BTD + u_BTD
      after.append(
        jax.tree.map(
          lambda x, shape: x.reshape(shape),
          aux.cache,
          shapes,
          is_leaf=lambda x: isinstance(x, jax.Array),
        )
      )
    return h_BTD, after

  return run


def _in_rows(x_AO: Array, work: Workload) -> Array:
  return x_AO.reshape(work.batch, work.capacity, *x_AO.shape[2:])


def _context(
  work: Workload, length_B: Array, pages_BN: Array | None
) -> AttentionContext:
  positions_BT = length_B[:, None] + jnp.arange(work.new, dtype=jnp.int32)[None]
  return AttentionContext(
    positions_BT=positions_BT,
    key_start_BT=jnp.zeros_like(positions_BT),
    key_end_BT=positions_BT + 1,
    row_weight_BT=jnp.zeros(positions_BT.shape, jnp.float32),
    cache_length_B=length_B,
    pages_BN=pages_BN,
  )


@dataclasses.dataclass
class Program:
  """One compiled mode, called over and over with its own last caches."""

  run: Callable[..., tuple[Array, list]]
  work: Workload

  @classmethod
  def build(cls, work: Workload, mode: str, operands: Operands) -> 'Program':
    arguments = (
      operands.params,
      operands.caches,
      operands.h_BTD,
      operands.pages_BN,
    )
    jitted = jax.jit(step(work, mode), donate_argnums=1)
    return cls(jitted.lower(*arguments).compile(), work)

  def calls(self, operands: Operands, count: int) -> tuple[Array, Operands]:
    """Calls it a few times; the operands given are used up."""
    caches, h_BTD = operands.caches, operands.h_BTD
    for _ in range(count):
      h_BTD, caches = self.run(
        operands.params, caches, operands.h_BTD, operands.pages_BN
      )
    jax.block_until_ready((h_BTD, caches))
    return h_BTD, dataclasses.replace(operands, caches=caches)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
  """Times of one mode.

  Attributes:
    seconds: of a call, the median of the rounds.
    rounds: of each round.
    finite: whether every output was.
  """

  seconds: float
  rounds: list[float]
  finite: bool


def alternate(
  programs: Mapping[str, Program],
  operands: Operands,
  *,
  rounds: int,
  calls: int,
) -> tuple[dict[str, Timing], Operands]:
  """Times the modes in turns, so that what changes with time falls on all."""
  finite, times = {}, collections.defaultdict(list)
  for mode, program in programs.items():
    h_BTD, operands = program.calls(operands, 1)
    finite[mode] = bool(jnp.all(jnp.isfinite(h_BTD)))
  for _ in range(rounds):
    for mode, program in programs.items():
      begin = time.perf_counter()
      _, operands = program.calls(operands, calls)
      times[mode].append((time.perf_counter() - begin) / calls)
  timings = {
    mode: Timing(
      seconds=statistics.median(times[mode]),
      rounds=times[mode],
      finite=finite[mode],
    )
    for mode in programs
  }
  return timings, operands


def block_costs(work: Workload, mode: str) -> dict[str, costs.Cost]:
  """Least work of one block, part by part.

  Products and the bytes that have to move at least once: of weights and caches;
  of scores and selections nothing, as they could stay on the chip.
  """
  cfg, B, T = work.cfg, work.batch, work.new
  H, J, I = cfg.num_attention_heads, cfg.index_n_heads, cfg.index_head_dim
  C, R, N, U = (
    cfg.kv_lora_rank,
    cfg.qk_rope_head_dim,
    cfg.qk_nope_head_dim,
    cfg.v_head_dim,
  )
  D, Q = cfg.hidden_size, cfg.q_lora_rank or cfg.hidden_size
  size = jnp.dtype(cfg.precision.compute).itemsize
  seen = work.cached + T
  pairs = B * costs.causal_pairs(T, seen)
  weights = Q * H * (N + R) + D * (C + R) + C * H * (N + U) + H * U * D
  if cfg.q_lora_rank is not None:
    weights += D * Q
  absorbed = mode == 'sparse' or T == 1
  if mode == 'sparse':
    weights += Q * J * I + D * (I + J)
  tokens = B * T
  activations = 2 * tokens * D * size
  found = {
    'projections': costs.Cost(
      2 * tokens * weights, weights * size + activations
    )
  }
  if mode == 'dense' and not absorbed:
    # The keys of every head, of tokens that were cached before too.
    expanded = C * H * (N + U)
    found['expanded keys'] = costs.Cost(2 * B * work.cached * expanded, 0)
    found['attention'] = costs.Cost(
      2 * pairs * H * (N + R + U), B * seen * (C + R) * size
    )
    return found
  if mode == 'dense':
    found['attention'] = costs.Cost(
      2 * pairs * H * (2 * C + R), B * seen * (C + R) * size
    )
    return found
  fp8 = work.index_format == 'fp8'
  found['index scores'] = costs.Cost(
    2 * pairs * J * I,
    B * seen * (I + 4 if fp8 else I * size),
    2 if fp8 else 1,
  )
  chosen = B * costs.limited_pairs(T, seen, cfg.index_topk)
  rows = min(chosen, B * seen)
  found['attention'] = costs.Cost(
    2 * chosen * H * (2 * C + R), rows * (C + R) * size
  )
  return found


def kernel_seconds(call: Callable[[], Any]) -> dict[str, float]:
  """Seconds of each GPU kernel by name, longest first; empty without a GPU."""
  found: dict[str, float] = collections.defaultdict(float)
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      jax.block_until_ready(call())
    files = sorted(pathlib.Path(folder).rglob('*.xplane.pb'))
    for plane in jax.profiler.ProfileData.from_file(str(files[-1])).planes:
      if not plane.name.startswith('/device:GPU'):
        continue
      for line in plane.lines:
        if line.name.startswith('Stream'):
          for event in line.events:
            found[event.name] += 1e-9 * (event.end_ns - event.start_ns)
  return dict(sorted(found.items(), key=lambda item: -item[1]))


def experts_seconds(
  cfg: ModelConfig, *, tokens: int, experts: int, rounds: int = 5
) -> float:
  """Time of the experts of one layer on one GPU, and of the shared ones.

  Args:
    cfg: the model.
    tokens: of this GPU. With as many on every GPU of the group that shares the
      experts out, its own get `num_experts_per_tok` rows a token, evenly.
    experts: routed ones that are here.
    rounds: of which the median is returned.
  """
  D, F = cfg.hidden_size, cfg.moe_intermediate_size
  shared_F = cfg.n_shared_experts * F
  dtype = jnp.dtype(cfg.precision.compute)
  rows = -(-tokens * cfg.num_experts_per_tok // experts) * experts
  shapes = (
    ((rows, D), 1.0),
    ((experts, D, F), D**-0.5),
    ((experts, D, F), D**-0.5),
    ((experts, F, D), F**-0.5),
    ((tokens, D), 1.0),
    ((D, shared_F), D**-0.5),
    ((D, shared_F), D**-0.5),
    ((shared_F, D), F**-0.5),
  )

  @jax.jit
  def make_all():
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [
      (scale * jax.random.normal(key, shape)).astype(dtype)
      for key, (shape, scale) in zip(keys, shapes, strict=True)
    ]

  sizes_E = jnp.full((experts,), rows // experts, jnp.int32)

  @jax.jit
  def run(x_MD, w_gate, w_up, w_down, x_TD, s_gate, s_up, s_down):
    routed_MD = swiglu_experts(x_MD, (w_gate, w_up, w_down), sizes_E)
    shared_TF = swiglu(x_TD @ s_gate, x_TD @ s_up)
    return routed_MD, shared_TF @ s_down

  arrays = make_all()
  jax.block_until_ready(run(*arrays))
  return statistics.median(measure.seconds(run, *arrays) for _ in range(rounds))
