"""Matrix products of float8 activations and weights, scales block by block."""

from pallas_kernels.fp8_matmul.api import IMPLEMENTATIONS, fp8_matmul

__all__ = ['IMPLEMENTATIONS', 'fp8_matmul']
