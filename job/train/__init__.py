"""What happens around the training loop: checkpoints, throughput, the report, the trainer itself."""
