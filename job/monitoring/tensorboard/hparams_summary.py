"""Summaries of TensorBoard's HPARAMS tab: one row of its table per run."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
from tensorboard.plugins.hparams import (  # type: ignore[import-untyped]
    api_pb2,
    metadata,
    plugin_data_pb2,
    summary_v2,
)

from job import redact
from job.config.class_defaults import default_arguments
from job.process.terminal import escape

MOST_CHARACTERS = 100
"""Of a value."""
MOST_VALUES = 100

Value = bool | int | float | str


def plain_values(values: Mapping[str, Any]) -> dict[str, Value]:
    """Values as the tab takes them: flags, finite numbers and short text; others are left out.

    A class of a configuration becomes text, such as ``AdamW(weight_decay=0.05)``, without arguments that have their
    default.
    """
    plain = {name: _plain(value) for name, value in list(values.items())[:MOST_VALUES]}
    return {name: value for name, value in plain.items() if value is not None}


def session_start(values: Mapping[str, Value]) -> Summary:
    """Record of a run's hyperparameters, as of :func:`plain_values`.

    Without an identity of its own the row has the name of the run, and is one however often the run is resumed.
    """
    return summary_v2.hparams_pb(dict(values), trial_id="")


def session_end() -> Summary:
    """Record that a run has succeeded.

    TensorBoard keeps the first such record of a run, so that there is none of a failure: a failed run is resumed.
    """
    info = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
    summary = Summary()
    summary.value.add(
        tag=metadata.SESSION_END_INFO_TAG,
        metadata=metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=info)),
        tensor=metadata.NULL_TENSOR,
    )
    return summary


def _plain(value: Any) -> Value | None:
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):
        return value if math.isfinite(value) and abs(value) < 2**63 else None
    return None if value is None else escape(redact.redact(_text(value)))[:MOST_CHARACTERS]


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        if not isinstance(class_path := value.get("class_path"), str):
            return str(dict(value))
        arguments, defaults = value.get("init_args") or {}, default_arguments(class_path)
        given = [
            f"{name}={_text(each)}" for name, each in arguments.items() if _listed(each) != _listed(defaults.get(name))
        ]
        name = class_path.rpartition(".")[2]
        return f"{name}({', '.join(given)})" if given else name
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]"
    return str(value)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
