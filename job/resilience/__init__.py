"""Surviving preemption, hanging ranks, divergence and a second job on the same run_dir."""
