"""What the job says: TensorBoard events, progress, the closing summary."""
