"""The engine behind the OpenAI API: protocol, application, server."""

from dsv32_jax.serving.app import make_app as make_app
from dsv32_jax.serving.errors import ApiError as ApiError
from dsv32_jax.serving.loading import Loaded as Loaded
from dsv32_jax.serving.loading import load as load
from dsv32_jax.serving.loading import warm_up as warm_up
from dsv32_jax.serving.server import serve as serve
from dsv32_jax.serving.service import Service as Service
from dsv32_jax.serving.service import Settings as Settings
