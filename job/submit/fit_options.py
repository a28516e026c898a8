"""The options of fit that follow ``--``: checked by fit's own parser before anything is applied."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.cli.arguments import TRAINING_ALIASES, canonical_arguments
from job.cli.known_options import option_names, require_known_options
from job.cli.parser import ENV_PREFIX
from job.config import recipes
from job.errors import ConfigError
from job.process import log_format, temporary
from job.process.terminal import escape
from job.submit.overlay import CONFIG_FOLDER, Overlay, arguments_of
from job.submit.values import require_public

TERMINATION_SECONDS = 2
"""Least difference between ``--grace`` and the moment at which a pod is killed: the ranks and the launcher end."""
_OWN = {"run_dir": "run_dir", "data.root": "data"}
"""Options of fit that submit has itself."""
_REQUESTS = ("help", "help-all", "print_config", "version")
_SOURCES = ("data.train", "data.val", "data.test", "data.root", "model.weights")
"""Options that name what the pods read."""


@dataclass(frozen=True)
class FitOptions:
    """Options of fit as the pods get them.

    Attributes:
        args: arguments.
        files: text of the configuration files that ``args`` name, by the name they have in the pods.
    """

    args: tuple[str, ...]
    files: Mapping[str, str]


def from_arguments(args: Sequence[str]) -> FitOptions:
    """The arguments that follow ``--``, each as ``--name=value``; configuration files are read.

    Raises:
        ConfigError: an option does not exist, is not for pods, or is submit's own.
    """
    require_known_options("fit", args)
    canonical = canonical_arguments(
        args, options=option_names("fit"), aliases=TRAINING_ALIASES, positional=("run_dir",)
    )
    require_public(canonical)
    result, files = [], dict[str, str]()
    for argument in canonical:
        name, equals, value = argument.removeprefix("--").partition("=")
        if name in _REQUESTS:
            raise ConfigError(f"--{name} starts no training. Run python -m job fit --{name}.")
        _require_not_local(name, value)
        if name == "config" and equals:
            if Path(value).parent == recipes.FOLDER:
                argument = f"--config={Path(value).stem}"
            else:
                file = f"fit-{len(files) + 1}.yaml"
                files[file] = _read(value)
                argument = f"--config={CONFIG_FOLDER}/{file}"
        result.append(argument)
    return FitOptions(tuple(result), files)


def check_names(options: Mapping[str, Any], args: Sequence[str], *, has_data: bool) -> None:
    """Check options of fit against those of submit.

    Args:
        options: as in one of fit's configuration files.
        args: arguments of fit, each as ``--name=value``.
        has_data: ``--data`` says already where the images are.

    Raises:
        ConfigError: an option is not for pods, or given twice.
    """
    pairs = list(_flat(options))
    for name, value in pairs:
        if isinstance(value, str):
            _require_not_local(name, value)
    for name in [*(name for name, _ in pairs), *(argument[2:].partition("=")[0] for argument in args)]:
        own = _OWN.get(name)
        if own is not None and (own != "data" or has_data):
            raise ConfigError(f"--{name} of fit is --{own} of submit. Give it once, before the --.")


def flags_of(options: Mapping[str, Any]) -> list[str]:
    """A mapping of options as arguments, for where there is no file."""
    return [
        f"--{name}={value if isinstance(value, str) else json.dumps(value, allow_nan=False)}"
        for name, value in _flat(options)
    ]


def check(overlay: Overlay) -> None:
    """Parse the arguments and files of the pods by fit's own parser, and look up the backbone.

    Raises:
        ConfigError: fit would refuse them.
    """
    (config_map,) = (manifest for manifest in overlay.manifests if manifest["kind"] == "ConfigMap")
    pod = overlay.workload["spec"].get("template", {}).get("spec", {})
    termination = pod.get("terminationGracePeriodSeconds")
    check_arguments(arguments_of(overlay), config_map["data"], termination)


def check_arguments(args: Sequence[str], files: Mapping[str, str], termination: float | None = None) -> None:
    """Parse arguments of ``python -m job`` by fit's own parser.

    Args:
        args: ``launch fit`` and its options.
        files: text of the files in :data:`~job.submit.overlay.CONFIG_FOLDER` by name.
        termination: seconds after which a pod that is being stopped is killed.

    Raises:
        ConfigError: fit would refuse them.
    """
    # torch takes seconds to import: not for --help or a misspelt option.
    from job.cli.training import TrainingCLI
    from job.model.backbone import TIMM, build_skeleton

    folder = temporary.folder("submit")
    try:
        for name, text in files.items():
            (folder / name).write_text(text)
        local = [argument.replace(f"={CONFIG_FOLDER}/", f"={folder}/", 1) for argument in args[2:]]
        with shell_options_removed():
            cli = TrainingCLI("fit", local)
        backbone = cli.model_config.backbone
        with contextlib.suppress(ImportError):
            if backbone.startswith(TIMM):
                import timm  # noqa: F401  # the image may have it where this machine has not
            build_skeleton(backbone, cli.datamodule.image_size, cli.model_config.pooling)
    except ConfigError as error:
        raise ConfigError(f"fit refuses its options: {str(error).replace(f'{folder}/', '')}") from error
    finally:
        temporary.remove(folder)
    grace = float(cli.config_init["grace"])
    if termination is not None and grace > termination - TERMINATION_SECONDS:
        raise ConfigError(
            f"--grace {grace:g}: the pods of this run are killed {termination:g} s after the signal. Give at most "
            f"{termination - TERMINATION_SECONDS:g}."
        )


@contextlib.contextmanager
def shell_options_removed() -> Iterator[None]:
    """While the context lasts, remove the variables by which this shell configures fit: the pods do not have them."""
    kept = {log_format.VARIABLE, "JOB_LOG_SECONDS"}
    names = [name for name in os.environ if name.startswith(f"{ENV_PREFIX}_") and name not in kept]
    removed = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(removed)


def _require_not_local(name: str, value: str) -> None:
    if name in _SOURCES and "://" not in value and _exists(value):
        raise ConfigError(
            f"--{name} {escape(value)} is of this machine, and pods are on others. Upload it to a bucket, and "
            "give its URI."
        )


def _exists(path: str) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return Path(path).expanduser().exists()
    return False


def _read(path: str) -> str:
    try:
        text = Path(path).expanduser().read_text()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"--config {escape(path)} cannot be read: {reason}.") from error
    require_public({"config": text})
    return text


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in options.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
