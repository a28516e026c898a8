"""From a URI to batches: index → sampler → dataset → loader → datamodule."""
