"""Conditional writes on S3, through s3fs."""

from __future__ import annotations

from fsspec.asyn import sync

from job.storage.conditional.base import Store, Versioned


class S3(Store):
    """https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-requests.html."""

    def read(self) -> Versioned | None:
        """Read the object and its version; None if there is none."""

        async def fetch() -> Versioned:
            answer = await self.fs._call_s3("get_object", **self._key())
            async with answer["Body"] as body:
                return Versioned(await body.read(), answer["ETag"])

        try:
            found: Versioned = sync(self.fs.loop, fetch)
        except FileNotFoundError:
            return None
        return found

    def write(self, data: bytes, version: str | None) -> str | None:
        """Write it if it has this version; returns the new one, or None."""
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        try:
            answer = self.fs.call_s3("put_object", Body=data, **self._key(), **condition)
        except FileNotFoundError:
            if version is None:
                raise  # the bucket
            return None
        except OSError as error:
            if _is_condition_failed(error):
                return None
            raise
        return str(answer["ETag"])

    def remove(self, version: str) -> bool:
        """Delete it if it has this version; returns whether it did."""
        try:
            self.fs.call_s3("delete_object", IfMatch=version, **self._key())
        except FileNotFoundError:
            return False
        except OSError as error:
            if _is_condition_failed(error):
                return False
            raise
        return True

    def _key(self) -> dict[str, str]:
        bucket, key, _ = self.fs.split_path(self.path)
        return {"Bucket": bucket, "Key": key}


def _is_condition_failed(error: OSError) -> bool:
    if isinstance(error, FileExistsError):
        return True
    response = getattr(error.__cause__, "response", None) or {}
    code = response.get("Error", {}).get("Code")
    return code in ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")
