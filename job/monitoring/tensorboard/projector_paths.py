"""TensorBoard's projector on runs that are stored elsewhere than in a local folder."""

from __future__ import annotations

import posixpath

from tensorboard.plugins.projector import projector_plugin  # type: ignore[import-untyped]


def read_through_gfile() -> None:
    """Have the plugin find its files beside their configuration on any filesystem of TensorBoard's gfile.

    The plugin reads through gfile, but makes every path one of the local disk (projector_plugin.py,
    ``_rel_to_abs_asset_path``). tests/unit/test_projector.py notices when that changes.
    """
    projector_plugin._rel_to_abs_asset_path = path_beside


def path_beside(file: str, configuration: str) -> str:
    """The path of a file beside a configuration, which others may have written.

    Raises:
        ValueError: it would be elsewhere; the plugin answers so.
    """
    if file in ("", ".", "..") or posixpath.basename(file) != file:
        raise ValueError(f"{file!r} does not lie beside {configuration}")
    return posixpath.join(posixpath.dirname(configuration), file)
