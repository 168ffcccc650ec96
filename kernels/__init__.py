"""Cosine top-k."""
