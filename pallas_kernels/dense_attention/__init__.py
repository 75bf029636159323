"""Softmax attention over a range of keys a query, with a key a head."""
