"""Matrix products of sorted rows with the matrix of their group."""

from pallas_kernels.grouped_matmul.api import grouped_matmul as grouped_matmul
