"""Ranks of the job: discovery from the environment, launching, and communication."""
