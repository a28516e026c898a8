"""A generated bucket: ``generated://CLASSESxIMAGES`` lists CLASSES folders of IMAGES images each."""

from __future__ import annotations

from typing import Any

import fsspec
from fsspec.spec import AbstractFileSystem


class GeneratedFileSystem(AbstractFileSystem):
    """A read-only filesystem; the content of an image is its number."""

    protocol = "generated"
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("generated://").rstrip("/")

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[dict[str, Any]]:
        path = self._strip_protocol(path)
        root, _, folder = path.partition("/")
        classes, images = map(int, root.split("x"))
        if not folder:
            return [{"name": f"{root}/n{n:08d}", "type": "directory", "size": 0} for n in range(classes)]
        return [
            {
                "name": f"{path}/{folder}_{n:06d}.JPEG",
                "type": "file",
                "size": 100_000 + n,
                "generation": 1_700_000_000_000_000 + n,
                "md5Hash": "AAAAAAAAAAAAAAAAAAAAAA==",
                "metadata": {"k": "v"},
            }
            for n in range(images)
        ]

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        path = self._strip_protocol(path)
        if path.endswith(".JPEG"):
            number = int(path[-11:-5])
            return {
                "name": path,
                "type": "file",
                "size": 100_000 + number,
                "generation": 1_700_000_000_000_000 + number,
            }
        if path.count("/") > 1 or "." in path:
            raise FileNotFoundError(path)
        return {"name": path, "type": "directory", "size": 0}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        return path.encode().ljust(self.info(path)["size"], b"\0")


fsspec.register_implementation("generated", GeneratedFileSystem, clobber=True)
