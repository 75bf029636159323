"""tokamax's Mosaic GPU kernels, in jax."""

import gc
import importlib
import time

import jax
import jax.numpy as jnp
import numpy as np

tokamax = importlib.import_module('tokamax')


def seconds(run) -> float:
  """A queue of calls, as our own implementations are timed."""
  begin = time.perf_counter()
  jax.block_until_ready(run())
  once = time.perf_counter() - begin
  calls = max(1, min(50, int(0.02 / max(once, 1e-6))))
  begin = time.perf_counter()
  result = None
  for _ in range(calls):
    result = run()
  jax.block_until_ready(result)
  return (time.perf_counter() - begin) / calls


def free() -> None:
  """Drops arrays; the process keeps their memory for the next."""
  gc.collect()


def grouped_matmul(spec, direction):
  rows, experts = spec['num_rows'], spec['num_experts']
  depth, width = spec['input_dim'], spec['output_dim']
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (rows, depth), jnp.bfloat16)
  w = jax.random.normal(keys[1], (experts, depth, width), jnp.bfloat16)
  if spec['has_equal_groups']:
    sizes = np.full(experts, rows // experts)
  else:
    even = np.full(experts, 1 / experts)
    sizes = np.random.default_rng(0).multinomial(rows, even)
  groups = jnp.asarray(sizes, jnp.int32)

  def forward(x, w):
    return tokamax.ragged_dot(x, w, groups, implementation='mosaic_gpu')

  return _case(forward, direction, x, w)


def dense_attention(spec, direction):
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = [
    (spec['batch'], spec[length], spec['num_heads'], spec[width])
    for length, width in (
      ('num_queries', 'width'),
      ('num_keys', 'width'),
      ('num_keys', 'value_width'),
    )
  ]
  arguments = [
    jax.random.normal(key, shape, jnp.bfloat16)
    for key, shape in zip(keys, shapes, strict=True)
  ]

  def forward(q, k, v):
    return tokamax.dot_product_attention(
      q, k, v, is_causal=True, implementation='mosaic_gpu'
    )

  return _case(forward, direction, *arguments)


def _case(forward, direction, *arguments):
  def gradients(d_out, *arguments):
    out, pullback = jax.vjp(forward, *arguments)
    # The output too, or the compiler leaves the forward pass out.
    return out, pullback(d_out)

  if direction == 'forward':
    run = jax.jit(forward)
    return {'run': lambda: run(*arguments)}
  out = jax.eval_shape(forward, *arguments)
  d_out = jax.random.normal(jax.random.key(1), out.shape, out.dtype)
  run = jax.jit(gradients)
  return {'run': lambda: run(d_out, *arguments)}


CASES = {'grouped_matmul': grouped_matmul, 'dense_attention': dense_attention}
