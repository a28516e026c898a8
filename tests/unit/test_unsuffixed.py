"""Images by their content, and by less common suffixes."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import index_of, picture, picture_files, read, tar_of, write_files, zip_of

from job.data.index.magic import image_suffix
from job.errors import DataError

FILES = picture_files(["blue", "red"], 3)
HASHED = {name.replace(".jpg", "") + "a9": content for name, content in FILES.items()}
NOTES = {"README": b"", "blue/NOTES.txt": b"", "VERSION": b"1", "blue/SHA256SUMS": b"", "blue/thing.bin": b""}


def data(kind: str, files: dict[str, bytes], folder: Path) -> Path:
    if kind == "folder":
        return write_files(folder / "data", files)
    (folder / f"a.{kind}").write_bytes(zip_of(files) if kind == "zip" else tar_of(files))
    return folder / f"a.{kind}"


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_names_without_a_suffix(kind: str, tmp_path: Path) -> None:
    index = index_of(data(kind, {**HASHED, **NOTES}, tmp_path))
    assert sorted(index.keys) == sorted(HASHED)
    assert index.classes == ("blue", "red")
    assert read(index, [index.keys.index("red/002a9")]) == [FILES["red/002.jpg"]]
    assert len(index_of(data(kind, {**HASHED, **NOTES}, tmp_path), layout="images")) == 6


def test_beside_images_with_a_suffix_files_without_one_are_left_out(tmp_path: Path) -> None:
    index = index_of(write_files(tmp_path, {**FILES, "blue/a9": FILES["blue/000.jpg"]}))
    assert sorted(index.keys) == sorted(FILES)


def test_files_without_a_suffix_that_are_no_images(tmp_path: Path) -> None:
    write_files(tmp_path, {"blue/a": b"text", "red/b": b"", "red/c": b"BM is a word"})
    with pytest.raises(DataError, match="no image under"):
        index_of(tmp_path)


@pytest.mark.parametrize("suffix", ["jfif", "JPE", "avif", "jp2", "heic", "HEIF"])
def test_less_common_suffixes(suffix: str, tmp_path: Path) -> None:
    write_files(tmp_path, {f"{name}.{suffix}": content for name, content in FILES.items()})
    assert len(index_of(tmp_path)) == 6


@pytest.mark.parametrize(
    ("file_format", "suffix"), [("JPEG", "jpg"), ("PNG", "png"), ("GIF", "gif"), ("BMP", "bmp"), ("TIFF", "tif"),
                         ("WEBP", "webp"), ("AVIF", "avif"), ("JPEG2000", "jp2")]
)  # fmt: skip
def test_formats_by_their_first_bytes(file_format: str, suffix: str) -> None:
    assert image_suffix(picture((1, 2, 3), 0, file_format=file_format)[:16]) == suffix
    assert image_suffix(picture((1, 2, 3), 0, file_format=file_format)[1:17]) is None
