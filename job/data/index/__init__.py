"""From a URI to an index of samples.

``sources`` resolves a URI: one module per format (folder, zip, tar, TFRecord, table, Parquet). ``parts`` takes the
samples of a URI from a saved index (``store``, if ``freshness`` finds it true), or lists them and finds their classes:

* ``listing`` is the boundary: it gives each key its normalised name (``names``), counts what is no sample
  (``left_out``), opens folders of archives (``collection``), many at once and on all ranks (``parallel``), and drops
  ``duplicates``. Tar files are read by ``ranges`` of ``tar_headers``, at several places at once (``tar_ahead``).
* ``layout`` finds parts (``part_names``) and class folders in the tree of ``folders``.
* ``classes_of_parts`` holds the classes of the parts against each other.

``build`` writes the index, ``file`` defines its format, ``index`` reads it.
"""

from job.data.index.index import Index

__all__ = ["Index"]
