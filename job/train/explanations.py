"""What torch says of a batch that cannot be trained on, in the words of the command line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from job.cluster import ranks
from job.errors import ConfigError


@contextlib.contextmanager
def explained(global_batch_size: int) -> Iterator[None]:
    """Within, this rank's share of a batch may be too large or too small.

    Raises:
        ConfigError: it was.
    """
    images = global_batch_size // ranks.world_size()
    try:
        yield
    except (RuntimeError, ValueError) as error:
        said = str(error)
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in said:
            raise ConfigError(
                f"{images} images at once need more memory than this process has. Use more processes, a smaller "
                "--data.global_batch_size (with --trainer.accumulate_grad_batches for the same step) or "
                "--trainer.precision=bf16-mixed; python -m job tune measures how many fit. "
                f"torch says: {said.splitlines()[0]}"
            ) from error
        if "Expected more than 1 value per channel" in said:  # torch.nn.functional.batch_norm
            raise ConfigError(
                f"the backbone's batch normalisation cannot learn from {images} image(s) a process of this size. "
                "Use a larger --data.global_batch_size or --data.image_size, or fewer processes."
            ) from error
        raise
