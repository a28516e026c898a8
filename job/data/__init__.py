"""From a URI to batches: source → index → order → dataset → datamodule."""
