"""Predictions over HTTP: one model, dynamic batches, the protocols of Vertex AI and KServe."""
