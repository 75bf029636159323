"""A public kernel beside ours, as a worker process of `bench_kernels.py`.

  python kernel_worker.py '{"rival": "torch", "op": "select_topk", "direction":
    "forward", "dtype": "bfloat16", "spec": {...}}'

Prints {"ready": true} once the kernel ran, or {"error": why not}; then, for
each line of standard input, {"seconds": time of one call}. Inputs are random,
of the shape that the spec gives (`arg_specs` of the op).
"""

import importlib
import json
import statistics
import sys
import time


def main() -> None:
  request = json.loads(sys.argv[1])
  make = RIVALS.get((request['rival'], request['op']))
  try:
    if make is None:
      raise NotImplementedError(
        f'{request["rival"]} has no {request["op"]} among these adapters'
      )
    run, clock, *remark = make(request['spec'], request['direction'])
    run()
  except Exception as error:  # What a rival lacks is its own affair.
    print(json.dumps({'error': f'{type(error).__name__}: {error}'[:300]}))
    return
  print(json.dumps({'ready': True, 'remark': ''.join(remark)}), flush=True)
  for _ in sys.stdin:
    print(json.dumps({'seconds': clock(run)}), flush=True)


def torch_seconds(run) -> float:
  """Median of single calls between CUDA events."""
  import torch

  if not torch.cuda.is_available():
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
  run()
  times = []
  for _ in range(7):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    times.append(begin.elapsed_time(end) * 1e-3)
  return statistics.median(times)


def jax_seconds(run) -> float:
  """A queue of calls, as our own implementations are timed."""
  import jax

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


def need_cuda():
  import torch

  if not torch.cuda.is_available():
    raise NotImplementedError('torch sees no CUDA device')
  return torch


def random_indices(torch, queries: int, keys: int, k: int):
  """Distinct keys of each query; the last queries see nearly all of them."""
  out = torch.empty(queries, k, dtype=torch.int32, device='cuda')
  for i in range(0, queries, 512):
    n = min(512, queries - i)
    scores = torch.rand(n, keys, device='cuda')
    out[i : i + n] = scores.topk(k, dim=-1, sorted=False).indices.int()
  return out


def topk_torch(spec, direction):
  import torch

  del direction
  indexer = spec['indexer']
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  shape = indexer['batch'], indexer['queries'], indexer['keys']
  scores = torch.randn(shape, device=device)
  k = min(spec['k'], indexer['keys'])
  return lambda: torch.topk(scores, k, dim=-1), torch_seconds


def grouped_tokamax(spec, direction):
  import jax
  import jax.numpy as jnp
  import numpy as np

  tokamax = importlib.import_module('tokamax')

  sizes = (spec['num_rows'], spec['input_dim'])
  experts, out = spec['num_experts'], spec['output_dim']
  x = jax.random.normal(jax.random.key(0), sizes, jnp.bfloat16)
  w = jax.random.normal(
    jax.random.key(1), (experts, sizes[1], out), jnp.bfloat16
  )
  groups = jnp.asarray(
    np.random.default_rng(0).multinomial(
      sizes[0], np.full(experts, 1 / experts)
    ),
    jnp.int32,
  )

  def forward(x, w):
    return tokamax.ragged_dot(x, w, groups, implementation='mosaic_gpu')

  return jax_run(forward, direction, x, w)


def attention_tokamax(spec, direction):
  import jax
  import jax.numpy as jnp

  tokamax = importlib.import_module('tokamax')

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

  return jax_run(forward, direction, *arguments)


def jax_run(forward, direction, *arguments):
  import jax

  def gradients(*arguments):
    out, pullback = jax.vjp(forward, *arguments)
    return pullback(out)

  run = jax.jit(forward if direction == 'forward' else gradients)
  return lambda: run(*arguments), jax_seconds


def first_module(*names):
  """The first of some packages that is there."""
  for name in names[:-1]:
    try:
      return importlib.import_module(name)
    except ImportError:
      pass
  return importlib.import_module(names[-1])


def import_deep_gemm():
  """By itself, or as vLLM ships it."""
  return first_module('deep_gemm', 'vllm.third_party.deep_gemm')


def grouped_deep_gemm(spec, direction):
  torch, deep_gemm = need_cuda(), import_deep_gemm()
  del direction
  rows, experts = spec['num_rows'], spec['num_experts']
  depth, width = spec['input_dim'], spec['output_dim']
  options = {'device': 'cuda', 'dtype': torch.bfloat16}
  x = torch.randn(rows, depth, **options)
  w = torch.empty(experts, width, depth, **options)
  for expert in w:
    expert.normal_()
  y = torch.empty(rows, width, **options)
  expert_of_row = torch.arange(experts, device='cuda', dtype=torch.int32)
  expert_of_row = expert_of_row.repeat_interleave(rows // experts)

  def run():
    deep_gemm.m_grouped_bf16_gemm_nt_contiguous(x, w, y, expert_of_row)

  return run, torch_seconds, 'groups of equal size'


def indexer_deep_gemm(spec, direction):
  torch, deep_gemm = need_cuda(), import_deep_gemm()
  del direction
  queries, keys, heads = spec['queries'], spec['keys'], spec['heads']
  q = torch.randn(queries, heads, spec['dim'], device='cuda')
  k = torch.randn(keys, spec['dim'], device='cuda')
  q, k = (x.to(torch.float8_e4m3fn) for x in (q, k))
  k_scale = torch.ones(keys, device='cuda')
  w = torch.randn(queries, heads, device='cuda')
  start = torch.zeros(queries, dtype=torch.int32, device='cuda')
  end = torch.arange(queries, dtype=torch.int32, device='cuda')
  end = end + (keys - queries + 1)

  def run():
    deep_gemm.fp8_fp4_mqa_logits(
      (q, None),
      (k, k_scale),
      w,
      start,
      end,
      clean_logits=False,
      max_seqlen_k=0,
      logits_dtype=torch.float32,
    )

  return run, torch_seconds, 'fp8, one sequence'


def sparse_flash_mla(spec, direction):
  torch = need_cuda()
  del direction
  flash_mla = first_module(
    'flash_mla', 'vllm.third_party.flashmla.flash_mla_interface'
  )
  width = spec['latent_dim'] + spec['rope_dim']
  queries, keys = spec['num_queries'], spec['num_keys']
  options = {'device': 'cuda', 'dtype': torch.bfloat16}
  q = torch.randn(queries, spec['num_heads'], width, **options)
  kv = torch.randn(keys, 1, width, **options)
  indices = random_indices(torch, queries, keys, spec['topk'])
  indices = indices[:, None].contiguous()
  return (
    lambda: flash_mla.flash_mla_sparse_fwd(q, kv, indices, width**-0.5),
    torch_seconds,
    'one sequence, every query sees every key',
  )


def indexer_cudnn(spec, direction):
  torch = need_cuda()
  dsa = importlib.import_module('cudnn').DSA
  del direction
  queries, keys = spec['queries'], spec['keys']
  heads, dim = spec['heads'], spec['dim']
  options = {'device': 'cuda', 'dtype': torch.bfloat16}
  q = torch.randn(1, queries, heads, dim, **options)
  k = torch.randn(1, keys, 1, dim, **options)
  w = torch.randn(1, queries, heads, device='cuda')
  offset = torch.full((1,), keys - queries, dtype=torch.int32, device='cuda')
  out = torch.empty(1, queries, keys, device='cuda')

  def run():
    dsa.indexer_forward_wrapper(
      q, k, w, ratio=1, out=out, q_causal_offsets=offset, precision='bf16'
    )

  return run, torch_seconds, 'one sequence'


def sparse_cudnn(spec, direction):
  """Backward alone: Hopper's forward of this package is another's."""
  torch = need_cuda()
  dsa = importlib.import_module('cudnn').DSA
  del direction
  width = spec['latent_dim'] + spec['rope_dim']
  queries, keys = spec['num_queries'], spec['num_keys']
  heads, latent = spec['num_heads'], spec['latent_dim']
  options = {'device': 'cuda', 'dtype': torch.bfloat16}
  q = torch.randn(queries, heads, width, **options)
  kv = torch.randn(keys, width, **options)
  indices = random_indices(torch, queries, keys, spec['topk'])
  out, d_out = (torch.randn(queries, heads, latent, **options) for _ in 'ab')
  # Scores of variance 1: their mean log-sum-exp.
  level = torch.log(torch.tensor(float(spec['topk']))).item() + 0.5
  lse = torch.full((queries, heads), level, device='cuda')
  sink = torch.full((heads,), float('-inf'), device='cuda')

  def run():
    dsa.sparse_attention_backward_wrapper(
      q, kv, out, d_out, lse, sink, indices, softmax_scale=width**-0.5
    )

  return run, torch_seconds, 'backward alone'


def target_cudnn(spec, direction):
  torch = need_cuda()
  dsa = importlib.import_module('cudnn').DSA
  del direction
  queries, keys = spec['num_queries'], spec['num_keys']
  heads, width = spec['num_heads'], spec['width']
  options = {'device': 'cuda', 'dtype': torch.bfloat16}
  q = torch.randn(1, queries, heads, width, **options)
  kv = torch.randn(1, keys, width, **options)
  indices = random_indices(torch, queries, keys, spec['topk'])[None]
  lse = torch.full((1, queries, heads), 8.0, device='cuda')

  def run():
    dsa.sparse_attn_score_recompute_wrapper(
      q, kv, lse, indices.contiguous(), width**-0.5
    )

  return run, torch_seconds, 'target alone'


RIVALS = {
  ('torch', 'select_topk'): topk_torch,
  ('tokamax', 'grouped_matmul'): grouped_tokamax,
  ('tokamax', 'dense_attention'): attention_tokamax,
  ('deep_gemm', 'grouped_matmul'): grouped_deep_gemm,
  ('deep_gemm', 'lightning_indexer'): indexer_deep_gemm,
  ('flash_mla', 'sparse_mla_attention'): sparse_flash_mla,
  ('cudnn_dsa', 'lightning_indexer'): indexer_cudnn,
  ('cudnn_dsa', 'sparse_mla_attention'): sparse_cudnn,
  ('cudnn_dsa', 'indexer_kl_selected'): target_cudnn,
}


if __name__ == '__main__':
  main()
