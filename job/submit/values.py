"""Checks of what the user calls a run and its parts, before any of it is written into a manifest."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from job import redact
from job.errors import ConfigError
from job.process.terminal import escape

NAME_CHARACTERS = 38
"""Kubernetes allows 63 for the name of a pod; a JobSet's pods end with "-train-slice-99-999-x7k2p"."""

_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
"""RFC 1035, which Services demand: stricter than RFC 1123 in its first character."""
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_IMAGE = re.compile(
    r"(?P<name>(?:[A-Za-z0-9][A-Za-z0-9.-]*(?::[0-9]+)?/)?[a-z0-9]+(?:[._/-]+[a-z0-9]+)*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_EMAIL = re.compile(r"[A-Za-z0-9._+-]+@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)+")
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://[^/]")
_OF_THIS_MACHINE = ("file", "local", "memory")


@dataclass(frozen=True)
class Image:
    """A container image.

    Attributes:
        name: registry and repository.
        tag: or empty.
        digest: ``sha256:…``, or empty.
    """

    name: str
    tag: str = ""
    digest: str = ""

    def __str__(self) -> str:
        return self.name + (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")


def require_name(name: str) -> str:
    """The name of a run.

    Raises:
        ConfigError: no Service or pod could have this name.
    """
    if len(name) > NAME_CHARACTERS:
        raise ConfigError(
            f"--name {escape(name[:100])} has {len(name)} characters; at most {NAME_CHARACTERS} leave room for what "
            "Kubernetes adds to the names of pods."
        )
    if not _LABEL.fullmatch(name):
        proposal = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        proposal = proposal if _LABEL.fullmatch(proposal) else f"run-{proposal}".rstrip("-")
        raise ConfigError(
            f"--name {escape(repr(name))} is no name for Kubernetes, which takes lower-case letters, digits and "
            f"hyphens, a letter first and no hyphen last. {proposal} would be one."
        )
    return name


def require_object_name(option: str, name: str) -> str:
    """The name of a namespace, queue or service account, which exists already.

    Raises:
        ConfigError: no object has such a name.
    """
    if len(name) > 253 or not _SUBDOMAIN.fullmatch(name):
        raise ConfigError(
            f"--{option} {escape(repr(name[:100]))} is no name of Kubernetes, which takes lower-case letters, digits, "
            "hyphens and dots."
        )
    return name


def require_email(option: str, email: str) -> str:
    """The address of an account of Google Cloud.

    Raises:
        ConfigError: it is no address.
    """
    if not _EMAIL.fullmatch(email):
        raise ConfigError(
            f"--{option} {escape(repr(email[:100]))}: Vertex AI takes the address of a service account, such as "
            "train@my-project.iam.gserviceaccount.com."
        )
    return email


def require_image(image: str) -> Image:
    """The parts of an image's reference.

    Raises:
        ConfigError: it is no reference, or has neither tag nor digest.
    """
    match = _IMAGE.fullmatch(image) if len(image) <= 512 else None
    if match is None:
        raise ConfigError(
            f"--image {escape(repr(image[:200]))} is no image, which is written REGISTRY/REPOSITORY:TAG, such as "
            "europe-west4-docker.pkg.dev/my-project/job/job:gpu."
        )
    if not match["tag"] and not match["digest"]:
        raise ConfigError(
            f"--image {image} has no tag, and would be whatever is pushed last when a pod is replaced. Give one, such "
            f"as {image}:gpu."
        )
    return Image(match["name"], match["tag"] or "", match["digest"] or "")


def require_bucket(option: str, uri: str) -> str:
    """A URI that pods can read.

    Raises:
        ConfigError: it is a path of this machine.
    """
    scheme = _SCHEME.match(uri)
    if scheme is None or scheme[1] in _OF_THIS_MACHINE:
        raise ConfigError(
            f"--{option} {escape(uri[:200])} is of this machine, and pods are on others. Give the URI of a bucket, "
            "such as gs://my-bucket/…."
        )
    if escape(uri) != uri or any(character.isspace() for character in uri):
        raise ConfigError(f"--{option} {escape(uri[:200])} has spaces or control characters.")
    return uri


def require_public(values: Any) -> None:
    """Check that nothing in nested lists and dictionaries is secret or unprintable.

    Manifests can be read by everyone who may read the namespace.

    Raises:
        ConfigError: a string holds a credential or control characters.
    """

    def check(key: str, text: str) -> str:
        where = f"--{key}" if key else "an option of fit"
        if redact.identity(text) != text or redact.redact(text) != text:
            raise ConfigError(
                f"{where} {escape(redact.redact(text)[:200])} holds a credential, which everyone could read in the "
                "cluster. Give the rights to the service account that the pods run as, and leave it out here."
            )
        if escape(text, newlines=True) != text.replace("\n", "\n    "):
            raise ConfigError(f"{where} has control characters: {escape(text[:200])}")
        return text

    redact.walk(values, check)
