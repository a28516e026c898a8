"""The lists of pinned dependencies fit setup.cfg and one another."""

from __future__ import annotations

import configparser
import re
import sysconfig
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parents[2]
EXTRAS = {
    "dev": ["dev"],
    "cpu": ["container", "demo", "s3", "serve"],
    "gpu": ["container", "timm", "s3", "serve"],
    "tpu": ["container", "tpu", "timm"],
    "tpu-dev": ["tpu-dev"],
}
"""The extras of setup.cfg that a list is for."""


def pinned(name: str) -> dict[str, Requirement]:
    """The requirements of a list, by name; each has a hash."""
    text = (REPOSITORY / "requirements" / f"{name}.txt").read_text().replace("\\\n", " ")
    found = {}
    for line in text.splitlines():
        requirement, *hashes = line.split("--hash=")
        assert hashes, f"{requirement} has no hash"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each.strip()) for each in hashes)
        parsed = Requirement(requirement)
        assert [each.operator for each in parsed.specifier] == ["=="]
        found[parsed.name] = parsed
    return found


def version(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    return specifier.version


def wanted(extras: list[str]) -> list[Requirement]:
    """The requirements in setup.cfg, with those of the extras that an extra names."""
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    lines = config["options"]["install_requires"].split("\n")
    names = list(extras)
    for name in names:
        for line in config["options.extras_require"][name].split("\n"):
            if own := re.fullmatch(r"job\[(.*)\]", line):
                names += own[1].split(",")
            else:
                lines.append(line)
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("name", EXTRAS)
def test_a_list_fulfils_setup_cfg(name: str) -> None:
    found = pinned(name)
    for requirement in wanted(EXTRAS[name]):
        own = requirement.name.lower().replace("_", "-")
        assert own in found, f"make lock: {own} is missing"
        assert version(found[own]) in requirement.specifier, f"make lock: {requirement}"


@pytest.mark.parametrize(("image", "tests"), [("cpu", "dev"), ("gpu", "dev"), ("tpu", "tpu-dev")])
def test_images_have_the_versions_that_are_tested(image: str, tests: str) -> None:
    tested = pinned(tests)
    for name, requirement in pinned(image).items():
        if name != "dumb-init":
            assert version(requirement) == version(tested[name]), name


def test_what_is_installed_for_the_tests_is_in_their_list() -> None:
    from importlib.metadata import distributions

    found = {name: version(each) for name, each in pinned("dev").items() if _applies(each)}
    # Of this folder: setuptools adds one of its own packages to the path.
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    installed = {
        each.name.lower().replace("_", "-").replace(".", "-"): each.version for each in distributions(path=folders)
    }
    assert {name: installed.get(name) for name in found} == found


def test_the_base_image_is_named_by_digest() -> None:
    dockerfile = (REPOSITORY / "docker" / "Dockerfile").read_text()
    (base,) = re.findall(r"^ARG BASE=(.*)$", dockerfile, re.MULTILINE)
    assert re.fullmatch(r"docker.io/library/python:3\.11\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", base)


def _applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({**default_environment(), "extra": ""})
