"""The configuration saved in run_dir, as ``validate`` and ``test`` read it.

The file is untrusted: anyone who may write to run_dir may change it. Only plain values of the declared types of the
model, data and checkpoint options are used. No class that it names is imported: evaluation needs none, and the
checkpoint holds the network. Skipped settings are logged.
"""

from __future__ import annotations

import inspect
import logging
import typing
from collections.abc import Iterator
from typing import Any, Literal

import msgspec

from job import redact, storage, typed
from job.checkpoint.settings import CheckpointSettings
from job.config.import_policy import class_paths, denying_entry, dotted_strings, is_allowed
from job.config.run_config import FILE, REPAIR_HINT, read_mapping
from job.data.datamodule import ImageDataModule
from job.data.index.access import Access, is_local_uri
from job.errors import ConfigError
from job.model.config import ModelConfig

log = logging.getLogger(__name__)

_Word = typing.Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.\-]{1,32}\Z")]
_TRAINER: dict[str, Any] = {
    "accelerator": _Word,
    "precision": _Word | int | None,
    "limit_val_batches": float | int | None,
    "limit_test_batches": float | int | None,
    "deterministic": bool | Literal["warn"] | None,
    "benchmark": bool | None,
    "inference_mode": bool,
    "enable_progress_bar": bool | None,
}
"""Trainer arguments that evaluation uses; the others concern training."""
_SECTIONS: dict[str, Any] = {"model": ModelConfig, "data": ImageDataModule, "checkpoint": CheckpointSettings}
_TRAINING_ONLY = frozenset(
    {
        *("model.lr", "model.optimizer", "model.lr_scheduler", "model.lr_gamma", "model.lr_interval", "model.weights"),
        *("data.augment", "data.augment_views"),
    }
)
"""Options that evaluation does not use."""
_NEVER_SAVED = frozenset(["data.cache_dir", "data.allow"])
"""Local paths, and permissions that only the user may give."""
_SOURCES = frozenset(["data.root", "data.train", "data.val", "data.test"])
"""Options with URIs to read; see :class:`~job.data.index.access.Access`."""
_OTHER_COMMANDS = frozenset(
    ["run_dir", "resume", "grace", "profile", "early_stopping", "init_from", "watchdog", "features", "lr", "lr_finder"]
)


def read_saved_config(run_dir: str, *, trains: bool = False) -> dict[str, Any] | None:
    """The plain values of ``run_dir/config.yaml`` that evaluation uses, or None if there is no such file.

    Args:
        run_dir: of the run.
        trains: return ``model.weights``, too, and log that ``data.augment`` is not used; evaluation needs neither.

    Raises:
        ConfigError: it is damaged, too large, of another version, or names a class that can run commands.
        StorageError: it cannot be read, though it may exist.
    """
    uri = storage.join(run_dir, FILE)
    if not storage.exists(uri):
        return None
    return _plain_values(uri, read_mapping(uri), trains=trains)


def _plain_values(uri: str, tree: dict[str, Any], *, trains: bool) -> dict[str, Any]:
    """Select the values to use; log the skipped settings.

    Raises:
        ConfigError: a key or value is unknown, or a class is denied.
    """
    for key, path in [*class_paths(tree), *dotted_strings(tree.get("trainer"), "trainer"), *_callables(tree)]:
        if entry := denying_entry(path):
            raise ConfigError(
                f"{uri}: {key} names {path} ({entry} can run commands or read files): somebody may have changed this "
                f"file. Look at it, and give your own settings by --config FILE."
            )
    values: dict[str, Any] = {}
    skipped: list[str] = []
    for name, section in tree.items():
        if name == "seed_everything":
            values[name] = _checked(uri, name, section, bool | int | None)
        elif name == "trainer" or name in _SECTIONS:
            if not isinstance(section, dict):
                raise ConfigError(f"{uri} is damaged: {name} holds no options. {REPAIR_HINT}")
            types = _TRAINER if name == "trainer" else _types(_SECTIONS[name])
            values[name] = dict(_section(uri, name, section, types, skipped))
            if name == "data" and trains and section.get("augment") is not None:
                skipped[:] = [*(each for each in skipped if not each.startswith("data.augment (")), "data.augment"]
            if name == "model" and trains and "weights" in section:
                values[name] |= _saved_weights(uri, section["weights"], skipped)
        elif name not in _OTHER_COMMANDS:
            raise _unknown(uri, name)
    if skipped:
        log.warning(
            "%s: %d setting(s) that name classes, local folders or permissions are not used: %s. To use them, give "
            "these options again, or --config %s",
            uri,
            len(skipped),
            ", ".join(skipped),
            uri,
        )
    return values


def _section(
    uri: str, name: str, section: dict[Any, Any], types: dict[str, Any], skipped: list[str]
) -> Iterator[tuple[str, Any]]:
    for option, value in section.items():
        key = f"{name}.{option}"
        if option in types and key not in _TRAINING_ONLY and key not in _NEVER_SAVED:
            converted = _checked(uri, key, value, types[option])
            if key in _SOURCES and (refused := _refused_sources(uri, converted)):
                skipped.append(f"{key} ({refused})")
            else:
                yield option, converted
        elif name != "trainer" and option not in types:
            raise _unknown(uri, key)
        elif value is not None and (names := _values_to_mention(key, value)):
            skipped.append(f"{key} ({', '.join(names)})")


def _refused_sources(uri: str, value: str | list[str] | None) -> str | None:
    """The first URI that a saved configuration may not name, with the reason; None if all are permitted."""
    for source in [value] if isinstance(value, str) else value or []:
        if redact.is_redacted(source):
            continue  # refused by the parser, which names the option to give again
        if reason := Access().problem_of_host(source, local=is_local_uri(uri), filesystem_of=uri):
            return f"{source} {reason}"
    return None


def _saved_weights(uri: str, value: Any, skipped: list[str]) -> dict[str, str]:
    """The option ``model.weights``, unless it is a URI that a saved configuration may not name."""
    weights = str(_checked(uri, "model.weights", value, str))
    refused = None if weights in ("DEFAULT", "none") else _refused_sources(uri, weights)
    if refused:
        skipped.append(f"model.weights ({refused})")
        return {}
    return {"weights": weights}


def _values_to_mention(key: str, value: Any) -> list[str]:
    """Values to mention in the log when a setting is skipped: the user's own classes, and folders."""
    if key in _NEVER_SAVED:
        return [str(value)[:200]]
    if key == "model.weights":
        return []  # the checkpoint brings them
    named = {path for _, path in [*class_paths(value), *dotted_strings(value)]}
    return sorted(path for path in named if not is_allowed(path))


def _callables(tree: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Strings in or in place of a class's arguments that may be import paths."""
    for key in sorted(_TRAINING_ONLY - {"model.weights"}):
        section, _, option = key.partition(".")
        if isinstance(tree.get(section), dict):
            yield from dotted_strings(tree[section].get(option), key)


def _types(owner: Any) -> dict[str, Any]:
    """The declared types of a class's options."""
    hints = typing.get_type_hints(owner.__init__)
    return {name: hints[name] for name in inspect.signature(owner.__init__).parameters if name in hints}


def _checked(uri: str, key: str, value: Any, kind: Any) -> Any:
    """Check the type of a value and return it.

    Raises:
        ConfigError: it is of another type.
    """
    try:
        typed.from_builtins(value, kind)
    except (msgspec.ValidationError, TypeError) as error:
        raise ConfigError(f"{uri} is damaged: {key}: {_one_line(error)}. {REPAIR_HINT}") from error
    return value


def _unknown(uri: str, key: str) -> ConfigError:
    return ConfigError(
        f"{uri} has the key {key!r}, which this version of job does not know. Use the version that trained the "
        "run, or give the settings by --config FILE."
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
