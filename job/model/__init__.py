"""Backbone, head and the LightningModule that fine-tunes them."""
