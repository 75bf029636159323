"""Decoding with functional caches: prefill, single steps, whole generations."""

from dsv32_jax.inference.cached import DecodeState as DecodeState
from dsv32_jax.inference.cached import decode_step as decode_step
from dsv32_jax.inference.cached import init_state as init_state
from dsv32_jax.inference.cached import prefill as prefill
from dsv32_jax.inference.generate import Generation as Generation
from dsv32_jax.inference.generate import decode as decode
from dsv32_jax.inference.generate import generate as generate
from dsv32_jax.inference.sampling import GREEDY as GREEDY
from dsv32_jax.inference.sampling import Sampled as Sampled
from dsv32_jax.inference.sampling import Sampling as Sampling
from dsv32_jax.inference.sampling import sample as sample
from dsv32_jax.inference.unroll import unroll as unroll
