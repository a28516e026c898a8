"""The page of the server: a form that takes images, their predictions, and the routes. It has no script."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined

from job.predict.predictor import Prediction, Predictor
from job.serve.batching import Result
from job.serve.images import reason
from job.serve.protocols.instances import prediction_entry

MOST_CLASSES = 5
"""Classes that are shown of each prediction."""

_environment = Environment(
    loader=PackageLoader("job.serve"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
_STYLE = _environment.get_template("page.css").render()
_DIGEST = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
POLICY = (
    f"default-src 'none'; style-src 'sha256-{_DIGEST}'; img-src data:; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)
"""Content security policy: the page's own style sheet and nothing else."""


def render_page(
    name: str,
    predictor: Predictor | None,
    operations: Sequence[tuple[str, str, str]],
    results: Sequence[tuple[str, Result]],
    *,
    is_ready: bool,
) -> str:
    """The page as HTML.

    Args:
        name: of the model.
        predictor: the model; None until it is loaded.
        operations: method, path and summary of the routes.
        results: names of files, and their predictions.
        is_ready: whether images can be sent.
    """
    rows = []
    for file, result in results:
        if isinstance(result, Prediction):
            entry = prediction_entry(result, MOST_CLASSES)
            labels = entry.get("labels", [result.label])
            rows.append({"file": file, "labels": labels, "chances": list(entry["probabilities"].items())})
        else:
            rows.append({"file": file, "error": reason(result)})
    model = None
    if predictor is not None:
        model = {
            "backbone": predictor.net.name,
            "side": predictor.net.image_size,
            "classes": len(predictor.classes),
            "sha256": predictor.fingerprint,
            "device": str(predictor.device),
        }
    return _environment.get_template("page.html.jinja").render(
        name=name, model=model, is_ready=is_ready, operations=operations, rows=rows, style=_STYLE
    )
