"""The JSON Schema of report.json, for the comparison with docs/: ``python tests/cli/report_schema.py`` writes it."""

from __future__ import annotations

import json
from pathlib import Path

from job.monitoring.report.content import json_schema

SCHEMA = Path(__file__).parents[2] / "docs" / "report.schema.json"


def schema_text() -> str:
    """The schema as the file holds it."""
    return json.dumps(json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(schema_text())
