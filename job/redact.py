"""Credentials in URIs: removed from what is written or shown, kept in memory for the requests that need them.

The identity of a URI is the URI without its credentials. Indexes, caches, configurations and messages hold
identities. To open a URI call :func:`authorized`, which adds the credentials that the user gave in this process
or in the process that started it.
"""

from __future__ import annotations

import base64
import json
import os
import re
import threading
import zlib
from typing import Any
from urllib.parse import quote, unquote

HIDDEN = "***"
"""Replaces a credential."""
VARIABLE = "_JOB_CREDENTIALS"
"""Environment variable that hands the known credentials to child processes (loaders, ranks)."""
MOST_EXPORTED = 100_000
"""Characters of that variable; Linux allows 128 KiB."""
HTTP = ("http://", "https://")

_SCHEME = r"[A-Za-z][A-Za-z0-9+.\-]*://"
_PATH_BOUND = re.compile(
    r"(?i)^(x-goog-|x-amz-|googleaccessid$|awsaccesskeyid$|signature$|expires$|key-pair-id$|policy$)"
)
"""Parameters of a signature that covers one object."""
_SIGNING = re.compile(r"(?i)^(x-goog-signature|x-amz-signature|signature|sig)$")
_SAS = re.compile(
    r"(?i)^(sv|ss|srt|sr|sp|st|se|sip|spr|sig|si|sdd|skoid|sktid|skt|ske|sks|skv|saoid|suoid|scid|ses|rsc[cdelt])$"
)
"""Parameters of a shared access signature of Azure; they count as such beside ``sig``."""
_SECRET_NAMES = (
    r"sig|signature|token|[\w\-]*[_\-]token|key|[\w\-]*api[_\-]?key|[\w\-]*access[_\-]?key(?:[_\-]?id)?|account[_\-]?key|"
    r"secret|[\w\-]*[_\-]secret|secret[_\-]?key|[\w\-]*secret[_\-]access[_\-]key|password|passwd|pwd|pass|auth|"
    r"authorization|credential|credentials|code|jwt|bearer|sas|accesstoken|authtoken|apikey|private[_\-]?key|"
    r"client[_\-]?secret|connection[_\-]?string|x-goog-(?:signature|credential)|x-amz-(?:signature|credential|security-token)|"
    r"awsaccesskeyid|googleaccessid|key-pair-id"
)
_SECRET_PARAMETER = re.compile(rf"(?i)^(?:{_SECRET_NAMES})$")
# Names that are no common words: a class called "key" or a sentence with "token:" is no credential.
_OPTION_NAMES = (
    r"[\w\-]*access[_\-]?token|[\w\-]*auth[_\-]?token|[\w\-]*session[_\-]?token|[\w\-]*refresh[_\-]?token|sas[_\-]?token|"
    r"[\w\-]*api[_\-]?key|[\w\-]*account[_\-]?key|[\w\-]*secret[_\-]?(?:access[_\-]?)?key|[\w\-]*access[_\-]?key[_\-]?id|"
    r"[\w\-]*client[_\-]?secret|[\w\-]*private[_\-]?key|[\w\-]*connection[_\-]?string|[\w\-]*password|passwd|secret|"
    r"sharedaccess(?:key|signature)"
)
_OPTION = re.compile(rf"(?i)(?<![\w\-])((?:{_OPTION_NAMES})[\"']?\s*[:=]\s*)(\"[^\"]*\"|'[^']*'|[^\s,;&#)}}\]\"']+)")
_HEADER = re.compile(r"(?i)(\bauthorization[\"']?\s*[:=]\s*[\"']?)(?:(basic|bearer|aws4-hmac-sha256)\s+)?[^\s\"',]+")
_SCHEMED = re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9+/_.=\-]{16,}")
_KNOWN_FORMS = re.compile(
    r"\b(?:ya29\.[\w\-]{10,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|hf_[A-Za-z0-9]{20,}|eyJ[\w\-]{10,}\.[\w\-]+\.[\w\-]+)"
)
_PEM = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S)
# The last @ before the path; the secret of an S3 key may hold slashes.
_USERINFO = re.compile(rf"({_SCHEME})([^\s/?#\"'<>]*)@")
_S3_USERINFO = re.compile(r"\b((?:s3|s3a|s3n|gs|gcs|oss|cos|r2)://)([^\s/@:?#]+:[^\s@]+)@")
_PARAMETER = re.compile(r"([?&;]|%3F|%26)([\w.\-]+)=([^&\s\"'<>#]*)", re.I)

_lock = threading.Lock()
_known: dict[str, str] = {}
_literals: set[str] = set()
_loaded = False


def redact(text: str) -> str:
    """Replace every credential in ``text`` by ``***``: in URIs, headers, options, and those known by value."""
    _load()
    for literal in sorted(_literals, key=len, reverse=True):
        if literal in text:
            text = text.replace(literal, HIDDEN)
    if "://" in text:
        text = _S3_USERINFO.sub(rf"\1{HIDDEN}@", text)
        text = _USERINFO.sub(lambda m: f"{m[1]}{HIDDEN}@" if _is_secret_userinfo(m[1], m[2]) else m[0], text)
    if "=" in text:
        text = _redact_parameters(text)
    text = _HEADER.sub(lambda m: f"{m[1]}{HIDDEN}", text)
    text = _OPTION.sub(lambda m: f"{m[1]}{HIDDEN}", text)
    text = _SCHEMED.sub(rf"\1 {HIDDEN}", text)
    return _KNOWN_FORMS.sub(HIDDEN, _PEM.sub(HIDDEN, text))


def identity(uri: str) -> str:
    """``uri`` without its credentials, the same whatever they are; each part of a chained URI by itself."""
    if "://" not in uri:
        return uri
    return "::".join(_identity(part) for part in uri.split("::"))


def remember(uri: str) -> str:
    """Keep the credentials of ``uri`` for :func:`authorized`, here and in child processes; returns its identity."""
    if "://" not in uri:
        return uri
    _load()
    for part in uri.split("::"):
        plain = identity(part)
        with _lock:
            if plain != part and not is_redacted(part) and _known.get(plain) != part:
                _known[plain] = part
                _literals.update(_secrets(part))
                _export()
    return identity(uri)


def forget() -> None:
    """Forget all credentials."""
    with _lock:
        _known.clear()
        _literals.clear()
        os.environ.pop(VARIABLE, None)


def authorized(uri: str) -> str:
    """``uri`` with the credentials given for it, for a folder above it or for a neighbour; else unchanged."""
    _load()
    return "::".join(_authorized(part) for part in uri.split("::")) if _known and "://" in uri else uri


def saved_form(uri: str) -> str:
    """``uri`` as configurations save it: with ``***`` in place of its credentials, those given for it included."""
    return "::".join(redact(_known.get(identity(part), part)) if "://" in part else part for part in uri.split("::"))


def is_redacted(uri: str) -> bool:
    """Whether the credentials of ``uri`` were replaced by ``***``, as in a saved configuration."""
    return HIDDEN in uri and "://" in uri and identity(uri) != uri


def walk(value: Any, change: Any, key: str = "") -> Any:
    """A copy of nested lists and dictionaries in which ``change(key, string)`` replaces each string."""
    if isinstance(value, str):
        return change(key, value)
    if isinstance(value, dict):
        return {name: walk(each, change, f"{key}.{name}".strip(".")) for name, each in value.items()}
    if isinstance(value, list):
        return [walk(each, change, key) for each in value]
    return value


def split_query(uri: str) -> tuple[str, str]:
    """The URI of a web server before its ``?``, and its query from there on; others have none."""
    if not uri.startswith(HTTP) or "::" in uri:
        return uri, ""
    path, mark, query = uri.partition("?")
    return path, mark + query


def _authorized(uri: str) -> str:
    if "://" not in uri or identity(uri) != uri:
        return uri
    if uri in _known:
        return _known[uri]
    above = [known for known in _known if _path(uri).startswith(f"{_path(known).rstrip('/')}/")]
    if above:
        return _with_credentials(uri, _known[max(above, key=len)])
    shared = [known for known, full in _known.items() if _is_shared_by_folder(known, full)]
    neighbours = [known for known in shared if _path(uri).startswith(_folder(known))]
    return _with_credentials(uri, _known[max(neighbours, key=len)]) if neighbours else uri


def _identity(uri: str) -> str:
    uri = _S3_USERINFO.sub(r"\1", uri, count=1)
    uri = _USERINFO.sub(lambda m: m[1] if _is_secret_userinfo(m[1], m[2]) else m[0], uri, count=1)
    path, query = split_query(uri) if uri.startswith(HTTP) else _any_query(uri)
    if not query:
        return uri
    query, mark, fragment = query[1:].partition("#")
    parameters = query.split("&")
    names = [parameter.partition("=")[0] for parameter in parameters]
    signed = any(_SIGNING.match(name) for name in names)
    kept = [p for p, name in zip(parameters, names, strict=True) if not _is_credential(name, signed)]
    return path + (f"?{'&'.join(kept)}" if kept else "") + mark + fragment


def _any_query(uri: str) -> tuple[str, str]:
    """The query of a URI that is no web server's: a ``?`` may be part of a pattern, so only with credentials in it."""
    path, mark, query = uri.partition("?")
    names = [parameter.partition("=")[0] for parameter in query.split("&") if "=" in parameter]
    return (path, mark + query) if any(_is_credential(name, False) for name in names) else (uri, "")


def _is_credential(name: str, signed: bool) -> bool:
    """Whether a parameter is a credential; parameters of a signature are only beside one."""
    if _SECRET_PARAMETER.match(name) or re.match(r"(?i)^x-(goog|amz)-", name):
        return True
    return signed and (_SAS.match(name) is not None or _PATH_BOUND.match(name) is not None)


def _is_secret_userinfo(scheme: str, userinfo: str) -> bool:
    """Whether userinfo is secret: in HTTP a name alone may be a token; elsewhere it is a user or Azure container."""
    return ":" in userinfo or userinfo == HIDDEN or scheme.lower() in HTTP


def _is_shared_by_folder(plain: str, full: str) -> bool:
    """Whether credentials of this file (a password, an account's token) hold for its folder, as for a table's rows."""
    _, query = split_query(full)
    signs_one_object = any(_PATH_BOUND.match(parameter.partition("=")[0]) for parameter in query[1:].split("&"))
    return "." in _path(plain).rpartition("/")[2] and _path(plain).count("/") > 2 and not signs_one_object


def _redact_parameters(text: str) -> str:
    signed = "sig=" in text.lower() or "signature=" in text.lower()

    def hidden(match: re.Match[str]) -> str:
        return f"{match[1]}{match[2]}={HIDDEN}" if _is_credential(match[2], signed) else match[0]

    return _PARAMETER.sub(hidden, text)


def _secrets(uri: str) -> set[str]:
    """Secrets in ``uri`` that a library's message may contain by themselves, as given and decoded."""
    secrets = set()
    for match in [*_USERINFO.finditer(uri), *_S3_USERINFO.finditer(uri)]:
        if _is_secret_userinfo(match[1], match[2]):
            secrets |= {match[2], match[2].partition(":")[2]}
    for match in _PARAMETER.finditer(uri):
        if _SECRET_PARAMETER.match(match[2]) or re.match(r"(?i)^x-(goog|amz)-(sig|cred|security)", match[2]):
            secrets.add(match[3])
    decoded = {unquote(secret) for secret in secrets}
    # Libraries quote as they like; yarl, for one, leaves = and / alone.
    secrets |= decoded | {quote(secret, safe=safe) for secret in decoded for safe in ("", "/", "=", "/=", "/=+:")}
    return {secret for secret in secrets if len(secret) >= 6}  # shorter ones occur by chance


def _with_credentials(uri: str, model: str) -> str:
    """``uri`` with the user, the password and the parameters that ``model`` has and its identity has not."""
    if match := re.match(rf"({_SCHEME})([^/?#]*)@", model):
        uri = re.sub(rf"^{_SCHEME}", lambda m: f"{m[0]}{match[2]}@", uri, count=1)
    _, query = split_query(model)
    if not query:
        return uri
    parameters = query[1:].split("&")
    kept = set(split_query(identity(model))[1][1:].split("&"))
    added = [parameter for parameter in parameters if parameter not in kept]
    return f"{uri}{'&' if split_query(uri)[1] else '?'}{'&'.join(added)}" if added else uri


def _path(uri: str) -> str:
    return split_query(uri)[0]


def _folder(uri: str) -> str:
    """The folder of a file, with the slash at its end."""
    return _path(uri).rpartition("/")[0] + "/"


def _export() -> None:
    """Export the credentials to child processes."""
    from job.errors import ConfigError

    packed = base64.b64encode(zlib.compress(json.dumps(_known).encode())).decode()
    if len(packed) > MOST_EXPORTED:
        raise ConfigError(
            "too many URIs with credentials of their own. Name the data by one folder, pattern or table, or give "
            "credentials to the account the job runs as."
        )
    os.environ[VARIABLE] = packed


def _load() -> None:
    """Load the credentials that the parent process exported."""
    global _loaded
    if _loaded:
        return
    with _lock:
        try:
            packed = base64.b64decode(os.environ.get(VARIABLE, ""))
            known = json.loads(zlib.decompress(packed)) if packed else {}
        except (ValueError, zlib.error):
            known = {}
        if isinstance(known, dict):
            for plain, full in known.items():
                if isinstance(full, str):
                    _known[plain] = full
                    _literals.update(_secrets(full))
        _loaded = True
