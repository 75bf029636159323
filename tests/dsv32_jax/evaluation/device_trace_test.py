import pytest

from dsv32_jax.evaluation import device_trace


@pytest.mark.parametrize(
  ('kernel', 'kind'),
  [
    ('ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)', 'all-to-all'),
    ('RaggedAllToAllKernelImpl<8>', 'all-to-all'),
    ('ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage)', 'all-gather'),
    ('ncclDevKernel_ReduceScatter_Sum_f32_RING_LL', 'reduce-scatter'),
    ('ncclDevKernel_AllReduce_Sum_bf16_RING_LL', 'all-reduce'),
    ('all_reduce_one_shot', 'all-reduce'),
    ('loop_add_fusion_3', None),
    ('nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT', None),
  ],
)
def test_kernels_are_told_apart_by_name(kernel, kind):
  assert device_trace.kind_of(kernel) == kind


def test_summary_counts_overlaps_once_and_what_nothing_hides():
  seconds = device_trace.summarise(
    [
      ('gemm', 0.0, 4.0),
      ('ncclDevKernel_SendRecv', 3.0, 6.0),
      ('ncclDevKernel_SendRecv', 5.0, 7.0),
      ('ncclDevKernel_AllReduce_Sum', 6.5, 8.0),
      ('gemm', 7.5, 9.0),
    ]
  )
  assert seconds == pytest.approx(
    {
      'all-to-all': 4.0,
      'all-reduce': 1.5,
      'collectives': 5.0,
      'exposed': 3.5,
      'busy': 9.0,
    }
  )


def test_totals_are_by_name_and_gaps_are_not_busy():
  found = device_trace.totals(
    [('gemm', 1.0, 2.0), ('sort', 4.0, 7.0), ('gemm', 6.0, 7.5)]
  )
  assert found == {
    'span': 6.5,
    'busy': 4.5,
    'kernels': [('sort', 1, 3.0), ('gemm', 2, 2.5)],
  }


def test_directory_without_profile_is_refused(tmp_path):
  with pytest.raises(ValueError, match='expected a profile, found none'):
    device_trace.collective_seconds(tmp_path)
