"""Parse commands as gcloud does, without running them: ``python parse_gcloud.py LIB``.

Reads the words of one command a line, as JSON, and prints the lines that gcloud refuses. LIB is the folder ``lib`` of
the Google Cloud SDK.
"""

from __future__ import annotations

import json
import sys

sys.path[:0] = [sys.argv[1], f"{sys.argv[1]}/third_party"]

from googlecloudsdk import gcloud_main  # noqa: E402

parser = gcloud_main.CreateCLI([])._CLI__parser
for line in sys.stdin:
    try:
        parser.parse_args(json.loads(line))
    except SystemExit:
        print(line)
