"""Embeddings of images: the backbone's features in Parquet files, and the search for similar images among them."""
