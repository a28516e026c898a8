"""From a URI to an index of samples."""
