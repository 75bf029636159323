"""Agents: the sandbox that their programs run in (docs/sandbox.md)."""
