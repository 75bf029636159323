"""FlashMLA, by itself or as vLLM ships it."""

import importlib

import torch

common = importlib.import_module('torch_common')
seconds, free = common.seconds, common.free

PAGE = 64  # Rows of the cache.
CALLS = 10  # In a graph, as one is as short as its launch.


def sparse_mla_attention(spec, direction):
  """Prefill; of several sequences, decoding."""
  if spec['batch'] > 1:
    return {**decode(spec, direction), 'other_work': True}
  flash_mla = _module()
  width = spec['latent_dim'] + spec['rope_dim']
  queries, keys = spec['num_queries'], spec['num_keys']
  q = common.normal(queries, spec['num_heads'], width)
  kv = common.normal(keys, 1, width)
  indices = common.random_indices(queries, keys, spec['topk'])
  indices = indices[:, None].contiguous()
  return {
    'run': lambda: flash_mla.flash_mla_sparse_fwd(q, kv, indices, width**-0.5),
    'remark': 'every query sees every key',
  }


def decode(spec, direction):
  """A query each of batch * queries sequences, which share `batch` caches."""
  del direction
  flash_mla = _module()
  latent, keys = spec['latent_dim'], spec['num_keys']
  width = latent + spec['rope_dim']
  caches, rows = spec['batch'], spec['batch'] * spec['num_queries']
  cache = fp8_cache(common.normal(caches * keys // PAGE, PAGE, width))
  q = common.normal(rows, 1, spec['num_heads'], width)
  base = torch.arange(rows, device='cuda', dtype=torch.int32) % caches * keys
  indices = common.random_indices(rows, keys, spec['topk']) + base[:, None]
  indices = indices[:, None].contiguous()
  plan, _ = flash_mla.get_mla_metadata()

  def once():
    flash_mla.flash_mla_with_kvcache(
      q,
      cache,
      None,
      None,
      latent,
      plan,
      None,
      width**-0.5,
      False,
      True,
      indices,
    )

  once()
  graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
  with torch.cuda.stream(stream):
    for _ in range(3):
      once()
  torch.cuda.synchronize()
  with torch.cuda.graph(graph):
    for _ in range(CALLS):
      once()
  return {'run': graph.replay, 'calls': CALLS, 'remark': 'fp8 cache'}


def fp8_cache(kv):
  """[pages, 64, 576] bfloat16 to rows of 656 bytes, a head between."""
  pages, rows, _ = kv.shape
  cache = torch.empty(
    pages, rows, 656, dtype=torch.float8_e4m3fn, device=kv.device
  )
  latent = kv[..., :512].float().view(pages, rows, 4, 128)
  scale = (latent.abs().amax(-1) / 448.0).clamp_min(1e-4)
  scale = torch.exp2(torch.ceil(torch.log2(scale)))
  values = (latent / scale[..., None]).to(torch.float8_e4m3fn)
  cache[..., :512] = values.view(pages, rows, 512)
  cache[..., 512:528].view(torch.float32)[:] = scale
  cache[..., 528:].view(torch.bfloat16)[:] = kv[..., 512:]
  return cache.view(pages, rows, 1, 656)


def _module():
  common.need_cuda()
  return common.first_module(
    'flash_mla', 'vllm.third_party.flashmla.flash_mla_interface'
  )


CASES = {
  'sparse_mla_attention': sparse_mla_attention,
  'sparse_mla_attention_fp8': decode,
}
