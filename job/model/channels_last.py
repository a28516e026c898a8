"""Architectures that are correct and not slower in channels_last on a CPU; by benchmarks/memory_formats.py."""

from __future__ import annotations

CHANNELS_LAST_ON_CPU = frozenset(["resnet18", "timm/test_resnet", "timm/test_efficientnet"])
