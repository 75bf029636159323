"""cuDNN-frontend's kernels for DSA, which it compiles with CuTe DSL."""

import importlib

import torch

common = importlib.import_module('torch_common')
seconds, free = common.seconds, common.free

# Of the inputs that go through a softmax.
FACTOR = 0.3


def lightning_indexer(spec, direction):
  del direction
  dsa = _module()
  queries, keys = spec['queries'], spec['keys']
  heads, dim = spec['heads'], spec['dim']
  q = common.normal(1, queries, heads, dim)
  k = common.normal(1, keys, 1, dim)
  w = torch.randn(1, queries, heads, device='cuda')
  offset = torch.full((1,), keys - queries, dtype=torch.int32, device='cuda')
  out = torch.empty(1, queries, keys, device='cuda')

  def run():
    dsa.indexer_forward_wrapper(
      q, k, w, ratio=1, out=out, q_causal_offsets=offset, precision='bf16'
    )

  return {'run': run, 'remark': 'one sequence'}


def sparse_mla_attention(spec, direction):
  """Backward alone: on Hopper the forward pass is another package's."""
  dsa = _module()
  if direction != 'backward':
    raise NotImplementedError('the backward pass alone')
  width = spec['latent_dim'] + spec['rope_dim']
  queries, keys = spec['num_queries'], spec['num_keys']
  heads, latent = spec['num_heads'], spec['latent_dim']
  q = common.normal(queries, heads, width, factor=FACTOR)
  kv = common.normal(keys, width, factor=FACTOR)
  indices = common.random_indices(queries, keys, spec['topk'])
  d_out = common.normal(queries, heads, latent)
  out, lse = attend(q, kv, indices, latent)
  sink = torch.full((heads,), float('-inf'), device='cuda')

  def run():
    return dsa.sparse_attention_backward_wrapper(
      q, kv, out, d_out, lse, sink, indices, softmax_scale=width**-0.5
    )

  return {'run': run, 'remark': 'backward alone, every query sees every key'}


def attend(q, kv, indices, latent, rows=32):
  """Output and normaliser, some rows at a time."""
  outs, normalisers = [], []
  for some, chosen in zip(q.split(rows), indices.split(rows), strict=True):
    keys = kv[chosen.long()].float()
    scores = torch.einsum('nhd,nkd->nhk', some.float(), keys)
    scores *= q.shape[-1] ** -0.5
    weights = scores.softmax(-1)
    out = torch.einsum('nhk,nkd->nhd', weights, keys[..., :latent])
    outs.append(out.to(q.dtype))
    normalisers.append(scores.logsumexp(-1))
  return torch.cat(outs), torch.cat(normalisers)


def indexer_target_selected(spec, direction):
  del direction
  dsa = _module()
  queries, keys = spec['num_queries'], spec['num_keys']
  heads, width = spec['num_heads'], spec['width']
  q = common.normal(queries, heads, width, factor=FACTOR)
  kv = common.normal(keys, width, factor=FACTOR)
  indices = common.random_indices(queries, keys, spec['topk'])
  _, lse = attend(q, kv, indices, width)
  q, kv, lse, indices = (x[None].contiguous() for x in (q, kv, lse, indices))

  def run():
    return dsa.sparse_attn_score_recompute_wrapper(
      q, kv, lse, indices, width**-0.5
    )

  return {'run': run, 'remark': 'target alone', 'other_work': True}


def indexer_target_all(spec, direction):
  del direction
  dsa = _module()
  queries, keys = spec['num_queries'], spec['num_keys']
  heads, width = spec['num_heads'], spec['width']
  q = common.normal(1, queries, heads, width, factor=FACTOR)
  k = common.normal(1, keys, 1, width, factor=FACTOR)
  lse = torch.full((1, queries, heads), 8.0, device='cuda')

  def run():
    return dsa.dense_attn_score_recompute_wrapper(q, k, lse, width**-0.5)

  return {'run': run, 'remark': 'causal'}


def indexer_gradients(spec, direction):
  del direction
  dsa = _module()
  queries, keys, k = spec['num_queries'], spec['num_keys'], spec['topk']
  heads, dim = spec['index_heads'], spec['index_dim']
  q = common.normal(1, queries, heads, dim)
  k_index = common.normal(1, keys, dim)
  w = common.normal(1, queries, heads)
  indices = common.random_indices(queries, keys, k)[None].contiguous()
  predicted, target = (
    torch.rand(1, queries, k, device='cuda').softmax(-1) for _ in range(2)
  )
  d_loss = torch.ones(1, device='cuda')

  def run():
    return dsa.indexer_backward_wrapper(
      q, w, k_index, predicted, target, indices, d_loss
    )

  return {'run': run}


def _module():
  common.need_cuda()
  return importlib.import_module('cudnn').DSA


CASES = {
  'lightning_indexer': lightning_indexer,
  'sparse_mla_attention': sparse_mla_attention,
  'indexer_target_selected': indexer_target_selected,
  'indexer_target_all': indexer_target_all,
  'indexer_gradients': indexer_gradients,
}
