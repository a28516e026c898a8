"""Cached backbone features: computed once while the backbone is frozen."""
