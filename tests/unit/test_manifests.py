"""Kubernetes and Vertex AI manifests: rendered, compared, validated strictly, and their cross-links checked."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from google.cloud.aiplatform_v1.types import CustomJobSpec, HyperparameterTuningJob
from google.protobuf import json_format
from k8s.manifests import (
    COMPLETION_INDEX,
    GOLDEN,
    KUSTOMIZATIONS,
    REPOSITORY,
    TRAINING,
    Manifest,
    arguments_of,
    environment_of,
    job_of,
    kustomize,
    of_kind,
    pod_of,
    render,
    rendered,
    rendered_run,
)
from support import run

from job.cli import predict
from job.cli.parser import function_parser
from job.cli.training import TrainingCLI
from job.cluster import machines
from job.cluster.environment import DEFAULT_PORT, find_node
from job.cluster.machines import GIB, SYSTEM_PODS, Resources, allocatable_storage
from job.errors import EXIT_NODES_MISSING, EXIT_PREEMPTED, EXIT_USER_ERROR

VERTEX = sorted((REPOSITORY / "k8s" / "vertex").glob("*.yaml"))
VERSIONS = ("1.35", "1.36", "1.37")
CHIPS_PER_HOST = {"4x4": 4, "2x4": 8, "2x2x1": 4, "2x2x4": 4}
"""https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus: 2x4 comes as one host of eight chips, too."""
FIELDS = {
    "metadata.labels['batch.kubernetes.io/job-name']": "train",
    "metadata.labels['batch.kubernetes.io/controller-uid']": "the-uid",
    "metadata.labels['jobset.sigs.k8s.io/jobset-name']": "train",
    "metadata.labels['jobset.sigs.k8s.io/jobset-uid']": "the-uid",
}
"""A pod's own, for a Job or JobSet named train."""
SCHEMAS = {
    (schema["apiVersion"], schema["kind"]): schema["schema"]
    for schema in (yaml.safe_load(file.read_text()) for file in Path(__file__).parents[1].glob("k8s/schemas/*.yaml"))
}

SDK = Path(shutil.which("gcloud") or "/").resolve().parents[1] / "lib" if shutil.which("gcloud") else None
"""The Google Cloud SDK's own packages."""

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


@pytest.fixture(autouse=True)
def no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove pytest's arguments, of which LightningCLI warns."""
    monkeypatch.setattr(sys, "argv", ["job"])


def strict(schema: Any) -> Any:
    """Return the schema with unknown fields refused."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


def validate(manifest: Manifest) -> None:
    key = (manifest["apiVersion"], manifest["kind"])
    if key not in SCHEMAS:
        for version in versions_of(manifest):
            kubernetes_validate.validate(manifest, version, strict=True)
        return
    schema = strict(SCHEMAS[key])
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.validate(manifest, schema, cls=jsonschema.Draft202012Validator)
    if manifest["kind"] == "ClusterTrainingRuntime":
        template = manifest["spec"]["template"]
        validate({"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": {}, **template})


def versions_of(manifest: Manifest) -> tuple[str, ...]:
    """The versions of Kubernetes that know all fields of the manifest."""
    if manifest["kind"] == "PodGroup":
        return ("1.37",)
    if manifest["kind"] == "Job" and "schedulingGroup" in manifest["spec"]["template"]["spec"]:
        return ("1.36", "1.37")
    return VERSIONS


def quantity(text: str | int) -> float:
    """Return the bytes or cores of a Kubernetes quantity."""
    number, unit = re.fullmatch(r"([\d.]+)(\D*)", str(text)).groups()  # type: ignore[union-attr]
    return float(number) * {"": 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30}[unit]


def train_of(name: str) -> Manifest:
    (container,) = pod_of(rendered(name))["containers"]
    return dict(container)


def options_of(args: list[str]) -> dict[str, str]:
    """Return the options; each must have the form ``--name=value``, so that a patch can replace it."""
    pairs = [argument.removeprefix("--").partition("=") for argument in args if argument.startswith("--")]
    assert all(equals for _, equals, _ in pairs), args
    return {name: value for name, _, value in pairs}


@needs_kubectl
@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_renders_as_committed(name: str) -> None:
    """Commit the golden files with an intended change: python tests/k8s/manifests.py."""
    assert render(name) == (GOLDEN / f"{name}.yaml").read_text()


def test_every_golden_rendering_has_an_overlay() -> None:
    assert {file.stem for file in GOLDEN.glob("*.yaml")} == set(KUSTOMIZATIONS)


@needs_kubectl
@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_is_valid(name: str) -> None:
    for manifest in rendered(name):
        validate(manifest)


@needs_kubectl
def test_the_validation_can_fail() -> None:
    misspelt = rendered("gpu")
    of_kind(misspelt, "Job")[0]["spec"]["template"]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(of_kind(misspelt, "Job")[0])
    for name, kind, where in (
        ("tpu-multislice", "JobSet", "failurePolicy"),
        ("queues", "ClusterQueue", None),
        ("queues-flex-start", "ProvisioningRequestConfig", None),
        ("queues-flex-start", "AdmissionCheck", None),
        ("gpu-jobset", "JobSet", "network"),
        ("trainjob", "TrainJob", "trainer"),
        ("trainer", "ClusterTrainingRuntime", "mlPolicy"),
        ("trainer", "ClusterTrainingRuntime", "template"),
    ):
        manifest = of_kind(rendered(name), kind)[0]
        spec = manifest["spec"][where] if where else manifest["spec"]
        (spec["spec"] if where == "template" else spec)["maxRestart"] = 3
        with pytest.raises(jsonschema.ValidationError, match="maxRestart"):
            validate(manifest)


def pods_of(manifests: list[Manifest]) -> list[Manifest]:
    """The pod templates of all workloads: metadata and spec."""
    templates = [dict(deployment["spec"]["template"]) for deployment in of_kind(manifests, "Deployment")]
    training = any(of_kind(manifests, kind) for kind in ("Job", "JobSet", "TrainJob"))
    return [*templates, dict(job_of(manifests)["template"])] if training else templates


def selectors_of(manifests: list[Manifest]) -> list[dict[str, str]]:
    """Every selector of pods: of Services, Deployments, policies, budgets, affinity and topology spread."""
    found = []
    for manifest in manifests:
        spec = manifest.get("spec", {})
        if manifest["kind"] == "Service":
            found.append(spec["selector"])
        found += list(_label_selectors(manifest))
    return found


def _label_selectors(node: Any) -> Iterator[dict[str, str]]:
    if isinstance(node, list):
        for item in node:
            yield from _label_selectors(item)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key in ("selector", "podSelector", "labelSelector") and "matchLabels" in value:
                assert set(value) == {"matchLabels"}
                yield value["matchLabels"]
            else:
                yield from _label_selectors(value)


def assert_names_exist(manifests: list[Manifest]) -> None:
    """ConfigMaps (kustomize hashes their names), accounts, volumes, subdomains, and pods that selectors select."""
    names = {(m["kind"], m["metadata"]["name"]) for m in manifests}
    accounts = {m["metadata"]["name"] for m in rendered("accounts")} | {"default"}
    pods = pods_of(manifests)
    for pod in (pod["spec"] for pod in pods):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for volume in volumes.values():
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in names
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
            for variable in container.get("env", []):
                if "configMapKeyRef" in variable.get("valueFrom", {}):
                    assert ("ConfigMap", variable["valueFrom"]["configMapKeyRef"]["name"]) in names
                if "secretKeyRef" in variable.get("valueFrom", {}):
                    assert f"kubectl create secret generic {variable['valueFrom']['secretKeyRef']['name']} " in GUIDE
                if variable["name"] == "BUCKET_HOST":
                    assert ("Service", variable["value"]) in names
        assert pod.get("serviceAccountName", "default") in accounts
        if "subdomain" in pod:
            assert ("Service", pod["subdomain"]) in names
        if "schedulingGroup" in pod:
            assert ("PodGroup", pod["schedulingGroup"]["podGroupName"]) in names
        for volume in volumes.values():
            if "ephemeral" in volume:
                (storage_class,) = of_kind(rendered("storage"), "StorageClass")
                claim = volume["ephemeral"]["volumeClaimTemplate"]["spec"]
                assert claim["storageClassName"] == storage_class["metadata"]["name"]
    for selector in selectors_of(manifests):
        assert any(selector.items() <= pod["metadata"]["labels"].items() for pod in pods), selector


@needs_kubectl
@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_references_between_manifests_resolve(name: str) -> None:
    assert_names_exist(rendered(name))


@needs_kubectl
@pytest.mark.parametrize("overlay", TRAINING)
def test_two_runs_share_nothing(overlay: str, tmp_path: Path) -> None:
    """Neither an object, so that one can be deleted, nor a selector; each is complete and valid by itself."""
    runs = {name: rendered_run(name, overlay, tmp_path / name) for name in ("cats", "dogs")}
    objects = [{(m["kind"], m["metadata"]["name"]) for m in manifests} for manifests in runs.values()]
    assert objects[0]
    assert not objects[0] & objects[1]
    for manifest in runs["cats"]:
        validate(manifest)
    for name, manifests in runs.items():
        assert_names_exist(manifests)
        assert selectors_of(manifests)
        for manifest in manifests:
            assert manifest["metadata"]["labels"]["app.kubernetes.io/instance"] == name
        for selector in selectors_of(manifests):
            assert selector["app.kubernetes.io/instance"] == name
        for pod in pods_of(manifests):
            assert pod["metadata"]["labels"]["app.kubernetes.io/instance"] == name
            if overlay != "cpu-local":  # brings its image's name
                assert {c["image"] for c in pod["spec"]["containers"]} == {f"registry.example/{name}/job:1"}
        (config,) = of_kind(manifests, "ConfigMap")
        assert config["data"] == {"config.yaml": f"run_dir: gs://bucket/{name}\n"}
    assert not [text for text in map(json.dumps, runs["cats"]) if "dogs" in text]


@needs_kubectl
def test_the_pods_of_a_named_run_meet_at_its_own_address(tmp_path: Path) -> None:
    manifests = rendered_run("cats", "gpu-multinode", tmp_path / "cats")
    fields = {**FIELDS, "metadata.labels['batch.kubernetes.io/job-name']": "cats-train"}
    (container,) = pod_of(manifests)["containers"]
    node = find_node({"JOB_COMPLETION_INDEX": "1", **environment_of(container, fields)})
    assert node.host == "cats-train-0.cats-train"
    assert pod_of(manifests)["subdomain"] == "cats-train"
    bucket = rendered_run("cats", "cpu-local", tmp_path / "local")
    (container,) = pod_of(bucket)["containers"]
    assert environment_of(container, fields)["STORAGE_EMULATOR_HOST"] == "http://cats-bucket:4443"


@needs_kubectl
def test_only_the_run_s_pods_reach_the_demo_s_bucket(tmp_path: Path) -> None:
    manifests = rendered_run("cats", "cpu-local", tmp_path / "cats")
    (policy,) = (p for p in of_kind(manifests, "NetworkPolicy") if p["metadata"]["name"] == "cats-bucket")
    (rule,) = policy["spec"]["ingress"]
    (peer,) = rule["from"]
    assert peer["podSelector"]["matchLabels"].items() <= job_of(manifests)["template"]["metadata"]["labels"].items()
    assert [port["port"] for port in rule["ports"]] == [4443]


@needs_kubectl
def test_a_budget_refuses_every_eviction() -> None:
    (budget,) = of_kind(rendered("with-disruption-budget"), "PodDisruptionBudget")
    assert budget["spec"]["minAvailable"] >= 1000
    for name in TRAINING:
        asked_for = name in ("with-disruption-budget", "with-everything")
        assert bool(of_kind(rendered(name), "PodDisruptionBudget")) == asked_for


@needs_kubectl
@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_pods_run_with_restricted_privileges(name: str) -> None:
    manifests = rendered(name)
    for pod in (pod["spec"] for pod in pods_of(manifests)):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 10001
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]
            assert "cpu" in container["resources"]["requests"]
    assert not of_kind(manifests, "Secret")
    text = render(name)
    assert "private_key" not in text
    assert "GOOGLE_APPLICATION_CREDENTIALS" not in text


@needs_kubectl
@pytest.mark.parametrize("name", TRAINING)
def test_the_launcher_understands_the_manifest(name: str) -> None:
    """With the variables that Kubernetes and GKE add, all pods form one job."""
    manifests = rendered(name)
    job, pod, jobset = job_of(manifests), pod_of(manifests), of_kind(manifests, "JobSet")
    slices = jobset[0]["spec"]["replicatedJobs"][0]["replicas"] if jobset else 1
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"]
    nodes = []
    for slice_id in range(slices):
        for index in range(job["completions"]):
            fields = {**FIELDS, COMPLETION_INDEX: str(index)}
            environment = {"JOB_COMPLETION_INDEX": str(index), **environment_of(pod["containers"][0], fields)}
            if "google.com/tpu" in pod["containers"][0]["resources"]["limits"]:
                environment |= _as_gke_adds(index, slice_id, slices, job["completions"])
            nodes.append(find_node(environment))
    assert [node.node_rank for node in nodes] == list(range(slices * job["completions"]))
    assert {node.nodes for node in nodes} == {len(nodes)}
    assert {node.run_id for node in nodes} == {"the-uid"}
    if of_kind(manifests, "TrainJob"):
        assert {(node.platform, node.host, node.port) for node in nodes} == {
            ("Kubeflow", "train-node-0-0.train", 29500)
        }
    else:
        assert {node.port for node in nodes} == {DEFAULT_PORT}
    if of_kind(manifests, "Job"):
        (service,) = (s for s in of_kind(manifests, "Service") if s["spec"].get("clusterIP") == "None")
        assert pod["subdomain"] == service["metadata"]["name"]
        assert service["spec"]["publishNotReadyAddresses"] is True
        assert {port["port"] for port in service["spec"]["ports"]} == {DEFAULT_PORT}
        if len(nodes) > 1:
            assert {node.host for node in nodes} == {f"train-0.{service['metadata']['name']}"}
    elif jobset and slices == 1:
        # JobSet's pods are called <jobset>-<replicated job>-<its index>-<pod's index>.
        assert {node.host for node in nodes} == {"train-node-0-0.train"}
        assert jobset[0]["spec"]["network"]["publishNotReadyAddresses"] is True


def _as_gke_adds(worker: int, slice_id: int, slices: int, hosts: int) -> dict[str, str]:
    names = [f"train-node-{slice_id}-{n}.train" if slices > 1 else f"train-{n}.train" for n in range(hosts)]
    variables = {"TPU_WORKER_ID": str(worker), "TPU_WORKER_HOSTNAMES": ",".join(names)}
    if slices > 1:
        variables |= {
            "MEGASCALE_NUM_SLICES": str(slices),
            "MEGASCALE_SLICE_ID": str(slice_id),
            "MEGASCALE_COORDINATOR_ADDRESS": "train-node-0-0.train:8080",
        }
    return variables


@needs_kubectl
@pytest.mark.parametrize("name", TRAINING)
def test_exit_codes_and_grace(name: str) -> None:
    job, pod = job_of(rendered(name)), pod_of(rendered(name))
    assert pod["restartPolicy"] == "Never"  # a Job takes Always from no schema's point of view, and then never ends
    rules = {rule["action"]: rule["onExitCodes"]["values"] for rule in job["podFailurePolicy"]["rules"][:2]}
    assert rules == {"FailJob": [EXIT_USER_ERROR], "Ignore": [EXIT_NODES_MISSING, EXIT_PREEMPTED]}
    assert job["podReplacementPolicy"] == "Failed"
    assert job["activeDeadlineSeconds"] > 0
    (container,) = pod["containers"]
    rules_of_the_container = [rule["onExitCodes"]["containerName"] for rule in job["podFailurePolicy"]["rules"][:2]]
    assert set(rules_of_the_container) == {container["name"]}
    grace = float(options_of(arguments_of(container))["grace"])
    assert 2 <= pod["terminationGracePeriodSeconds"] - grace <= 10
    if "spot" in name:
        assert pod["terminationGracePeriodSeconds"] <= 15


@needs_kubectl
@pytest.mark.parametrize("name", TRAINING)
def test_volumes_are_large_enough(name: str) -> None:
    pod, train = pod_of(rendered(name)), train_of(name)
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    paths = {mount["mountPath"]: volumes[mount["name"]] for mount in train["volumeMounts"]}
    config = of_kind(rendered(name), "ConfigMap")[0]
    data = yaml.safe_load(config["data"]["config.yaml"])["data"]
    cache_gb = float(options_of(arguments_of(train)).get("data.cache_gb", data["cache_gb"]))
    sizes = {path: quantity(v["emptyDir"]["sizeLimit"]) for path, v in paths.items() if "emptyDir" in v}
    claims = [volume["ephemeral"]["volumeClaimTemplate"]["spec"] for volume in pod["volumes"] if "ephemeral" in volume]
    if claims:
        assert quantity(claims[0]["resources"]["requests"]["storage"]) >= 1.05 * cache_gb * 1e9
    else:
        assert sizes[data["cache_dir"]] >= cache_gb * 1e9
    limits, requests = train["resources"]["limits"], train["resources"]["requests"]
    assert quantity(limits["ephemeral-storage"]) >= sizes["/tmp"] + sizes.get(data["cache_dir"], 0)
    # A pod that uses more than it requests is the first to be evicted when the node's disk is full.
    assert quantity(requests["ephemeral-storage"]) >= sizes["/tmp"] + sizes.get(data["cache_dir"], 0)
    # NCCL maps some 33 MB a pair of GPUs; gloo and the loader's threads nothing.
    assert paths["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    gpus = int(limits.get("nvidia.com/gpu", 0))
    assert sizes["/dev/shm"] >= max(64 * 2**20, gpus * (gpus - 1) * 33 * 2**20)
    assert sizes["/dev/shm"] <= quantity(limits["memory"]) / 4


@needs_kubectl
@pytest.mark.parametrize("name", [name for name in TRAINING if "tpu" in name])
def test_chips_times_hosts_are_the_topology(name: str) -> None:
    job, pod, train = job_of(rendered(name)), pod_of(rendered(name)), train_of(name)
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = train["resources"]["limits"]["google.com/tpu"]
    assert chips == train["resources"]["requests"]["google.com/tpu"] == CHIPS_PER_HOST[topology]
    assert chips * job["completions"] == math.prod(int(side) for side in topology.split("x"))
    assert options_of(train["args"])["trainer.accelerator"] == "tpu"


@needs_kubectl
@pytest.mark.parametrize(("job", "jobset"), [("gpu-multinode", "gpu-jobset"), ("tpu-v5e-multihost", "tpu-multislice")])
def test_a_jobset_has_the_pods_of_the_job(job: str, jobset: str) -> None:
    """Only what tells a pod its place differs; what the JobSet counts, its Jobs do not."""
    specs = [job_of(rendered(name)) for name in (job, jobset)]
    for key in ("completions", "parallelism", "completionMode", "podFailurePolicy", "podReplacementPolicy"):
        assert specs[0][key] == specs[1][key]
    pods = [spec["template"]["spec"] for spec in specs]
    for pod in pods:
        pod["containers"][0].pop("env")
        pod.pop("subdomain", None)  # JobSet sets its own
        pod["volumes"].sort(key=lambda volume: volume["name"])
    assert pods[0] == pods[1]
    (manifest,) = of_kind(rendered(jobset), "JobSet")
    assert specs[1]["backoffLimit"] == 0
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 10
    assert not of_kind(rendered(jobset), "Job")
    assert not of_kind(rendered(jobset), "Service")


@needs_kubectl
@pytest.mark.parametrize("name", [name for name in TRAINING if "tpu" in name or "jobset" in name])
def test_the_number_of_nodes_is_said_once(name: str) -> None:
    (container,) = pod_of(rendered(name))["containers"]
    nodes = environment_of(container, {**FIELDS, COMPLETION_INDEX: "0"})["LAUNCH_NODES"]
    slices = [jobset["spec"]["replicatedJobs"][0]["replicas"] for jobset in of_kind(rendered(name), "JobSet")] or [1]
    assert int(nodes) == job_of(rendered(name))["completions"] * slices[0]


@needs_kubectl
def test_the_pods_of_a_trainjob_are_those_of_a_job() -> None:
    """The runtime's pod template is written out, too; Trainer keeps its container's command, and adds arguments."""
    job, trainjob = pod_of(rendered("gpu-multinode")), pod_of(rendered("trainjob"))
    containers = [pod["containers"][0] for pod in (job, trainjob)]
    assert containers[1]["command"][:3] == ["dumb-init", "--single-child", "--"]  # as the image's entry point
    assert arguments_of(containers[0]) == arguments_of(containers[1])
    for pod, container in zip((job, trainjob), containers, strict=True):
        for key in ("name", "env", "args", "command"):
            container.pop(key, None)
        # JobSet sets the subdomain. A runtime serves several runs at once, which label selectors do not tell apart.
        for key in ("subdomain", "affinity", "topologySpreadConstraints"):
            pod.pop(key, None)
        pod["volumes"] = [volume for volume in pod["volumes"] if volume["name"] != "config"]
        pod["volumes"].sort(key=lambda volume: volume["name"])
    assert job == trainjob


@needs_kubectl
@pytest.mark.parametrize("name", TRAINING)
def test_the_command_is_parsed(name: str, tmp_path: Path) -> None:
    """Its arguments and the ConfigMap's file, parsed by the job's own parser."""
    args = arguments_of(train_of(name))
    assert args[:2] == ["launch", "fit"]
    (config,) = of_kind(rendered(name), "ConfigMap")
    (tmp_path / "config.yaml").write_text(config["data"]["config.yaml"])
    folders = {"/etc/job/": f"{tmp_path}/", "/opt/app/": f"{REPOSITORY}/"}
    for inside, outside in folders.items():
        args = [argument.replace(f"={inside}", f"={outside}") for argument in args]
    options = TrainingCLI("fit", args[2:]).config_init
    assert options["run_dir"].startswith("gs://")


@needs_kubectl
def test_the_pods_of_a_prediction_are_ranks_that_need_no_other() -> None:
    manifests = rendered("predict")
    job, (container,) = job_of(manifests), pod_of(manifests)["containers"]
    assert "maxFailedIndexes" not in job
    assert job["backoffLimitPerIndex"] > 0
    assert not of_kind(manifests, "Service")
    for index in range(job["completions"]):
        variables = environment_of(container, {**FIELDS, COMPLETION_INDEX: str(index)})
        assert variables == {"RANK": str(index), "WORLD_SIZE": str(job["completions"])}
    options = function_parser("predict", predict.main, ("run_dir", "input")).parse_args(arguments_of(container)[1:])
    assert arguments_of(container)[0] == "predict"
    assert (options.run_dir, options.input) == ("gs://BUCKET/runs/1", "gs://BUCKET/new")
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1


@needs_kubectl
def test_the_documented_prediction_is_a_kustomization(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "predict.md").read_text()
    (content,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    shutil.copytree(REPOSITORY / "k8s", tmp_path / "job" / "k8s")
    folder = tmp_path / "runs" / "cats-new"
    folder.mkdir(parents=True)
    (folder / "kustomization.yaml").write_text(content)
    manifests = list(yaml.safe_load_all(kustomize(folder)))
    for manifest in manifests:
        validate(manifest)
    (job,) = of_kind(manifests, "Job")
    assert job["metadata"]["name"] == "cats-new-predict"
    (policy,) = of_kind(manifests, "NetworkPolicy")  # of its own pods alone
    assert policy["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/instance"] == "cats-new"
    (container,) = pod_of(manifests)["containers"]
    assert container["image"].startswith("REGION-docker.pkg.dev/")
    options = function_parser("predict", predict.main, ("run_dir", "input")).parse_args(arguments_of(container)[1:])
    assert options.output == "gs://BUCKET/predictions/cats-new"


@needs_kubectl
def test_kueue_admits_the_whole_job() -> None:
    queue = of_kind(rendered("queues"), "LocalQueue")[0]
    workloads = (("with-kueue", "Job"), ("with-kueue-jobset", "JobSet"), ("with-kueue-trainjob", "TrainJob"))
    for name, kind in workloads:
        (workload,) = of_kind(rendered(name), kind)
        assert workload["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == queue["metadata"]["name"]
        assert "suspend" not in workload["spec"]  # Kueue's webhook sets it, once
    (flavour,) = of_kind(rendered("queues"), "ResourceFlavor")
    (cluster_queue,) = of_kind(rendered("queues"), "ClusterQueue")
    assert cluster_queue["metadata"]["name"] == queue["spec"]["clusterQueue"]
    (group,) = cluster_queue["spec"]["resourceGroups"]
    assert group["flavors"][0]["name"] == flavour["metadata"]["name"]
    assert [resource["name"] for resource in group["flavors"][0]["resources"]] == group["coveredResources"]
    requests = train_of("with-kueue")["resources"]["requests"]
    assert set(requests) <= set(group["coveredResources"])  # Kueue leaves a Job suspended that asks for more
    node_selector = pod_of(rendered("with-kueue"))["nodeSelector"]
    assert flavour["spec"]["nodeLabels"].items() <= node_selector.items()


@needs_kubectl
def test_queued_provisioning_asks_for_all_nodes_at_once() -> None:
    """The run names the queue, that a check, and that the class of Google's provisioning requests."""
    manifests = rendered("queues-flex-start")
    (job,) = of_kind(rendered("with-queued-provisioning"), "Job")
    (queue,), (cluster_queue,) = of_kind(manifests, "LocalQueue"), of_kind(manifests, "ClusterQueue")
    (check,), (config,) = of_kind(manifests, "AdmissionCheck"), of_kind(manifests, "ProvisioningRequestConfig")
    (flavour,) = of_kind(manifests, "ResourceFlavor")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == queue["metadata"]["name"]
    assert "suspend" not in job["spec"]
    seconds = job["metadata"]["annotations"]["provreq.kueue.x-k8s.io/maxRunDurationSeconds"]
    assert int(seconds) == job["spec"]["activeDeadlineSeconds"] == 7 * 86400
    assert queue["spec"]["clusterQueue"] == cluster_queue["metadata"]["name"]
    (named,) = cluster_queue["spec"]["admissionChecksStrategy"]["admissionChecks"]
    assert named["name"] == check["metadata"]["name"]
    assert check["spec"]["parameters"]["kind"] == config["kind"]
    assert check["spec"]["parameters"]["name"] == config["metadata"]["name"]
    (resource,) = config["spec"]["managedResources"]
    assert resource in job["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    (group,) = cluster_queue["spec"]["resourceGroups"]
    assert group["flavors"][0]["name"] == flavour["metadata"]["name"]
    selector = job["spec"]["template"]["spec"]["nodeSelector"]
    labels = flavour["spec"]["nodeLabels"]
    assert {label for label in labels if selector.get(label, labels[label]) != labels[label]} == set()


@needs_kubectl
@pytest.mark.parametrize("name", [name for name in TRAINING if "multi" in name or "spot" in name])
def test_kubernetes_can_schedule_several_nodes_as_a_gang(name: str) -> None:
    """Its Job controller does so for such Jobs only: KEP-5547, of 1.36."""
    for job in of_kind(rendered(name), "Job"):
        assert job["spec"]["completionMode"] == "Indexed"
        assert job["spec"]["parallelism"] == job["spec"]["completions"] > 1
        assert "schedulingGroup" not in job["spec"]["template"]["spec"]


@needs_kubectl
def test_the_pod_group_has_all_pods(tmp_path: Path) -> None:
    manifests = rendered_run("cats", "with-pod-group", tmp_path / "cats")
    (group,), (job,) = of_kind(manifests, "PodGroup"), of_kind(manifests, "Job")
    assert group["spec"]["schedulingPolicy"]["gang"]["minCount"] == job["spec"]["parallelism"]
    assert job["spec"]["template"]["spec"]["schedulingGroup"] == {"podGroupName": "cats-train"}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.35", strict=True)


@needs_kubectl
def test_the_policy_lets_pods_reach_what_gives_them_tokens() -> None:
    """GKE's metadata server; on EKS Pod Identity's agent."""
    for name, expected in (
        ("gpu", {("169.254.169.254/32", 80), ("169.254.169.252/32", 988)}),
        ("eks", {("169.254.170.23/32", 80), ("fd00:ec2::23/128", 80)}),
    ):
        (policy,) = of_kind(rendered(name), "NetworkPolicy")
        allowed = {
            (peer["ipBlock"]["cidr"], port["port"])
            for rule in policy["spec"]["egress"]
            for peer in rule.get("to", [])
            if "ipBlock" in peer
            for port in rule["ports"]
        }
        assert expected <= allowed
        assert name != "eks" or expected == allowed
        anywhere = [rule["ports"] for rule in policy["spec"]["egress"] if "to" not in rule]
        assert any({"port": 443, "protocol": "TCP"} in ports for ports in anywhere)


@needs_kubectl
def test_no_key_is_in_a_file() -> None:
    assert not of_kind(rendered("with-s3-compatible"), "Secret")
    environment = {variable["name"]: variable for variable in train_of("with-s3-compatible")["env"]}
    for name in ("FSSPEC_S3_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        reference = environment[name]["valueFrom"]["secretKeyRef"]
        assert f"--from-literal={reference['key']}=" in GUIDE


@pytest.mark.parametrize("file", VERTEX, ids=lambda file: file.stem)
def test_vertex_ai_accepts_the_job_specs(file: Path) -> None:
    """Google's protobuf types refuse unknown fields."""
    spec = yaml.safe_load(file.read_text())
    if file.stem == "tuning":
        json_format.ParseDict(spec, HyperparameterTuningJob.pb()())
        trial = spec["trialJobSpec"]
        assert [metric["metricId"] for metric in spec["studySpec"]["metrics"]] == ["metric"]
        tuned = [f"--{p['parameterId']}={_example(p)}" for p in spec["studySpec"]["parameters"]]
    else:
        trial, tuned = json.loads(json.dumps(spec)), []
        json_format.ParseDict(trial, CustomJobSpec.pb()())
    for pool in trial["workerPoolSpecs"]:
        container = pool["containerSpec"]
        args = [*container["args"], *tuned]
        if "command" in container:
            script = container["command"][5]
            assert script.startswith("exec python -m job launch fit ")
            assert script.endswith(' "$@"')
            args += ["--run_dir=gs://BUCKET/runs/tuning/1"]
        else:
            assert args[:2] == ["launch", "fit"]
            args = args[2:]
        assert TrainingCLI("fit", args).config_init["run_dir"].startswith("gs://BUCKET/runs/")
    assert [pool["replicaCount"] for pool in trial["workerPoolSpecs"][:1]] == [1]


def _example(parameter: Manifest) -> object:
    if "doubleValueSpec" in parameter:
        return parameter["doubleValueSpec"]["minValue"]
    return parameter["categoricalValueSpec"]["values"][-1]


def test_placeholders_are_the_same_everywhere() -> None:
    """Those of Vertex AI's files are replaced by the sed of k8s/README.md, the others in a run's own files."""
    placeholders = {"PROJECT", "REGION", "BUCKET", "TENSORBOARD"}
    for file in (REPOSITORY / "k8s").rglob("*.yaml"):
        lines = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
        for value in re.findall(r"(?:gs://|docker\.pkg\.dev/|@|projects/)\S*", "\n".join(lines)):
            for word in re.findall(r"\b[A-Z]{3,}\b", value):
                assert word in placeholders, (file, value)


GUIDE = (REPOSITORY / "k8s" / "README.md").read_text()
COMMANDS = [
    line.strip()
    for block in re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]


def test_the_guide_names_every_overlay() -> None:
    rows = re.findall(r"^\| (.*?) \|", GUIDE, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(?:overlays/)?([\w/.*-]+)`", row)}
    folders = [file.parent.relative_to(REPOSITORY / "k8s") for file in (REPOSITORY / "k8s").rglob("kustomization.yaml")]
    kustomizations = {str(folder).removeprefix("overlays/") for folder in folders}
    assert named == kustomizations - {"base", "components/tpu", "components/jobset/from-job"} | {"vertex/*.yaml"}
    for path in re.findall(r"(?<![\w)]/)\b(?:k8s|docker)/[\w./-]+", "\n".join(COMMANDS).replace("$file", "gpu")):
        assert (REPOSITORY / path.rstrip(".")).exists(), path


def test_the_guide_s_commands_are_complete_scripts(tmp_path: Path) -> None:
    """The shell parses them, and knows every variable; the programs do nothing."""
    programs = ["kubectl", "gcloud", "docker", "kind", "pip", "python", "sed", "aws"]
    stubs = [f"{program}() {{ :; }}" for program in programs]
    keys = ["ACCESS_KEY_ID=x SECRET_ACCESS_KEY=x ROLE=x"]  # the reader's own
    (tmp_path / "job").mkdir()
    script = "\n".join([*stubs, *keys, *re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL)])
    result = subprocess.run(["bash", "-euc", script], cwd=tmp_path / "job", capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(SDK is None, reason="gcloud is not installed")
def test_gcloud_knows_the_guide_s_commands(tmp_path: Path) -> None:
    comments = [line for file in VERTEX for line in re.findall(r"^#   (gcloud (?:.*\\\n#)*.*)", file.read_text(), re.M)]
    in_comments = [re.sub(r"\\\n#|\(.*\)", "", line) for line in comments]
    lines = [line for line in COMMANDS if line.startswith("gcloud ")] + in_comments
    assert len(lines) > 25
    misspelt = f"{lines[0]} --qiet"
    commands = "\n".join(json.dumps(shlex.split(line, comments=True)[1:]) for line in [*lines, misspelt])
    script = REPOSITORY / "tests" / "k8s" / "parse_gcloud.py"
    environment = {**os.environ, "CLOUDSDK_CONFIG": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, script, str(SDK)], input=commands, capture_output=True, text=True, env=environment
    )
    refused = [line for line in result.stdout.splitlines() if line]
    assert len(refused) == 1, result.stdout + result.stderr
    assert "--qiet" in refused[0]


NODE_POOLS = {
    name: dict(re.findall(r"--([\w-]+)=(\S+)", re.sub(r"\\\n", " ", command)))
    for comment, command in re.findall(
        r"^# (.*)\n(gcloud container node-pools create (?:.*\\\n)*.*)$", GUIDE, re.MULTILINE
    )
    for part in comment.split(";")
    for name in re.findall(r"[\w-]+", re.split(r"[:(]", part)[0])
}
"""Options of the ``node-pools create`` line of each overlay, which the comment above it names."""
WORKLOAD_POLICIES = dict(re.findall(r"create workload-policy ([\w-]+) (?:.|\\\n)*?--accelerator-topology=(\S+)", GUIDE))
"""Topologies of the workload policies that node pools name as their placement policies."""
MACHINES = re.findall(
    r"^\| (?:`components/machines/([\w-]+)`|the overlays) \| `([\w-]+)` \| `([\w-]+)` \|", GUIDE, re.MULTILINE
)
"""The guide's table: component, machine type, accelerator."""


def requests_of(pod: Manifest, *, of: str = "requests") -> Resources:
    """The sum over the pod's containers of what the scheduler looks at."""
    amounts = [container["resources"][of] for container in pod["containers"]]
    cpus, memory, storage = (
        sum(quantity(amount.get(name, 0)) for amount in amounts) for name in ("cpu", "memory", "ephemeral-storage")
    )
    return Resources(cpus, memory, storage)


def assert_fits(pods: list[Resources], node: Resources, system: Resources) -> None:
    for name in ("cpus", "memory", "ephemeral_storage"):
        wanted = sum(getattr(pod, name) for pod in [*pods, system])
        assert wanted <= getattr(node, name), (name, wanted, getattr(node, name))


def test_there_is_a_node_pool_for_every_overlay() -> None:
    overlays = {folder.name for folder in (REPOSITORY / "k8s" / "overlays").iterdir()}
    assert set(NODE_POOLS) == overlays - {"cpu-local", "eks"}


@needs_kubectl
@pytest.mark.parametrize("name", NODE_POOLS)
def test_pods_fit_on_the_nodes_of_the_guide(name: str) -> None:
    """The scheduler would leave them pending otherwise: ``Insufficient ephemeral-storage``."""
    pod, train, pool = pod_of(rendered(name)), train_of(name), NODE_POOLS[name]
    machine = machines.machines()[pool["machine-type"]]
    node = machine.allocatable(int(pool["disk-size"]))
    assert_fits([requests_of(pod)], node, SYSTEM_PODS)
    assert requests_of(pod, of="limits").ephemeral_storage <= node.ephemeral_storage - SYSTEM_PODS.ephemeral_storage
    gpus, chips = (train["resources"]["limits"].get(kind, 0) for kind in ("nvidia.com/gpu", "google.com/tpu"))
    assert gpus + chips == machine.accelerators
    label = "cloud.google.com/gke-accelerator" if gpus else "cloud.google.com/gke-tpu-accelerator"
    assert pod["nodeSelector"][label] == machine.accelerator
    if gpus:
        assert pool["accelerator"].startswith(f"type={machine.accelerator},count={machine.accelerators},")
    assert job_of(rendered(name))["completions"] <= int(pool.get("max-nodes", pool["num-nodes"]))
    if job_of(rendered(name))["completions"] > 1 and chips:
        topology = pool.get("tpu-topology") or WORKLOAD_POLICIES[pool["placement-policy"]]
        assert topology == pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]


@needs_kubectl
@pytest.mark.parametrize(("component", "machine_type", "accelerator"), MACHINES)
def test_pods_fit_on_the_machines_of_the_guide(
    component: str, machine_type: str, accelerator: str, tmp_path: Path
) -> None:
    machine = machines.machines()[machine_type]
    assert accelerator == machine.accelerator
    components = [f"machines/{component}"] if component else []
    manifests = rendered_run("cats", "gpu-spot", tmp_path / "cats", components)
    for manifest in manifests:
        validate(manifest)
    pod = pod_of(manifests)
    (train,) = pod["containers"]
    assert pod["nodeSelector"]["cloud.google.com/gke-accelerator"] == accelerator
    assert train["resources"]["limits"]["nvidia.com/gpu"] == machine.accelerators
    assert_fits([requests_of(pod)], machine.allocatable(200), SYSTEM_PODS)
    assert requests_of(pod).cpus > 0.6 * machine.cpus


def test_the_guide_has_every_machine_component() -> None:
    components = {folder.name for folder in (REPOSITORY / "k8s" / "components" / "machines").iterdir()}
    assert {component for component, _, _ in MACHINES} == components | {""}


@needs_kubectl
@pytest.mark.parametrize("machine_type", ["a2-ultragpu-8g", "a3-highgpu-8g", "a3-ultragpu-8g", "a4-highgpu-8g", ""])
def test_the_large_cache_fits_on_local_ssds(machine_type: str) -> None:
    """Those of the machine, or the eight that the guide gives an L4 machine."""
    (count,) = re.findall(r"`--ephemeral-storage-local-ssd=count=(\d+)`", GUIDE)
    table = machines.machines()
    machine = table[machine_type or "g2-standard-96"]
    node = machine.allocatable(200, machine.local_ssd_gib or int(count) * machines.LOCAL_SSD_GIB)
    wanted = requests_of(pod_of(rendered("with-everything"))).ephemeral_storage
    assert machine.allocatable(1000).ephemeral_storage < wanted <= node.ephemeral_storage


@needs_kubectl
def test_the_pool_for_queued_provisioning_has_the_run_s_machines() -> None:
    (command,) = re.findall(r"gcloud container node-pools create l4-queued (?:.*\\\n)*.*", GUIDE)
    pool = dict(re.findall(r"--([\w-]+)=(\S+)", command.replace("\\\n", " ")))
    job = job_of(rendered("with-queued-provisioning"))
    machine = machines.machines()[pool["machine-type"]]
    assert_fits([requests_of(job["template"]["spec"])], machine.allocatable(int(pool["disk-size"])), SYSTEM_PODS)
    assert job["completions"] <= int(pool["total-max-nodes"])
    (queue,) = of_kind(rendered("queues-flex-start"), "ClusterQueue")
    (group,) = queue["spec"]["resourceGroups"]
    requests = job["template"]["spec"]["containers"][0]["resources"]["requests"]
    for resource in group["flavors"][0]["resources"]:
        wanted = quantity(requests[resource["name"]]) * job["completions"]
        assert quantity(resource["nominalQuota"]) >= wanted, resource


@needs_kubectl
def test_tensorboard_fits_on_the_cluster_s_first_node() -> None:
    (machine,) = re.findall(r"--num-nodes=1 --machine-type=(\S+)", GUIDE)
    pods = [deployment["spec"]["template"]["spec"] for deployment in of_kind(rendered("tensorboard"), "Deployment")]
    node = machines.machines()[machine].allocatable(100)
    assert_fits([requests_of(pod) for pod in pods], node, SYSTEM_PODS)


@needs_kubectl
def test_the_demo_fits_on_two_cpus() -> None:
    """And on 4 GB of memory: minikube with its default drivers, which reserves nothing.

    kube-system requests there what kubeadm's static pods, CoreDNS and the network plugin request: API server 250m,
    controller manager 200m, scheduler 100m, etcd 100m and 100Mi, CoreDNS 100m and 70Mi, kindnet 100m and 50Mi.
    """
    assert "minikube start --cpus=2 --memory=4g" in GUIDE
    manifests = rendered("cpu-local")
    train = requests_of(pod_of(manifests))
    (bucket,) = (deployment["spec"]["template"]["spec"] for deployment in of_kind(manifests, "Deployment"))
    pods = [train] * job_of(manifests)["completions"] + [requests_of(bucket)]
    kernel = 0.05 * 4 * GIB
    node = Resources(cpus=2, memory=4 * GIB - kernel, ephemeral_storage=15 * GIB)
    assert_fits(pods, node, Resources(cpus=0.85, memory=220 * 2**20, ephemeral_storage=0))


def test_the_guide_s_table_of_disks() -> None:
    sizes, storage = (re.findall(r"\d+", row) for row in re.findall(r"^\| (?:disk size|requestable).*", GUIDE, re.M))
    assert [int(text) for text in storage] == [int(allocatable_storage(int(size)) / GIB) for size in sizes]


@needs_kubectl
@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("kubectl ")])
def test_kubectl_knows_the_guide_s_commands(line: str) -> None:
    """kubectl refuses unknown flags before it prints help."""
    words = shlex.split(line, comments=True)
    result = subprocess.run([*words, "--help"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Usage:" in result.stdout
    assert subprocess.run([*words, "--selectr=x", "--help"], capture_output=True).returncode != 0


def test_the_job_knows_the_guide_s_commands() -> None:
    help_texts: dict[str, str] = {}
    for line in COMMANDS:
        if line.startswith("python -m job "):
            verb, *words = line.split()[3:]
            help_texts.setdefault(verb, run(verb, "--help").stdout)
            for option in re.findall(r"--[a-z_]+", " ".join(words)):
                assert f"{option} " in help_texts[verb], line
    assert help_texts


SHELL = [block for block in re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL) if "cat >" in block or "sed " in block]


@needs_kubectl
def test_the_guide_s_files_make_a_run(tmp_path: Path) -> None:
    """Run its commands that write files, in a copy of k8s/; kubectl and gcloud do nothing."""
    shutil.copytree(REPOSITORY / "k8s", tmp_path / "job" / "k8s")
    names = "\n".join(line for line in COMMANDS if line.startswith("export "))
    script = "\n".join(["kubectl() { :; }", "gcloud() { :; }", names, *SHELL])
    subprocess.run(["bash", "-ec", script], check=True, cwd=tmp_path / "job", capture_output=True)
    run_manifests = list(yaml.safe_load_all(kustomize(tmp_path / "runs" / "cats")))
    assert_names_exist(run_manifests)
    (config,) = of_kind(run_manifests, "ConfigMap")
    (tmp_path / "config.yaml").write_text(config["data"]["config.yaml"])
    options = TrainingCLI("fit", [f"--config={tmp_path / 'config.yaml'}"]).config_init
    assert options["run_dir"] == "gs://my-project-job/runs/cats"
    image = "europe-west4-docker.pkg.dev/my-project/job/job"
    assert pod_of(run_manifests)["containers"][0]["image"] == f"{image}:gpu"
    tensorboard = list(yaml.safe_load_all(kustomize(tmp_path / "runs" / "tensorboard")))
    (config,) = of_kind(tensorboard, "ConfigMap")
    assert config["data"] == {"runs": "gs://my-project-job/runs"}
    assert pods_of(tensorboard)[0]["spec"]["containers"][0]["image"] == f"{image}:cpu"
    vertex = {file.name for file in (tmp_path / "runs" / "vertex").iterdir()}
    assert vertex == {file.name for file in VERTEX}
    for file in (tmp_path / "runs" / "vertex").iterdir():
        assert not re.search(r"PROJECT|REGION|BUCKET", file.read_text()), file
    committed = {file: file.read_bytes() for file in (REPOSITORY / "k8s").rglob("*") if file.is_file()}
    for file, content in committed.items():
        assert (tmp_path / "job" / file.relative_to(REPOSITORY)).read_bytes() == content
