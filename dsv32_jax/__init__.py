"""DeepSeek-V3.2 in JAX and Flax."""

from dsv32_jax.config import presets as presets
from dsv32_jax.config.model import DENSE as DENSE
from dsv32_jax.config.model import DENSE_WARMUP as DENSE_WARMUP
from dsv32_jax.config.model import SPARSE as SPARSE
from dsv32_jax.config.model import SPARSE_TRAINING as SPARSE_TRAINING
from dsv32_jax.config.model import AttentionMode as AttentionMode
from dsv32_jax.config.model import ModelConfig as ModelConfig
from dsv32_jax.modules.transformer import DeepSeekV32 as DeepSeekV32
from dsv32_jax.modules.transformer import ModelOutput as ModelOutput
