"""A kubectl whose cluster is a JSON file: $FAKE_CLUSTER. What needs no cluster is left to the real one.

The file has: objects by "RESOURCE/NAME" (created by apply); ``steps``, of which each look at a workload that exists
takes one: objects to merge, or null to remove one; ``logs``, lines by pod; ``fail``, a message by verb; ``unknown``,
resources whose controller is not installed. All arguments go to a second file, ``.calls``.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

PATH = Path(os.environ["FAKE_CLUSTER"])
RESOURCES = {
    "ConfigMap": "configmaps",
    "Service": "services",
    "NetworkPolicy": "networkpolicies.networking.k8s.io",
    "Job": "jobs.batch",
    "JobSet": "jobsets.jobset.x-k8s.io",
    "TrainJob": "trainjobs.trainer.kubeflow.org",
}
WORKLOADS = ("jobs.batch", "jobsets.jobset.x-k8s.io", "trainjobs.trainer.kubeflow.org")
ALIASES = {"service": "services", "networkpolicy": "networkpolicies.networking.k8s.io", "configmap": "configmaps"}


def merge(target, changes):
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            merge(target[key], value)
        elif value is None:
            target.pop(key, None)
        else:
            target[key] = value


def matches(item, selector):
    labels = item["metadata"].get("labels", {})
    for requirement in filter(None, selector.split(",")):
        name, equals, value = requirement.partition("=")
        if name not in labels or (equals and labels[name] != value):
            return False
    return True


def main():
    verb, *args = [word for word in sys.argv[1:] if not word.startswith(("--namespace=", "--context="))]
    if verb == "kustomize":
        sys.exit(subprocess.run([os.environ["REAL_KUBECTL"], verb, *args]).returncode)
    cluster = json.loads(PATH.read_text())
    stdin = sys.stdin.read() if "--filename=-" in args else ""
    with PATH.with_suffix(".calls").open("a") as calls:  # several processes append
        calls.write(json.dumps(sys.argv[1:]) + "\n")
    options = dict(word.removeprefix("--").partition("=")[::2] for word in args if word.startswith("--"))
    names = [word for word in args if not word.startswith("--")]
    for name, message in cluster.get("fail", {}).items():
        if " ".join([verb, *args]).startswith(name):
            if message == "hang":
                time.sleep(60)
            sys.exit(message)
    if verb == "logs":
        for line in cluster["logs"].get(names[0].removeprefix("pods/"), []):
            print(line, flush=True)
        return
    objects = cluster["objects"]
    selector = options.get("selector", "")
    if verb == "apply":
        items = json.loads(stdin)["items"]
        for item in items:
            print(f"{item['kind'].lower()}/{item['metadata']['name']} created")
            if "dry-run" not in options:
                objects[f"{RESOURCES[item['kind']]}/{item['metadata']['name']}"] = item
    elif verb == "patch":
        merge(objects[names[0]], json.loads(options["patch"]))
    elif verb == "delete":
        for key in [key for key, item in objects.items() if selected(key, item, names, selector)]:
            del objects[key]
            print(f"{key} deleted")
    elif verb == "get":
        if names[0] in objects and names[0].partition("/")[0] in WORKLOADS and cluster.get("steps"):
            for key, changes in cluster["steps"].pop(0).items():
                if changes is None:
                    objects.pop(key, None)
                else:
                    merge(objects.setdefault(key, {}), changes)
        kind = names[0].partition("/")[0]
        if kind in cluster.get("unknown", []):
            sys.exit(f'error: the server doesn\'t have a resource type "{kind.partition(".")[0]}"')
        items = [item for key, item in objects.items() if selected(key, item, names, selector)]
        if len(names) == 1 and "/" in names[0]:
            print(json.dumps(items[0]) if items else "")
        elif items or "/" not in names[0]:
            print(json.dumps({"kind": "List", "items": items}))
    changed = PATH.with_suffix(f".{os.getpid()}")
    changed.write_text(json.dumps(cluster))
    changed.replace(PATH)  # at once: another process may read it, and a signal may end this one


def selected(key, item, names, selector):
    resource, _, name = key.partition("/")
    for word in names:
        kinds, _, wanted = word.partition("/")
        kinds = [ALIASES.get(kind.lower(), kind) for kind in kinds.split(",")]
        if resource in kinds and wanted in ("", name) and matches(item, selector):
            return True
    return False


main()
