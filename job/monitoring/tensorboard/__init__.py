"""TensorBoard: events, pictures and texts of a run, and ``job tensorboard``."""
