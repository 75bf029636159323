"""The indexer's training loss: divergence from the main attention."""

from pallas_kernels.indexer_kl.api import IndexerKL as IndexerKL
from pallas_kernels.indexer_kl.api import indexer_kl as indexer_kl
