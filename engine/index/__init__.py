"""Tile embeddings that outlive a search: indexes of whole levels, and rows kept from earlier searches."""
