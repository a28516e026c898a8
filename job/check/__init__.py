"""Checks before a run: what would stop it, and what would slow it down."""
