"""Arguments of the Trainer that this package sets, or that would break an exact resume."""

from __future__ import annotations

from job.errors import ConfigError

RESERVED = {
    "default_root_dir",
    "use_distributed_sampler",
    "num_sanity_val_steps",
    "enable_model_summary",
    "enable_checkpointing",
    "barebones",
    "model_registry",
    "enable_autolog_hparams",
    "devices",
    "num_nodes",
    "max_steps",
    "min_steps",
    "fast_dev_run",
    "overfit_batches",
    "reload_dataloaders_every_n_epochs",
    "plugins",
    "limit_predict_batches",
}


def reserved_error(name: str) -> ConfigError:
    """The error of an option that names a reserved argument."""
    return ConfigError(f"--trainer.{name} is reserved: job itself sets this argument of the Trainer.")
