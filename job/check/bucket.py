"""Settings of the bucket of run_dir, and its region against that of this machine."""

from __future__ import annotations

import http.client
import os
import re
from collections.abc import Iterable, Iterator

from job import storage
from job.check.finding import Finding, ok, warn
from job.errors import StorageError
from job.storage import BucketSettings

SETTINGS, REGION = "bucket_settings", "region"
_COLD = ("NEARLINE", "COLDLINE", "ARCHIVE")
FAR_MEND = "Move the data, or the machines: reading from another region is slow, and paid per byte."
_METADATA_SECONDS = 1.0
_CONTINENTS = {"us": ("us-", "northamerica-"), "eu": ("europe-",), "asia": ("asia-",)}
"""Google's multi-regions, and the beginnings of the regions in them."""


def bucket_settings(run_dir: str) -> Iterator[Finding]:
    """Whether superseded and deleted checkpoints go on occupying space, and where the bucket is."""
    if storage.is_local(run_dir):
        return
    try:
        settings = storage.bucket_settings(run_dir)
        reason = "" if settings is not None else "its store does not tell"
    except StorageError as error:
        settings, reason = None, str(error)
    if settings is None:
        yield warn(
            SETTINGS,
            f"retention, soft delete and versioning of the bucket of {run_dir} cannot be found out: {reason}",
            "Look at the settings of the bucket, or give the account the right to read them (on Google Cloud: "
            "storage.buckets.get, as in roles/storage.legacyBucketReader).",
        )
        return
    yield from _settings(settings)


def regions(uris: Iterable[str]) -> Iterator[Finding]:
    """Whether the buckets of some URIs are in the region of this machine."""
    machine, known = machine_region(), set()
    for uri in uris:
        name = uri.partition("://")[2].partition("/")[0]
        if "::" in uri or name in known or not name or storage.is_local(uri):
            continue
        known.add(name)
        try:
            settings = storage.bucket_settings(uri)
        except StorageError:
            settings = BucketSettings(name)
        if settings is not None:
            yield _region(settings, machine)


def _settings(settings: BucketSettings) -> Iterator[Finding]:
    name, problems = settings.name, 0
    for message, mend in (
        (
            settings.retention and f"the bucket {name} has a retention policy: {settings.retention}.",
            "Choose a --run_dir in a bucket without one: lease, reports and checkpoints must be replaced and deleted.",
        ),
        (
            settings.versioning and f"the bucket {name} keeps noncurrent versions: each superseded checkpoint is paid.",
            "Add a lifecycle rule that deletes noncurrent versions after a day, or disable versioning.",
        ),
        (
            settings.soft_delete_seconds
            and f"the bucket {name} keeps deleted objects for {settings.soft_delete_seconds / 86400:.3g} days: each "
            "superseded checkpoint is paid for as long.",
            f"gcloud storage buckets update gs://{name} --clear-soft-delete, or choose another bucket for --run_dir.",
        ),
        (
            settings.storage_class in _COLD
            and f"new objects in the bucket {name} are of the class {settings.storage_class}, which is paid for a "
            "month or longer, also for a checkpoint that is soon deleted.",
            "Choose a --run_dir in a bucket of the class STANDARD.",
        ),
        *(
            (f"the {setting} of the bucket {name} cannot be found out: {why}", "Give the account the right to read it.")
            for setting, why in settings.unknown.items()
            if setting != "region"
        ),
    ):
        if message:
            problems += 1
            yield warn(SETTINGS, str(message), mend)
    if not problems:
        yield ok(SETTINGS, f"the bucket {name} has no retention policy, no soft delete and no versioning.")


def _region(settings: BucketSettings, machine: str | None) -> Finding:
    if settings.region is None or machine is None:
        what = "region of the bucket" if settings.region is None else "region of this machine"
        where = f" It is in {settings.region}." if settings.region else ""
        return warn(
            REGION,
            f"the {what} cannot be found out, so that it is not known whether {settings.name} is near.{where}",
            "Make sure that they are the same: reading from another region is slow, and paid per byte.",
        )
    if settings.region == machine or machine.startswith(_CONTINENTS.get(settings.region, ("/",))):
        return ok(REGION, f"the bucket {settings.name} and this machine are in {settings.region}.")
    return warn(
        REGION,
        f"the bucket {settings.name} is in {settings.region}, this machine in {machine}.",
        FAR_MEND,
    )


def machine_region() -> str | None:
    """Region of this machine, by the metadata server of Google Cloud; None where there is none.

    Source: https://cloud.google.com/compute/docs/metadata/querying-metadata; google-auth reads the same variable.
    """
    host = os.environ.get("GCE_METADATA_HOST") or "169.254.169.254"
    connection = http.client.HTTPConnection(host, timeout=_METADATA_SECONDS)
    try:
        connection.request("GET", "/computeMetadata/v1/instance/zone", headers={"Metadata-Flavor": "Google"})
        response = connection.getresponse()
        text = response.read(1000).decode("ascii", "replace")
        if response.status != http.HTTPStatus.OK or response.headers.get("Metadata-Flavor") != "Google":
            return None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    zone = re.fullmatch(r"projects/[^/]+/zones/([a-z]+-[a-z0-9]+)-[a-z]", text.strip())
    return zone[1] if zone else None
