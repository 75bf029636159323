"""Architecture configuration of DeepSeek-V3.2 (arXiv:2512.02556).

Field names are those of the published Hugging Face `config.json`, so that a
preset can be compared with the released file line by line. Everything here is
plain data: no arrays and no third-party imports.
"""

import dataclasses
import types
import typing
from typing import Literal

from dsv32_jax.config.checks import require

Selector = Literal['all', 'indexer', 'oracle', 'window', 'random']
SELECTORS = ('all', 'indexer', 'oracle', 'window', 'random')
REMAT_POLICIES = ('none', 'save_attention', 'full')
_DTYPES = ('float32', 'bfloat16', 'float16')


def check_types(config: object) -> None:
  """Refuses a field whose value has another type than its annotation.

  Config files and command-line overrides reach the dataclasses unchecked, and a
  string where a number belongs would otherwise fail deep inside a jitted
  function.

  Args:
    config: a dataclass instance whose annotations are plain classes, `X | None`
      or Literal.

  Raises:
    ValueError: naming the class, the field, its value and the expected type.
  """
  for field in dataclasses.fields(config):  # pyrefly: ignore
    value = getattr(config, field.name)
    where = f'{type(config).__name__}.{field.name}'
    kind: typing.Any = field.type
    if typing.get_origin(kind) is Literal:
      choices = typing.get_args(kind)
      require(
        value in choices,
        f'{where}: got {value!r}, expected one of {list(choices)}',
      )
      continue
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    options = typing.get_args(kind) if is_union else (kind,)
    options = tuple(typing.get_origin(option) or option for option in options)
    if isinstance(value, bool) and bool not in options:
      ok = False
    elif isinstance(value, int) and float in options:
      ok = True
    else:
      ok = isinstance(value, options)
    names = ' or '.join(
      'None' if option is type(None) else option.__name__ for option in options
    )
    require(ok, f'{where}: got {value!r}, expected {names}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
  """YaRN length extension of RoPE (spec: V3 report section 4.3).

  Attributes:
    rope_type: only 'yarn'; no scaling is `ModelConfig.rope_scaling = None`.
    factor: target length over `original_max_position_embeddings`.
    original_max_position_embeddings: length before the extension, in tokens.
    beta_fast: rotations above which a frequency is kept.
    beta_slow: rotations below which a frequency is divided by `factor`.
    mscale: attention temperature coefficient; V3.2 has it equal to
      mscale_all_dim, so cos and sin are not scaled.
    mscale_all_dim: coefficient of the softmax-scale correction,
      (0.1 * mscale_all_dim * ln(factor) + 1)^2.
  """

  rope_type: Literal['yarn'] = 'yarn'
  factor: float = 40.0
  original_max_position_embeddings: int = 4096
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  mscale: float = 1.0
  mscale_all_dim: float = 1.0

  def __post_init__(self):
    check_types(self)
    require(
      self.factor >= 1,
      f'rope_scaling.factor: got {self.factor}, expected at least 1',
    )
    require(
      self.original_max_position_embeddings >= 1,
      'rope_scaling.original_max_position_embeddings: got '
      f'{self.original_max_position_embeddings}, expected at least 1',
    )
    require(
      self.beta_fast > self.beta_slow > 0,
      f'rope_scaling.beta_fast: got {self.beta_fast} with beta_slow '
      f'{self.beta_slow}, expected beta_fast > beta_slow > 0',
    )
    require(
      self.mscale == self.mscale_all_dim,
      f'rope_scaling.mscale: got {self.mscale} with mscale_all_dim '
      f'{self.mscale_all_dim}, expected them equal as in every DeepSeek model '
      '(else cos and sin would be scaled)',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
  """dtypes by name.

  Norm statistics, router scores, softmax, index scores and losses are float32
  whatever is chosen here (docs/numerics.md lists these islands).

  Attributes:
    param: dtype in which parameters are stored.
    compute: dtype of activations and matrix products.
    logits: dtype of the output logits.
  """

  param: str = 'float32'
  compute: str = 'float32'
  logits: str = 'float32'

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      require(
        value in _DTYPES,
        f'precision.{field.name}: got {value!r}, expected one of {_DTYPES}',
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionMode:
  """Which tokens attention reads, and what else is computed on the way.

  The mode is a static argument of a forward pass and owns no parameter: the
  same variables serve dense attention, dense warm-up and sparse attention.

  Attributes:
    selector: 'all' is dense attention; 'indexer' is DSA; 'oracle' (the dense
      attention's own top-k), 'window' (the k most recent) and 'random' are the
      controls of the evaluation.
    indexer_kl: 'none'; 'all' = Eq. 3, over every preceding token (needs
      selector 'all'); 'selected' = Eq. 4, over the selected set.
    absorbed: MQA (absorbed) mode if True, MHA mode if False; None takes MHA
      for dense attention and MQA for sparse attention. Equal in exact
      arithmetic.
    trace: also return, per layer, what the indexer diagnostics need.
    record: also return, per layer, the selected set and the chosen experts of
      every token, for training to replay.
  """

  selector: Selector = 'indexer'
  indexer_kl: Literal['none', 'all', 'selected'] = 'none'
  absorbed: bool | None = None
  trace: bool = False
  record: bool = False

  def __post_init__(self):
    check_types(self)
    require(
      self.indexer_kl != 'all' or self.selector == 'all',
      "attention.indexer_kl: got 'all' with selector "
      f"{self.selector!r}, expected selector 'all' (the dense warm-up's "
      'target is dense attention)',
    )
    require(
      self.indexer_kl != 'selected' or self.selector != 'all',
      "attention.indexer_kl: got 'selected' with selector 'all', expected a "
      'selector that selects',
    )

  @property
  def is_sparse(self) -> bool:
    return self.selector != 'all'


DENSE = AttentionMode(selector='all')
SPARSE = AttentionMode(selector='indexer')
DENSE_WARMUP = AttentionMode(selector='all', indexer_kl='all')
SPARSE_TRAINING = AttentionMode(selector='indexer', indexer_kl='selected')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """Sizes and switches of one DeepSeek-V3.2 model.

  Attributes are the Hugging Face names; those that are ours:
    index_hadamard: rotate indexer queries and keys by a Hadamard matrix (no
      effect in exact arithmetic, spreads outliers before fp8).
    index_fp8: round indexer queries and keys to float8, a power-of-two scale a
      vector, as the released inference code does; gradients pass straight.
    latent_fp8: round latents (not their rotary part) to float8 in blocks of
      128, likewise, before they are used or cached.
    indexer_rope_interleave: pair layout of the indexer's RoPE; False
      (half-split) for V3.2, True for GLM-5 checkpoints.
    balance_loss_alpha: weight of the sequence-wise balance loss (V3 eq. 17).
    precision: dtypes.
    scan_layers: stack equal layers and scan over them.
    remat: what a layer's backward recomputes: 'none' keeps everything,
      'save_attention' keeps attention outputs, selections and indexer
      gradients only, 'full' keeps selections only.
    query_chunk: queries that sparse attention treats at a time, each chunk made
      again in the backward pass, so that per-head queries and outputs are never
      held for a whole sequence; 0 is all at once.

  Raises:
    ValueError: naming the field, its value and what was expected.
  """

  vocab_size: int
  hidden_size: int
  num_hidden_layers: int
  first_k_dense_replace: int
  num_attention_heads: int
  q_lora_rank: int | None
  kv_lora_rank: int
  qk_nope_head_dim: int
  qk_rope_head_dim: int
  v_head_dim: int
  intermediate_size: int
  moe_intermediate_size: int
  n_routed_experts: int
  num_experts_per_tok: int
  n_shared_experts: int
  index_n_heads: int
  index_head_dim: int
  index_topk: int
  n_group: int = 1
  topk_group: int = 1
  routed_scaling_factor: float = 2.5
  norm_topk_prob: bool = True
  scoring_func: Literal['sigmoid', 'softmax'] = 'sigmoid'
  topk_method: Literal['noaux_tc', 'group_limited_greedy', 'greedy'] = (
    'noaux_tc'
  )
  num_nextn_predict_layers: int = 0
  rms_norm_eps: float = 1e-6
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  max_position_embeddings: int = 4096
  initializer_range: float = 0.02
  tie_word_embeddings: bool = False
  bos_token_id: int = 0
  eos_token_id: int = 1
  index_hadamard: bool = False
  index_fp8: bool = False
  latent_fp8: bool = False
  indexer_rope_interleave: bool = False
  balance_loss_alpha: float = 1e-4
  precision: Precision = dataclasses.field(default_factory=Precision)
  scan_layers: bool = True
  remat: Literal['none', 'save_attention', 'full'] = 'save_attention'
  query_chunk: int = 0

  def __post_init__(self):
    check_types(self)
    positive = (
      'vocab_size hidden_size num_hidden_layers num_attention_heads '
      'kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim '
      'intermediate_size index_n_heads index_head_dim index_topk n_group '
      'topk_group max_position_embeddings'
    ).split()
    for name in positive:
      value = getattr(self, name)
      require(value >= 1, f'{name}: got {value}, expected at least 1')
    require(
      self.query_chunk >= 0,
      f'query_chunk: got {self.query_chunk}, expected 0 (all queries at once) '
      'or more',
    )
    for name in ('rms_norm_eps', 'rope_theta', 'initializer_range'):
      value = getattr(self, name)
      require(value > 0, f'{name}: got {value}, expected a positive number')
    require(
      self.qk_rope_head_dim % 2 == 0,
      f'qk_rope_head_dim: got {self.qk_rope_head_dim}, expected an even number '
      '(RoPE rotates pairs)',
    )
    require(
      self.index_head_dim >= self.qk_rope_head_dim,
      f'index_head_dim: got {self.index_head_dim}, expected at least '
      f'qk_rope_head_dim {self.qk_rope_head_dim} (the indexer rotates its '
      'first qk_rope_head_dim channels)',
    )
    if self.index_hadamard:
      require(
        self.index_head_dim & (self.index_head_dim - 1) == 0,
        f'index_head_dim: got {self.index_head_dim}, expected a power of two '
        'when index_hadamard is on',
      )
    require(
      self.q_lora_rank is None or self.q_lora_rank >= 1,
      f'q_lora_rank: got {self.q_lora_rank}, expected at least 1 or None',
    )
    require(
      0 <= self.first_k_dense_replace <= self.num_hidden_layers,
      f'first_k_dense_replace: got {self.first_k_dense_replace}, expected 0 to '
      f'num_hidden_layers {self.num_hidden_layers}',
    )
    require(
      self.num_nextn_predict_layers in (0, 1),
      f'num_nextn_predict_layers: got {self.num_nextn_predict_layers}, '
      'expected 0 or 1 (V3.2 has depth 1)',
    )
    if self.num_moe_layers or self.num_nextn_predict_layers:
      self._check_experts()

  def _check_experts(self):
    experts, groups = self.n_routed_experts, self.n_group
    for name in ('n_routed_experts', 'num_experts_per_tok'):
      value = getattr(self, name)
      require(value >= 1, f'{name}: got {value}, expected at least 1')
    require(
      self.moe_intermediate_size >= 1,
      f'moe_intermediate_size: got {self.moe_intermediate_size}, expected at '
      'least 1',
    )
    require(
      self.n_shared_experts >= 0,
      f'n_shared_experts: got {self.n_shared_experts}, expected 0 or more',
    )
    require(
      experts % groups == 0,
      f'n_group: got {groups}, expected a divisor of n_routed_experts '
      f'{experts}',
    )
    require(
      self.topk_group <= groups,
      f'topk_group: got {self.topk_group}, expected at most n_group {groups}',
    )
    selectable = experts // groups * self.topk_group
    require(
      self.num_experts_per_tok <= selectable,
      f'num_experts_per_tok: got {self.num_experts_per_tok}, expected at most '
      f'{selectable} (topk_group {self.topk_group} x {experts // groups} '
      'experts a group)',
    )
    if self.topk_method == 'noaux_tc' and groups > 1:
      require(
        experts // groups >= 2,
        f'n_group: got {groups} for {experts} experts, expected at least 2 '
        'experts a group (noaux_tc scores a group by its two best)',
      )

  @property
  def num_moe_layers(self) -> int:
    return self.num_hidden_layers - self.first_k_dense_replace

  @property
  def qk_head_dim(self) -> int:
    return self.qk_nope_head_dim + self.qk_rope_head_dim

  @property
  def latent_dim(self) -> int:
    """Width of a cached row [c_kv ; k_rope]."""
    return self.kv_lora_rank + self.qk_rope_head_dim

  @property
  def has_router_bias(self) -> bool:
    return self.topk_method == 'noaux_tc'

  def require_indexer(self) -> None:
    """Refuses DSA on a model without a q latent.

    Raises:
      ValueError: if q_lora_rank is None; the indexer's queries are made from
        the q latent (spec section 2).
    """
    require(
      self.q_lora_rank is not None,
      'q_lora_rank: got None, expected an integer: the lightning indexer reads '
      'the query latent; set q_lora_rank (about hidden_size / 4) or use '
      "selector 'all' without an indexer loss",
    )
