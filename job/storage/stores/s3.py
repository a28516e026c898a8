"""``s3://``: Amazon S3 and compatible stores, through s3fs."""

from __future__ import annotations

from typing import Any

from fsspec.asyn import sync

from job.errors import first_line
from job.storage.bucket_settings import BucketSettings
from job.storage.checksums import Checksum, etag_checksum, require_within
from job.storage.fsspec_internals import s3_call, s3_call_sync, s3_payer
from job.storage.stores.base import Store, Versioned


class S3(Store):
    """Conditions are entity tags: https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-requests.html."""

    protocols = ("s3", "s3a")
    libraries = ("botocore", "aiobotocore", "s3fs")
    mistakes = (
        *("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "NoRegionError", "ParamValidationError"),
        *("UnknownServiceError", "InvalidRegionError"),
    )

    async def fetch(self, path: str, uri: str, size: int, largest: int | None) -> tuple[bytes, Checksum | None]:
        """The whole object, and the MD5 in its ETag where it is encrypted by no key of the user's."""
        bucket, key, version = self.fs.split_path(path)
        options = {"VersionId": version} if version else {}
        response = await s3_call(self.fs, "get_object", Bucket=bucket, Key=key, **options, **s3_payer(self.fs))
        body = response["Body"]
        try:
            require_within(response["ContentLength"], uri, largest)
            content: bytes = await body.read()
        finally:
            body.close()
        is_users_key = response.get("SSECustomerAlgorithm") or str(response.get("ServerSideEncryption", "")).startswith(
            "aws:kms"
        )
        return content, None if is_users_key else etag_checksum(response.get("ETag"))

    def read_versioned(self, path: str) -> Versioned | None:
        """Read an object and its ETag; None if there is none."""

        async def fetch() -> Versioned:
            response = await s3_call(self.fs, "get_object", **self._key(path))
            async with response["Body"] as body:
                return Versioned(await body.read(), response["ETag"])

        try:
            versioned: Versioned = sync(self.fs.loop, fetch)
        except FileNotFoundError:
            return None
        return versioned

    def write_if(self, path: str, data: bytes, version: str | None) -> str | None:
        """Write an object if it has this ETag, or does not exist for None; returns the new one, or None."""
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        try:
            response = s3_call_sync(self.fs, "put_object", Body=data, **self._key(path), **condition)
        except FileNotFoundError:
            if version is None:
                raise  # the bucket
            return None
        except OSError as error:
            if _is_condition_failed(error):
                return None
            raise
        return str(response["ETag"])

    def remove_if(self, path: str, version: str) -> bool:
        """Delete an object if it has this ETag; returns whether it did."""
        try:
            s3_call_sync(self.fs, "delete_object", IfMatch=version, **self._key(path))
        except FileNotFoundError:
            return False
        except OSError as error:
            if _is_condition_failed(error):
                return False
            raise
        return True

    def conditional_write_weakness(self, path: str) -> str | None:
        """None: the server compares the ETag."""
        return None

    def bucket_settings(self, path: str) -> BucketSettings:
        """Settings by one request each, for which an account may have the right or not."""
        bucket = self.fs.split_path(path)[0]
        answers: dict[str, Any] = {}
        unknown: dict[str, str] = {}
        for name, method in (
            ("region", "get_bucket_location"),
            ("versioning", "get_bucket_versioning"),
            ("retention", "get_object_lock_configuration"),
        ):
            try:
                answers[name] = s3_call_sync(self.fs, method, Bucket=bucket)
            except OSError as error:
                if name != "retention" or _error_code(error) != "ObjectLockConfigurationNotFoundError":
                    unknown[name] = first_line(error)
        lock = answers.get("retention", {}).get("ObjectLockConfiguration", {})
        kept = lock.get("Rule", {}).get("DefaultRetention")
        return BucketSettings(
            bucket,
            # us-east-1 is null there.
            region=(answers["region"].get("LocationConstraint") or "us-east-1").lower()
            if "region" in answers
            else None,
            retention=f"object lock keeps each version ({_retention(kept)})" if kept else None,
            versioning=answers.get("versioning", {}).get("Status") == "Enabled",
            unknown=unknown,
        )

    def _key(self, path: str) -> dict[str, str]:
        bucket, key, _ = self.fs.split_path(path)
        return {"Bucket": bucket, "Key": key, **s3_payer(self.fs)}


def _is_condition_failed(error: OSError) -> bool:
    if isinstance(error, FileExistsError):
        return True
    return _error_code(error) in ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")


def _error_code(error: OSError) -> str | None:
    response = getattr(error.__cause__, "response", None) or {}
    code: str | None = response.get("Error", {}).get("Code")
    return code


def _region(answer: dict[str, Any]) -> str:
    return str(answer.get("LocationConstraint") or "us-east-1").lower()  # null stands for us-east-1


def _retention(rule: dict[str, Any]) -> str:
    length = f"{rule['Days']} days" if "Days" in rule else f"{rule.get('Years', '?')} years"
    return f"{str(rule.get('Mode', '')).lower()}, {length}"
