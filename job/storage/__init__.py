"""Files on any fsspec filesystem: the only package that distinguishes buckets from disks.

Every function takes a URI (``gs://``, ``s3://``, ``http(s)://``, ``memory://``, ``file://``) or a
plain path, and raises :class:`~job.errors.StorageError` with that URI in it, or its kind
:class:`~job.errors.StorageOutage` where the bucket itself is in trouble and a retry may help.

This module is the interface; ``stores`` has one file per kind of storage.
"""

from __future__ import annotations

from job.storage.bucket_settings import BucketSettings
from job.storage.checksums import TooLarge
from job.storage.errors import NotFound, translate_errors
from job.storage.filesystems import filesystem, http_client, is_local, is_process_local, protocols
from job.storage.listing import LISTINGS_IN_FLIGHT, Entry, glob, list_files, list_pages, version
from job.storage.objects import (
    bucket_settings,
    download,
    download_verified,
    exists,
    info,
    info_below,
    modified,
    open_for_reading,
    read_bounded,
    read_bytes,
    remove,
    remove_tree,
    require_same,
    retry,
    serves_ranges,
    unconditionally,
    upload,
    write_bytes,
    write_many,
    write_text,
)
from job.storage.reader import Reader
from job.storage.stores.google import CONNECTIONS, use_gcs_emulator
from job.storage.uris import basename, join, split

__all__ = [
    "CONNECTIONS",
    "LISTINGS_IN_FLIGHT",
    "BucketSettings",
    "Entry",
    "NotFound",
    "Reader",
    "TooLarge",
    "basename",
    "bucket_settings",
    "download",
    "download_verified",
    "exists",
    "filesystem",
    "glob",
    "http_client",
    "info",
    "info_below",
    "is_local",
    "is_process_local",
    "join",
    "list_files",
    "list_pages",
    "modified",
    "open_for_reading",
    "protocols",
    "read_bounded",
    "read_bytes",
    "remove",
    "remove_tree",
    "require_same",
    "retry",
    "serves_ranges",
    "split",
    "translate_errors",
    "unconditionally",
    "upload",
    "use_gcs_emulator",
    "version",
    "write_bytes",
    "write_many",
    "write_text",
]
