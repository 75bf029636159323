"""Running what a model writes, apart from everything else (docs/sandbox.md)."""

from dsv32_jax.agents.sandbox.link import SandboxError
from dsv32_jax.agents.sandbox.pool import SandboxPool
from dsv32_jax.agents.sandbox.sandbox import Sandbox, choose_backend, why_not
from dsv32_jax.agents.sandbox.types import Limits, Program, Result, Status

__all__ = [
  'Limits',
  'Program',
  'Result',
  'Sandbox',
  'SandboxError',
  'SandboxPool',
  'Status',
  'choose_backend',
  'why_not',
]
