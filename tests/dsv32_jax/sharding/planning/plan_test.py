"""Plans against published numbers, against arrays, and against measurements."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from dsv32_jax.config import presets
from dsv32_jax.modules.transformer import DeepSeekV32
from dsv32_jax.sharding import mesh as mesh_lib
from dsv32_jax.sharding.parallel import Parallel
from dsv32_jax.sharding.planning import (
  activations,
  hardware,
  plan,
  plots,
  render,
  request,
  search,
  weights,
  work,
)
from dsv32_jax.training import optimizer, stages
from dsv32_jax.training import state as state_lib

LARGE = {
  'preset': 'deepseek_v32_671b',
  'rules': 'fsdp_expert_context',
  'sizes': {'expert': 16, 'context': 16},
  'moment_dtype': 'bfloat16',
}
SMALL = {
  'preset': 'tiny',
  'rules': 'fsdp_expert_context',
  'sizes': {'expert': 4, 'context': 2},
  'length': 256,
  'batch_size': 8,
}


def of(options, **changes):
  return request.make(**{**options, **changes})


@pytest.fixture(scope='module')
def large():
  before = jax.live_arrays()
  made = plan.make_plan(of(LARGE))
  # Others may be collected meanwhile, so their number says nothing.
  assert {*map(id, jax.live_arrays())} <= {*map(id, before)}
  return made


def test_parameters_of_the_671b_model_are_the_published_count(large):
  assert large.counts['main'] == 671_877_944_064
  assert large.counts['mtp'] == 11_624_027_648
  cfg = large.request.model
  # The checkpoint stores the embedding and the head a second time with MTP.
  copies = 2 * cfg.vocab_size * cfg.hidden_size
  assert large.counts['all'] + copies == 685_355_329_792


def test_stages_have_the_tokens_of_the_paper():
  tokens = {name: stage.tokens for name, stage in request.STAGES.items()}
  assert tokens == {
    'dense_warmup': 2_097_152_000,
    'sparse_training': 943_718_400_000,
  }


def test_state_of_the_671b_model_is_cut_over_all_devices(large):
  """Only norms and router biases are whole: below 0.1 % of the parameters."""
  for held, itemsize in (
    (large.memory.parameters, 4),
    (large.memory.optimizer, 2 * 2),
    (large.memory.gradients, 2 * 4),
  ):
    even = itemsize * large.counts['all'] / 256
    assert even < held < 1.001 * even


@pytest.mark.parametrize('gpus', [256, 2048])
def test_stage_2_at_128k_fits_on_so_many_h100s(gpus):
  sizes = {
    256: {'fsdp': 2, 'expert': 8, 'context': 16},
    2048: {'data': 4, 'expert': 8, 'context': 64},
  }[gpus]
  made = plan.make_plan(of(LARGE, sizes=sizes))
  assert made.request.num_devices == gpus
  assert made.request.stage.data.seq_len == 131_072
  assert made.request.stage.data.batch_size == 480
  assert made.memory.fits
  assert made.memory.total < 80e9
  assert math.isfinite(made.step_seconds)


@pytest.mark.parametrize(
  ('rules', 'sizes'),
  [
    ('fsdp', {'fsdp': 8}),
    ('fsdp_expert', {'fsdp': 2, 'expert': 4}),
    ('fsdp_expert_context', {'expert': 4, 'context': 2}),
    ('fsdp_tensor_expert', {'fsdp': 2, 'expert': 2, 'tensor': 2}),
  ],
)
def test_planned_state_is_what_shapes_on_a_real_mesh_hold(rules, sizes):
  moment_dtype = 'float32' if rules == 'fsdp' else 'bfloat16'
  asked = of(
    SMALL,
    rules=rules,
    sizes=sizes,
    moment_dtype=moment_dtype,
    micro_batches=1,
  )
  planned = plan.make_plan(asked).memory
  layout = Parallel(
    mesh_lib.make_mesh(dict(asked.sizes), jax.devices()[:8]),
    asked.parallel.rules,
  )
  model = DeepSeekV32(asked.model)
  stage = stages.build(asked.stage, asked.model)
  variables = state_lib.variable_shapes(model, layout)

  def held(tree):
    return sum(
      math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
      for x in jax.tree.leaves(tree)
    )

  trainable, _ = optimizer.split(variables['params'], stage)
  assert planned.parameters == held(variables)
  assert planned.gradients == held(trainable)
  # Two moments a parameter, and three counts of steps in each group.
  moments = 2 * held(trainable) * jnp.dtype(moment_dtype).itemsize // 4
  assert planned.optimizer - moments in range(64)


def test_kept_bytes_a_layer_are_the_named_arrays():
  cfg = presets.tiny()
  D, H, C = cfg.hidden_size, cfg.num_attention_heads, cfg.kv_lora_rank
  J, I, K = cfg.index_n_heads, cfg.index_head_dim, cfg.index_topk
  input_and_selection = 4 * D + 4 * K
  for remat, more in (
    ('full', 0),
    # Output and normalisers of the heads; gradients of q, w and k.
    ('save_attention', 4 * (H * C + H + J * I + J + I)),
  ):
    asked = of(SMALL, remat=remat, sizes={}, rules='fsdp', query_chunk=0)
    stage = stages.build(asked.stage, asked.model)
    kept = activations.saved_a_layer(asked, stage)
    assert kept == asked.tokens * (input_and_selection + more)


def test_kept_bytes_of_chunks_have_a_gradient_of_all_keys_each():
  options = {'remat': 'save_attention', 'sizes': {}, 'rules': 'fsdp'}
  whole, chunks = (
    activations.saved_a_layer(asked, stages.build(asked.stage, asked.model))
    for asked in (of(SMALL, query_chunk=n, **options) for n in (0, 64))
  )
  width = presets.tiny().index_head_dim
  assert chunks - whole == (256 // 64 - 1) * 256 * width * 4


def test_warmup_keeps_no_more_than_sparse_training():
  kept = [
    activations.saved_a_layer(asked, stages.build(asked.stage, asked.model))
    for asked in (
      of(SMALL, stage=stage, remat='save_attention', query_chunk=0)
      for stage in ('dense_warmup', 'sparse_training')
    )
  ]
  assert 0 < kept[0] < kept[1]


# docs/kernels.md: one attention layer of V3.2, forward and backward, remat
# full, query_chunk 4096, batch 1: milliseconds and GiB in use at most.
MEASURED_LAYER = {32_768: (342, 6.8), 131_072: (1867, 17.2)}


@pytest.mark.parametrize('length', MEASURED_LAYER)
def test_work_and_memory_of_a_layer_are_near_the_measured_ones(
  length, monkeypatch
):
  milliseconds, gib = MEASURED_LAYER[length]
  asked = of(LARGE, rules='fsdp', sizes={}, length=length, batch_size=1)
  # Nothing came after that layer, so its output was not made again.
  passes = work.Passes(block=2, heads=2, losses=2, backward=1)
  monkeypatch.setattr(work, 'passes', lambda *_: passes)
  stage = stages.build(asked.stage, asked.model)
  seconds = sum(part.seconds for part in work._attention(asked, stage))
  assert 1e3 * seconds == pytest.approx(milliseconds, rel=0.25)
  assert activations._attention(asked, stage) / 2**30 == pytest.approx(
    gib, rel=0.1
  )


def test_model_flops_are_six_a_parameter_and_token_and_the_attention():
  """Pre-training at 4K: activated parameters of spec section 1."""
  asked = of(LARGE, stage='pretrain', length=4096, sizes={}, rules='fsdp')
  a_token = work.model_flops(asked) / (asked.stage.data.batch_size * 4096)
  cfg = asked.model
  embedding = cfg.vocab_size * cfg.hidden_size
  # Without the lookup; the MTP module adds a layer, a projection and a head.
  activated = 38.40e9 - embedding
  mtp = (37.55e9 - 2 * embedding) / 61 + embedding + 2 * cfg.hidden_size**2
  pairs = 128 * (192 + 128) * (4096 + 1) / 2
  expected = 6 * (activated + mtp) + 62 * pairs * (2 + 7.2 / 2 * 2)
  assert a_token == pytest.approx(expected, rel=0.03)


def test_groups_know_their_links():
  sizes = {'data': 4, 'fsdp': 2, 'context': 4, 'expert': 4, 'tensor': 2}
  for names, size, inside, link in (
    (('tensor',), 2, 2, 'NVLink'),
    (('expert', 'tensor'), 8, 8, 'NVLink'),
    (('expert',), 4, 4, 'NVLink'),
    (('context',), 4, 1, 'InfiniBand'),
    (('context', 'expert'), 16, 4, 'NVLink + InfiniBand'),
    (('data', 'fsdp'), 8, 1, 'InfiniBand'),
  ):
    group = hardware.group(sizes, names)
    assert (group.size, group.in_node, group.link) == (size, inside, link)


def test_seconds_of_a_collective_are_those_of_its_slower_link():
  node, pair = hardware.Group(8, 8), hardware.Group(2, 1)
  both = hardware.Group(16, 8)
  gather = hardware.seconds('all-gather', 1e9, node)
  assert gather == pytest.approx(7 / 8 * 1e9 / hardware.NVLINK)
  assert hardware.seconds('all-reduce', 1e9, node) == 2 * gather
  assert hardware.seconds('all-to-all', 1e9, pair) == pytest.approx(
    0.5e9 / hardware.INFINIBAND
  )
  # Eight cards fetch the other node's half together.
  assert hardware.seconds('all-gather', 1e9, both) == pytest.approx(
    max(0.5e9 / 8 / hardware.INFINIBAND,
        (15 / 16 - 1 / 16) * 1e9 / hardware.NVLINK)
  )  # fmt: skip
  assert hardware.seconds('all-gather', 1e9, hardware.Group(1, 1)) == 0


def test_every_rate_that_work_names_is_known(large):
  assert all(part.seconds > 0 for part in large.work)
  warmup = plan.make_plan(of(SMALL, stage='dense_warmup'))
  assert all(part.seconds > 0 for part in warmup.work)
  assert {part.part for part in warmup.work} >= {'attention', 'indexer loss'}
  assert not any('backward' in part.part for part in warmup.work)


def test_warmup_sends_no_gradients_of_the_main_model():
  messages = plan.make_plan(of(SMALL, stage='dense_warmup')).messages
  subjects = {message.planned.subject for message in messages}
  assert not any('gradients of experts' in subject for subject in subjects)
  assert any('gradients of attention' in subject for subject in subjects)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'preset': 'huge'}, "preset: got 'huge', expected one of"),
    ({'rules': 'pipeline'}, "rules: got 'pipeline', expected one of fsdp"),
    ({'sizes': {'pipe': 2}}, "mesh: axis: got 'pipe', expected one of data"),
    ({'sizes': {'tensor': 2}}, 'mesh.tensor: got 2 with mesh.rules'),
    ({'stage': 'distil'}, "stage: got 'distil', expected one of pretrain"),
    ({'remat': 'half'}, "remat: got 'half', expected one of none"),
    ({'param_dtype': 'int8'}, "precision.param: got 'int8', expected one of"),
    ({'moment_dtype': 'int8'}, "moment_dtype: got 'int8', expected one of"),
    ({'query_chunk': -1}, 'query_chunk: got -1, expected 0'),
    ({'micro_batches': 3}, 'micro_batches: got 3, expected a divisor'),
    ({'batch_size': 6}, 'batch_size: got 6, expected a multiple of 4'),
    ({'length': 258}, 'seq_len: got 258, expected a multiple of 4'),
  ],
)
def test_impossible_request_names_field_value_and_expectation(changes, message):
  with pytest.raises(ValueError, match='expected') as error:
    of(SMALL, **changes)
  assert message in str(error.value)


def test_indivisible_parameter_is_named():
  with pytest.raises(ValueError, match=r'w_\w+: dimension .* is not divisible'):
    plan.make_plan(of(SMALL, rules='fsdp', sizes={'fsdp': 3}, batch_size=6))


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('pipe=2', "mesh: axis: got 'pipe', expected one of"),
    ('fsdp', "mesh.fsdp: got '', expected a whole number"),
    ('fsdp=0', "mesh.fsdp: got '0', expected a whole number"),
    ('fsdp=2,fsdp=4', 'mesh.fsdp: got it twice, expected once'),
  ],
)
def test_parse_mesh_refuses_what_is_no_axis_with_a_size(text, message):
  with pytest.raises(ValueError, match='expected') as error:
    request.parse_mesh(text)
  assert message in str(error.value)


def test_mesh_of_another_number_of_gpus_is_refused():
  sizes = request.parse_mesh('fsdp=32, expert=8')
  assert sizes == {'fsdp': 32, 'expert': 8}
  request.check_gpus(sizes, 256)
  with pytest.raises(ValueError, match='fsdp 32 x expert 8 = 256 devices, exp'):
    request.check_gpus(sizes, 512)


def test_search_ranks_what_fits_first_and_fastest_first(monkeypatch):
  monkeypatch.setattr(hardware, 'MEMORY_BYTES', 5e6)
  monkeypatch.setattr(search, 'TRAINING_RULES', ('fsdp_expert_context',))
  options = {k: SMALL[k] for k in ('preset', 'length', 'batch_size')}
  plans = search.search(
    4, rules=search.TRAINING_RULES, remats=('full',), options=options
  )
  fits = [one.memory.fits for one in plans]
  assert any(fits)
  assert not all(fits)
  assert fits == sorted(fits, reverse=True)
  times = [one.step_seconds for one in plans if one.memory.fits]
  assert times == sorted(times)
  assert {one.request.num_devices for one in plans} == {4}
  lines = render.found(plans[:3])
  assert len(lines) == 4
  assert plans[0].request.rules in lines[1]


def test_search_covers_every_mesh_once():
  seen = [tuple(sizes.items()) for sizes in search.meshes(12, 'fsdp_expert')]
  assert len(seen) == len(set(seen)) == 18
  assert all(math.prod(dict(sizes).values()) == 12 for sizes in seen)


@pytest.mark.parametrize('gpus', [None, 0, -8])
def test_search_without_gpus_is_refused(gpus):
  with pytest.raises(ValueError, match=f'gpus: got {gpus}, expected a number'):
    search.checked(gpus, {'preset': 'tiny'})


def test_recipe_has_both_stages_on_as_many_devices():
  options = {k: SMALL[k] for k in ('preset', 'length')}
  made = plan.make_plan(of({**SMALL, 'batch_size': 480}))
  both = search.recipe(made, options)
  assert [one.request.stage.kind for one in both] == list(request.STAGES)
  assert {one.request.num_devices for one in both} == {8}
  lines = render.recipe(both)
  assert '2.1 B' in lines[2]
  assert '943.7 B' in lines[3]


def test_text_record_and_plot_of_a_plan(large, tmp_path):
  text = render.text(large)
  for part in (
    '671,877,944,064 main model',
    'memory of one device',
    'collectives of one device a step',
    'tokens a second and GPU',
  ):
    assert part in text
  row = render.record(large)
  assert row['gpus'] == 256
  assert row['memory_gb']['total'] == pytest.approx(
    sum(v for k, v in row['memory_gb'].items() if k != 'total')
  )
  path = tmp_path / 'plan.png'
  plots.draw([large, large], str(path))
  assert path.stat().st_size > 10_000


def test_lengths_are_a_table_by_policy():
  asked = of(SMALL, query_chunk=64)
  lines = render.lengths(
    asked, weights.build(asked), seq_lens=(128, 254, 256), remats=('full',)
  )
  # A heading, a header; 254 tokens cannot be cut; with and without chunks.
  assert len(lines) == 2 + 2 * 2


def test_more_micro_batches_need_less_memory_at_a_time():
  fewer, more = (
    plan.make_plan(of({**SMALL, 'batch_size': 32}, micro_batches=n))
    for n in (2, 8)
  )
  assert more.memory.activations.total < fewer.memory.activations.total
  assert more.memory.gradients == fewer.memory.gradients
  one = plan.make_plan(of({**SMALL, 'batch_size': 4}, micro_batches=1))
  assert one.memory.gradients * 2 == more.memory.gradients


def test_shrunk_request_keeps_its_width():
  from dsv32_jax.sharding.planning import compiled

  asked = of(LARGE)
  small = compiled.shrunk(asked, 1, 2, False).model
  assert small == dataclasses.replace(
    asked.model,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_nextn_predict_layers=0,
  )
