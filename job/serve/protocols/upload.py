"""Image files as they are: ``multipart/form-data``, as browsers and ``curl -F`` send it."""

from __future__ import annotations

from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from job.serve.errors import RequestError
from job.serve.protocols.instances import Parameters, require_count
from job.serve.protocols.json_body import decode_json

MOST_FIELDS = 8
"""Parts of a form beside the files, those that hold nothing included."""
MOST_FIELD_BYTES = 1024


@dataclass(frozen=True)
class UploadedFile:
    """A file of a form.

    Attributes:
        name: as the client calls it; for display only.
        content: the image file.
    """

    name: str
    content: bytes


class _Form:
    """Collects the parts of a form; the parser calls its methods.

    Args:
        max_instances: files of the largest request.
    """

    def __init__(self, max_instances: int) -> None:
        self.max_instances = max_instances
        self.files: list[UploadedFile] = []
        self.fields: dict[str, bytes] = {}
        self.parts = 0
        self.is_complete = False
        self._begin()

    def _begin(self) -> None:
        self._headers: list[tuple[bytes, bytes]] = []
        self._name, self._value, self._content = b"", b"", bytearray()

    def on_part_begin(self) -> None:
        self.parts += 1
        if self.parts > self.max_instances + MOST_FIELDS:
            raise RequestError(
                413, f"the form holds more than {self.max_instances} files (--max_instances) and {MOST_FIELDS} fields."
            )
        self._begin()

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        self._headers.append((self._name.lower(), self._value))
        self._name, self._value = b"", b""

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._content += data[start:end]

    def on_part_end(self) -> None:
        kind, options = parse_options_header(dict(self._headers).get(b"content-disposition", b""))
        if kind.lower() != b"form-data" or b"name" not in options:
            raise RequestError(400, "a part of the form has no name.")
        content = bytes(self._content)
        if b"filename" in options:
            name = options[b"filename"].decode(errors="replace")
            if name or content:  # a browser sends an empty part for a field without a file
                self.files.append(UploadedFile(name[:200], content))
        else:
            self.fields[options[b"name"].decode(errors="replace")[:64]] = content[:MOST_FIELD_BYTES]

    def on_end(self) -> None:
        self.is_complete = True


def read_form(body: bytes, content_type: str, max_instances: int) -> tuple[list[UploadedFile], Parameters]:
    """Files and options of a form: each part with a file name is an image; the field ``top_k`` is an option.

    Raises:
        RequestError: it is no such form, or has too many files.
    """
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary or len(boundary) > 256:
        raise RequestError(400, "the Content-Type of the form has no boundary.")
    form = _Form(max_instances)
    names = ("part_begin", "header_field", "header_value", "header_end", "part_data", "part_end", "end")
    try:
        parser = MultipartParser(boundary, {f"on_{name}": getattr(form, f"on_{name}") for name in names})  # type: ignore[arg-type]
        parser.write(body)
        parser.finalize()
    except FormParserError:
        raise RequestError(400, "the body is no multipart/form-data.") from None
    if not form.is_complete:
        raise RequestError(400, "the form ends too early.")
    require_count(len(form.files), max_instances)
    top_k = form.fields.get("top_k", b"").strip()
    parameters = decode_json(b'{"top_k":%s}' % top_k, Parameters, most_values=8) if top_k else Parameters()
    return form.files, parameters
