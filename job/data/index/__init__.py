"""From a URI to an index of samples.

``sources`` resolves a URI: one module per format (folder, zip, tar, table). ``parts`` takes the samples of a URI from a
saved index (``store``), or lists them (``listing``) and finds parts and classes in the keys (``layout``). ``build``
writes the index, ``file`` defines its format, ``index`` reads it.
"""

from job.data.index.index import Index

__all__ = ["Index"]
