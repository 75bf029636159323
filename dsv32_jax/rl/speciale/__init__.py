"""Proofs that are verified, refined and selected (docs/speciale.md)."""
