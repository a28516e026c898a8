"""Classes that a configuration may name.

A class path in a configuration is a call: the parser imports the class and calls it with ``init_args``. A configuration
that the user names on the command line may use any class except those in :data:`DENIED`, which no trainer needs. From
a configuration in run_dir no class is imported; see :mod:`job.config.saved_config`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jsonargparse
import yaml

from job.config import bounded_yaml
from job.errors import ConfigError
from job.jsonargparse_internals import use_defaults_of_chosen_class

DENIED = (
    # commands, processes, signals
    *("os", "posix", "nt", "subprocess", "_posixsubprocess", "pty", "multiprocessing", "_multiprocessing", "signal"),
    *("concurrent", "threading", "_thread", "asyncio", "sched", "atexit", "pexpect", "plumbum", "invoke", "fabric"),
    *("torch.multiprocessing", "torch.distributed.run", "torch.distributed.launch", "torch.distributed.launcher"),
    *("torch.distributed.elastic", "psutil", "sh"),
    *("job.cli", "job.demo", "job.api", "job.fit", "job.cluster", "job.process", "job.__main__"),
    # code and imports
    *("builtins", "sys", "importlib", "_frozen_importlib", "_frozen_importlib_external", "_imp", "imp", "runpy"),
    *("code", "codeop", "pkgutil", "zipimport", "pydoc", "unittest", "doctest", "timeit", "trace", "pdb", "bdb"),
    *("cProfile", "profile", "site", "pip", "setuptools", "distutils", "pkg_resources", "venv", "ensurepip", "ast"),
    *("sysconfig", "py_compile", "compileall", "ctypes", "_ctypes", "cffi", "IPython", "torch.utils.cpp_extension"),
    *("torch.hub", "torch.package", "torch.ops", "torch.classes", "torch.testing", "torch.utils._pytree"),
    *("numpy.f2py", "numpy.distutils", "numpy.testing", "_pytest", "pytest", "jsonargparse", "pytorch_lightning.cli"),
    *("lightning", "numexpr", "sympy", "pandas"),
    # adapters that call something else later
    *("functools", "_functools", "operator", "_operator", "inspect", "types", "contextlib"),
    *("gc", "_sitebuiltins", "lightning_utilities"),
    # serialized objects
    *("pickle", "_pickle", "_compat_pickle", "marshal", "shelve", "dbm", "copyreg", "dill", "cloudpickle", "joblib"),
    *("torch.load", "torch.save", "torch.serialization", "torch.jit", "torch.export", "numpy.load", "numpy.save"),
    *("numpy.lib", "numpy.fromfile", "numpy.memmap", "yaml", "json", "toml", "tomllib", "safetensors", "msgspec"),
    # files, networks, terminals
    *("shutil", "pathlib", "tempfile", "glob", "io", "_io", "codecs", "fileinput", "mmap", "fcntl", "gzip", "bz2"),
    *("lzma", "zipfile", "tarfile", "sqlite3", "_sqlite3", "logging", "socket", "_socket", "ssl", "select"),
    *("socketserver", "http", "urllib", "xml", "xmlrpc", "wsgiref", "ftplib", "smtplib", "poplib", "imaplib"),
    *("nntplib", "telnetlib", "webbrowser", "antigravity", "requests", "httpx", "aiohttp", "urllib3", "fsspec"),
    *("gcsfs", "s3fs", "adlfs", "boto3", "botocore", "google", "paramiko", "resource", "faulthandler", "winreg"),
    *("job.storage", "pyarrow", "PIL"),
)
"""Modules and classes that are denied, with everything below them."""

PERMITTED = ("pytorch_lightning.cli.ReduceLROnPlateau",)
"""Exceptions to :data:`DENIED`."""

ALLOWED = (
    r"torch\.optim\.[A-Z]\w*",
    r"torch\.optim\.lr_scheduler\.[A-Z]\w*",
    r"pytorch_lightning\.cli\.ReduceLROnPlateau",
    r"pytorch_lightning\.loggers\.[A-Z]\w*",
    r"torchvision\.transforms\.v2\.[A-Z]\w*",
    r"job\.(checkpoint|data|features|model|monitoring|resilience|train)\.(\w+\.)?\w+\.[A-Z]\w*",
)
"""Regular expressions of well-known classes, which are skipped in a saved configuration without a message."""

CLASS_PATH = "class_path"
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def denying_entry(path: str) -> str | None:
    """The entry of :data:`DENIED` that an import path falls under, or None."""
    parts = path.strip().split(".")
    prefixes = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    if any(prefix in PERMITTED for prefix in prefixes):
        return None
    return next((prefix for prefix in prefixes if prefix in _DENIED), None)


def is_allowed(path: str) -> bool:
    """Whether a class of a saved configuration is well known."""
    return any(re.fullmatch(pattern, path) for pattern in ALLOWED)


def class_paths(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(key, class path) of every class that a nested configuration names by ``class_path``."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            below = f"{key}.{name}".strip(".")
            if name == CLASS_PATH:
                yield key, each if isinstance(each, str) else repr(each)
            else:
                yield from class_paths(each, below)
    elif isinstance(value, (list, tuple)):
        for number, each in enumerate(value):
            yield from class_paths(each, f"{key}[{number}]")


def dotted_strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(key, string) of every string that may be an import path."""
    return ((where, text) for where, text in _strings(value, key) if _DOTTED.fullmatch(text.strip()))


def require_permitted(config: Mapping[str, Any]) -> None:
    """Check that the user's configuration names no denied class.

    Raises:
        ConfigError: it names one.
    """
    # A bare string may stand for a class, too; outside of the trainer's options it is text.
    texts = dict(_strings(config.get("trainer"), "trainer"))
    named = [(key, text) for key, text in texts.items() if _DOTTED.fullmatch(text.strip())]
    for key, text in texts.items():
        # A class that does not fit stays the text that it was given as.
        if CLASS_PATH in text:
            with contextlib.suppress(yaml.YAMLError):
                named += class_paths(bounded_yaml.load(text), key)
    for key, path in [*class_paths(config), *named]:
        if denying_entry(path):
            raise ConfigError(denied_message(path, key))


def denied_message(path: str, key: str = "") -> str:
    """Error message for a denied class."""
    where = f"--{key}: " if key else ""
    return (
        f"{where}{path} is not allowed in a configuration: it can run commands, read files or load code, and no "
        "trainer needs it. Write a class of your own for what you need, and name that."
    )


def set_parsing_rules() -> None:
    """Give jsonargparse the list of denied classes and the bounded YAML loader, and classes their own defaults."""
    use_defaults_of_chosen_class()
    jsonargparse.set_parsing_settings(
        config_read_mode_fsspec_enabled=True,
        # The strategies of Lightning have parameters without a type that take objects, such as ddp_comm_state.
        instantiate_subclass_spec_in_any=True,
        import_path_denylist=list(DENIED),
        import_path_allowlist=list(PERMITTED),
    )
    loader = jsonargparse.get_loader("yaml")
    if not getattr(loader, "is_bounded", False):

        def bounded(text: str) -> Any:
            return bounded_yaml.load(text, loader)

        bounded.is_bounded = True  # type: ignore[attr-defined]
        jsonargparse.set_loader("yaml", bounded, (yaml.YAMLError,))


def _strings(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield from _strings(each, f"{key}.{name}")
    elif isinstance(value, (list, tuple)):
        for number, each in enumerate(value):
            yield from _strings(each, f"{key}[{number}]")


_DENIED = frozenset(DENIED)
