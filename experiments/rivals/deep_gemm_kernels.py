"""DeepGEMM, by itself or as vLLM ships it; it compiles with nvcc."""

import importlib

import torch

common = importlib.import_module('torch_common')
seconds, free = common.seconds, common.free


def grouped_matmul(spec, direction):
  del direction
  deep_gemm = _module()
  rows, experts = spec['num_rows'], spec['num_experts']
  depth, width = spec['input_dim'], spec['output_dim']
  x = common.normal(rows, depth)
  w = torch.empty(experts, width, depth, device='cuda', dtype=torch.bfloat16)
  for expert in w:
    expert.normal_()
  y = torch.empty(rows, width, device='cuda', dtype=torch.bfloat16)
  expert_of_row = torch.arange(experts, device='cuda', dtype=torch.int32)
  expert_of_row = expert_of_row.repeat_interleave(rows // experts)

  def run():
    deep_gemm.m_grouped_bf16_gemm_nt_contiguous(x, w, y, expert_of_row)

  return {'run': run, 'remark': 'groups of equal size'}


def lightning_indexer_fp8(spec, direction):
  del direction
  deep_gemm = _module()
  queries, keys, heads = spec['queries'], spec['keys'], spec['heads']
  q = common.normal(queries, heads, spec['dim']).to(torch.float8_e4m3fn)
  k = common.normal(keys, spec['dim']).float()
  k_scale = (k.abs().amax(-1) / 448.0).clamp_min(1e-4)
  k = (k / k_scale[:, None]).to(torch.float8_e4m3fn)
  w = torch.randn(queries, heads, device='cuda')
  start = torch.zeros(queries, dtype=torch.int32, device='cuda')
  end = torch.arange(queries, dtype=torch.int32, device='cuda')
  end = end + (keys - queries + 1)

  def run():
    return deep_gemm.fp8_fp4_mqa_logits(
      (q, None),
      (k, k_scale),
      w,
      start,
      end,
      clean_logits=False,
      max_seqlen_k=0,
      logits_dtype=torch.float32,
    )

  return {'run': run, 'remark': 'one sequence'}


def _module():
  common.need_cuda()
  return common.first_module('deep_gemm', 'vllm.third_party.deep_gemm')


CASES = {
  'grouped_matmul': grouped_matmul,
  'lightning_indexer_fp8': lightning_indexer_fp8,
}
