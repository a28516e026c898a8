"""The manifests of the server: valid, restricted, consistent with each other and with the command's options."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from k8s.manifests import REPOSITORY, kustomize, of_kind

from job.cli.parser import function_parser
from job.cli.serve import main

VERSIONS = ("1.35", "1.36", "1.37")
FOLDER = REPOSITORY / "k8s" / "serve"

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


@pytest.fixture(scope="module")
def manifests() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(kustomize(FOLDER)))


def pod_of(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    (deployment,) = of_kind(manifests, "Deployment")
    pod: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return pod


def test_are_valid(manifests: list[dict[str, Any]]) -> None:
    kinds = {manifest["kind"] for manifest in manifests}
    assert {"Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy"} <= kinds
    for manifest in manifests:
        for version in VERSIONS:
            kubernetes_validate.validate(manifest, version, strict=True)
    (misspelt,) = of_kind(list(yaml.safe_load_all(kustomize(FOLDER))), "HorizontalPodAutoscaler")
    misspelt["spec"]["maxReplica"] = 3
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(misspelt, VERSIONS[0], strict=True)


def test_the_pod_has_restricted_privileges(manifests: list[dict[str, Any]]) -> None:
    pod = pod_of(manifests)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert "memory" in container["resources"]["limits"]


def test_the_command_is_parsed_and_ends_in_time(manifests: list[dict[str, Any]]) -> None:
    pod = pod_of(manifests)
    (container,) = pod["containers"]
    assert container["args"][0] == "serve"
    options = function_parser("serve", main, ("run_dir",)).parse_args(container["args"][1:])
    assert 2 <= pod["terminationGracePeriodSeconds"] - options.grace <= 10
    assert options.port == container["ports"][0]["containerPort"]
    # Readiness is false before the pod stops listening.
    readiness = container["readinessProbe"]
    assert options.drain_delay > readiness["periodSeconds"] * readiness["failureThreshold"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in ("/v2/health/ready", "/v2/health/live")


def test_references_resolve(manifests: list[dict[str, Any]]) -> None:
    (deployment,) = of_kind(manifests, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    for kind, selector in (
        ("Service", lambda spec: spec["selector"]),
        ("Deployment", lambda spec: spec["selector"]["matchLabels"]),
        ("NetworkPolicy", lambda spec: spec["podSelector"]["matchLabels"]),
        ("PodDisruptionBudget", lambda spec: spec["selector"]["matchLabels"]),
    ):
        (manifest,) = of_kind(manifests, kind)
        assert selector(manifest["spec"]).items() <= labels
    (autoscaler,) = of_kind(manifests, "HorizontalPodAutoscaler")
    assert autoscaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"]  # an apply would undo what the autoscaler chose
    (budget,) = of_kind(manifests, "PodDisruptionBudget")
    assert budget["spec"]["minAvailable"] < autoscaler["spec"]["minReplicas"]
    (config,) = of_kind(manifests, "ConfigMap")
    (variable,) = pod_of(manifests)["containers"][0]["env"]
    assert variable["valueFrom"]["configMapKeyRef"]["name"] == config["metadata"]["name"]
    (account,) = of_kind(manifests, "ServiceAccount")
    assert pod_of(manifests)["serviceAccountName"] == account["metadata"]["name"]


def test_a_kustomization_of_one_s_own(manifests: list[dict[str, Any]], tmp_path: Path) -> None:
    """As in docs/serve.md."""
    guide = (REPOSITORY / "docs" / "serve.md").read_text()
    text = guide.partition("cat > ../runs/serve/kustomization.yaml <<EOF\n")[2].partition("EOF\n")[0]
    own = tmp_path / "runs" / "serve"
    own.mkdir(parents=True)
    shutil.copytree(FOLDER, tmp_path / "job" / "k8s" / "serve")
    values = {'$(basename "$PWD")': "job", "$IMAGE": "registry.example/job", "$BUCKET": "my-bucket"}
    for name, value in values.items():
        assert name in text
        text = text.replace(name, value)
    (own / "kustomization.yaml").write_text(text)
    rendered = list(yaml.safe_load_all(kustomize(own)))
    assert pod_of(rendered)["containers"][0]["image"].startswith("registry.example/job:")
    (config,) = of_kind(rendered, "ConfigMap")
    assert config["data"]["run"].startswith("gs://my-bucket/")
