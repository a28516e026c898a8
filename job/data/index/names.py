"""Names: the one spelling of each key by which parts, classes and hidden files are found.

A sample is read by its key, as its source spells it. Everything else looks at its name, so that all sources behave
alike, whatever tool wrote them.
"""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_UNUSUAL = r"[^\x00-\x7f]|\\|//|(^|/)\.\.?/|^[/\s]|\s/|/\s"
"""Keys whose name may differ from them."""
_SYSTEM_NAMES = (
    "__MACOSX",
    "__pycache__",
    "@eaDir",
    "@tmp",
    "@Recycle",
    "#recycle",
    "#snapshot",
    r"\$RECYCLE\.BIN",
    "System Volume Information",
    r"lost\+found",
    r"Thumbs\.db",
    r"ehthumbs\.db",
    r"desktop\.ini",
)
_HIDDEN = rf"(?i)(^|/)(\.|({'|'.join(_SYSTEM_NAMES)})(/|$))"
_NOT_UTF8 = re.compile("[\ud800-\udfff]")


def normalise(keys: pa.Array) -> pa.Array:
    """The names of ``keys``, string [N].

    ``/`` separates folders (not ``\\``), none of which is empty, ``.`` or ``..``; blanks around a folder's name are
    removed; Unicode is composed (NFC), so that a name from macOS equals the same name from Linux.
    """
    if not pc.any(pc.match_substring_regex(keys, _UNUSUAL)).as_py():
        return keys
    names = pc.utf8_normalize(pc.replace_substring(keys, "\\", "/"), form="NFC")
    for pattern, replacement in ((r"\s*/\s*", "/"), (r"/{2,}", "/"), (r"/(\.\.?/)+", "/"), (r"^(\s|\.\.?/|/)+", "")):
        names = pc.replace_substring_regex(names, pattern, replacement)
    return names


def normalise_labels(labels: pa.ChunkedArray) -> pa.ChunkedArray:
    """Class names as :func:`normalise` would spell them as folders: composed, and without blanks around them."""
    labels = pc.utf8_trim_whitespace(pc.utf8_normalize(labels, form="NFC"))
    return pc.if_else(pc.equal(labels, ""), None, labels)


def normalise_label_lists(lists: pa.ListArray) -> pa.ListArray:
    """:func:`normalise_labels` of lists of them."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    offsets = np.append(0, lengths.cumsum()).astype(np.int32)
    values = normalise_labels(pc.list_flatten(lists))
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=pc.is_null(lists))


def folder_of(names: pa.ChunkedArray) -> pa.ChunkedArray:
    """The part of each name before its last slash; empty where there is none."""
    pieces = pc.split_pattern(names, "/", max_splits=1, reverse=True)
    return pc.if_else(pc.greater(pc.list_value_length(pieces), 1), pc.list_element(pieces, 0), "")


def is_hidden(names: pa.Array) -> pa.Array:
    """Whether some folder in a name, or the file itself, is hidden or belongs to a system; bool [N]."""
    return pc.match_substring_regex(names, _HIDDEN)


def visible_folders(names: pa.Array) -> pa.Array:
    """The names of hidden files up to the first hidden folder; string [N], each empty or with a slash at its end."""
    return pc.replace_substring_regex(names, f"(?s){_HIDDEN}.*", r"\1")


def is_hidden_name(name: str) -> bool:
    """:func:`is_hidden` of one name."""
    return re.search(_HIDDEN, name) is not None


def is_utf8(key: str) -> bool:
    """Whether a key can be stored; disks and archives hold names of any bytes, which Python spells with surrogates."""
    return key.isascii() or _NOT_UTF8.search(key) is None


def printable(key: str) -> str:
    """A key with bytes that are not UTF-8 as ``%NN``: a backslash would separate folders."""
    return key if is_utf8(key) else _NOT_UTF8.sub(lambda match: f"%{ord(match[0]) & 0xFF:02X}", key)
