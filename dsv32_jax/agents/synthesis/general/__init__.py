"""The general family: tables, tools, task, verifier (docs/synthesis.md)."""
