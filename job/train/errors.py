"""Translate what torch and Lightning raise into errors that a user can act on."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator

from yaml.representer import RepresenterError

from job.cluster import ranks
from job.errors import DISK_FULL, ConfigError, DeviceError, JobError, StorageError

log = logging.getLogger(__name__)

# Errors are recognised by the names of their classes: commands that do not use torch or Lightning do not import them.
_OUT_OF_MEMORY = "torch.OutOfMemoryError"
_ACCELERATOR_ERROR = "torch.AcceleratorError"
_MISCONFIGURATION = "lightning_fabric.utilities.exceptions.MisconfigurationException"
_OPTION_CHECKS = ("pytorch_lightning", "lightning_fabric", "lightning_utilities", "torch.optim", "jsonargparse")
"""Packages that raise an error of their own when an option's value does not suit them."""
_REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError, ImportError, AssertionError)


@contextlib.contextmanager
def translate_errors(global_batch_size: int | None = None) -> Iterator[None]:
    """Raise :func:`translated` errors in the place of torch's and Lightning's.

    Args:
        global_batch_size: images in a batch, of which this rank holds its share.
    """
    try:
        yield
    except Exception as error:
        if (better := translated(error, global_batch_size)) is error:
            raise
        raise better from error


def translated(error: Exception, global_batch_size: int | None = None) -> Exception:
    """A :class:`~job.errors.JobError` for a known kind of error, by its type and origin; else the error itself."""
    if isinstance(error, JobError):
        return error
    message = str(error).strip()
    first_line = message.splitlines()[0] if message else type(error).__name__
    images = (
        "the images of a step" if global_batch_size is None else f"{global_batch_size // ranks.world_size()} images"
    )
    kinds = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY in kinds or "can't allocate memory" in message:
        return ConfigError(
            f"{images} at once need more memory than this process has. Use more processes, a smaller "
            "--data.global_batch_size (with --trainer.accumulate_grad_batches for the same step) or "
            "--trainer.precision=bf16-mixed; python -m job tune measures how many fit. "
            f"The cause: {first_line}"
        )
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return StorageError(
            f"a disk of this machine is full ({first_line}). Make room there; or, if it is that of temporary files, "
            f"{tempfile.gettempdir()}, set TMPDIR to a folder on a larger disk."
        )
    if isinstance(error, ValueError) and "Expected more than 1 value per channel" in message:  # batch_norm
        return ConfigError(
            f"the backbone's batch normalisation cannot learn from {images} per process of this size. "
            "Use a larger --data.global_batch_size or --data.image_size, or fewer processes."
        )
    if _ACCELERATOR_ERROR in kinds:
        if "invalid device ordinal" in message:
            return ConfigError(
                f"this process has no GPU of its own ({first_line}). Start one process per GPU: torchrun "
                "--nproc-per-node, or LAUNCH_PROCESSES."
            )
        log.error("the accelerator failed:", exc_info=error)
        return DeviceError(f"the accelerator failed: {first_line}. The traceback above shows at which operation.")
    if _MISCONFIGURATION in kinds:
        return ConfigError(_refusal("Lightning", message))
    if isinstance(error, RepresenterError):
        return ConfigError(
            f"the configuration holds a value that cannot be saved as YAML ({' '.join(message.split())}). Give "
            "numbers, text, lists and mappings alone."
        )
    package = next((name for name in _OPTION_CHECKS if (_origin(error) + ".").startswith(name + ".")), None)
    if package is not None and isinstance(error, _REFUSALS):
        return ConfigError(_refusal("Lightning" if "lightning" in package else package, message or first_line))
    return error


def _origin(error: BaseException) -> str:
    """Name of the module that raised ``error``."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return "" if traceback is None else str(traceback.tb_frame.f_globals.get("__name__", ""))


def _refusal(library: str, message: str) -> str:
    text = " ".join(message.split())
    return f"{library} refuses these options: {text.removesuffix('.')}. Change or omit the option that this names."
