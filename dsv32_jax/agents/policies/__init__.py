"""Policies that need no model of ours (docs/agents.md)."""

from dsv32_jax.agents.policies.endpoint import EndpointPolicy
from dsv32_jax.agents.policies.scripted import ScriptedPolicy

__all__ = ['EndpointPolicy', 'ScriptedPolicy']
