"""Sweeps: many heads of a frozen backbone trained together, and the best one by cross-validation."""
