"""TensorBoard events, progress, accounting, profile and report."""
