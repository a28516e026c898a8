"""``python -m job submit``: start a named run on Kubernetes or Vertex AI."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from job.argparse_internals import actions, option_names
from job.cli.arguments import FLAGS, TRAINING_ALIASES, canonical_arguments
from job.cli.known_options import option_names as options_of_command
from job.cli.parser import Parser
from job.cli.runs import cluster, follow_to_the_end
from job.errors import ConfigError
from job.process.terminal import say
from job.submit import fit_options, overlay
from job.submit.apply import apply
from job.submit.machine import find_machine
from job.submit.run import Kind, Run
from job.submit.values import (
    require_bucket,
    require_email,
    require_image,
    require_name,
    require_object_name,
    require_public,
)
from job.submit.vertex import arguments_of, spec_of, start

SERVICE_ACCOUNT = "train"
_PROJECT = re.compile(r"[a-z][a-z0-9.:-]{4,61}[a-z0-9]")
_REGION = re.compile(r"[a-z]+-[a-z]+[0-9]+")


def submit(args: list[str]) -> None:
    """Run ``python -m job submit ARGS``; options of fit follow ``--``."""
    place = args.index("--") if "--" in args else len(args)
    own, fit_args = args[:place], args[place + 1 :]
    parser = _parser()
    _require_in_front(parser, own)
    canonical = canonical_arguments(own, options=option_names(parser), positional=parser.positional)
    require_public(dict(argument.removeprefix("--").partition("=")[::2] for argument in canonical))
    fit = fit_options.from_arguments(fit_args)
    with fit_options.shell_options_removed():
        options = parser.parse_args(own).as_dict()
    options.pop("config", None)
    main(**options, fit_arguments=fit)


def main(
    name: str,
    image: str,
    machine: str,
    run_dir: str,
    data: str | None = None,
    nodes: int = 1,
    slices: int = 1,
    spot: bool = False,
    kind: Kind = "job",
    queue: str | None = None,
    service_account: str | None = None,
    namespace: str | None = None,
    context: str | None = None,
    disk_gb: int = 200,
    fit: dict[str, Any] | None = None,
    vertex: bool = False,
    project: str | None = None,
    region: str | None = None,
    dry_run: bool = False,
    output: str | None = None,
    replace: bool = False,
    fit_arguments: fit_options.FitOptions | None = None,
) -> None:
    """Start a named run on Kubernetes or Vertex AI, follow its logs, and end with its exit code.

    Options of fit follow "--": python -m job submit cats … -- --model.backbone resnet50 --epochs 10.

    Args:
        name: of the run; all its objects have it.
        image: container image, with a tag or digest.
        machine: type of each node, such as l4x8 or g2-standard-96.
        run_dir: URI of all results, in a bucket. The same one resumes.
        data: URI of the images, which is data.root of fit.
        nodes: number of machines in all.
        slices: number of TPU slices that the machines form; more than one needs --kind jobset.
        spot: use Spot machines, which may be taken away at any moment.
        kind: what runs the pods: a Job of Kubernetes, the same in a queue of Kueue, a JobSet, or a TrainJob of Kubeflow
            Trainer v2.
        queue: of Kueue (a LocalQueue of the namespace).
        service_account: of Kubernetes, which pods run as; on Vertex AI the address of one of Google Cloud. Default:
            train.
        namespace: of Kubernetes. Default: that of kubectl's context.
        context: of kubectl. Default: the current one.
        disk_gb: size of each node's boot disk, as in --disk-size of its node pool; it decides the size of the cache.
        fit: options of fit, as in one of its configuration files; for the file that --config names.
        vertex: start a custom job of Vertex AI, without a cluster.
        project: of Google Cloud, for Vertex AI.
        region: of Google Cloud, for Vertex AI.
        dry_run: print what would be created; no cluster is needed.
        output: folder to write a kustomization to, for kubectl apply -k.
        replace: first delete a run of this name; or write to a folder that has files.
        fit_arguments: the options of fit that follow "--".
    """
    fit_arguments = fit_arguments or fit_options.FitOptions((), {})
    options = fit or {}
    require_public({"run_dir": run_dir, "data": data, "fit": options})
    fit_options.check_names(options, fit_arguments.args, has_data=data is not None)
    if data is not None:
        require_bucket("data", data)
    run = Run(
        name=require_name(name),
        image=require_image(image),
        machine=find_machine(machine),
        run_dir=require_bucket("run_dir", run_dir),
        data=data,
        nodes=nodes,
        slices=slices,
        spot=spot,
        kind=kind,
        disk_gb=disk_gb,
        namespace=namespace and require_object_name("namespace", namespace),
        queue=require_object_name("queue", queue) if queue else "",
        service_account=_service_account(service_account, on_vertex=vertex),
        fit_options=options,
        fit_args=fit_arguments.args,
        fit_files=dict(fit_arguments.files),
    )
    if dry_run and output is not None:
        raise ConfigError("--dry_run prints, and --output writes a folder. Give one of them.")
    if vertex:
        if output is not None or queue or namespace or context or kind != "job" or replace:
            raise ConfigError(
                "--vertex has no cluster, and so no --output, --queue, --namespace, --context, --kind or --replace. "
                "Its runs may have the same name."
            )
        _submit_to_vertex(run, project, region, dry_run=dry_run)
        return
    if project or region:
        raise ConfigError("--project and --region are for Vertex AI. Give --vertex, or leave them out.")
    rendered = overlay.build(run)
    fit_options.check(rendered)
    if dry_run:
        sys.stdout.write(rendered.text)
    elif output is not None:
        overlay.write(run, Path(output).expanduser(), replace=replace)
        say(f"{output} is written. To start the run: kubectl apply -k {output}")
    else:
        kubectl = cluster(namespace, context)
        apply(kubectl, run, rendered, replace=replace)
        follow_to_the_end(kubectl, run.name)


def _submit_to_vertex(run: Run, project: str | None, region: str | None, *, dry_run: bool) -> None:
    spec = spec_of(run)
    fit_options.check_arguments(arguments_of(run), {})
    if dry_run:
        sys.stdout.write(overlay.dump(spec))
        return
    if project is None or not _PROJECT.fullmatch(project):
        raise ConfigError(f"--vertex needs the project of Google Cloud: --project my-project, not {project!r}.")
    if region is None or not _REGION.fullmatch(region):
        raise ConfigError(f"--vertex needs a region of Google Cloud: --region europe-west4, not {region!r}.")
    if code := start(run, project, region):
        sys.exit(code)


def _service_account(name: str | None, *, on_vertex: bool) -> str:
    if name is None:
        return SERVICE_ACCOUNT
    if on_vertex:
        return require_email("service_account", name)
    if "@" in name:
        raise ConfigError(
            f"--service_account {name} is an account of Google Cloud; pods run as one of Kubernetes, which is bound to "
            "it once (k8s/README.md, Workload Identity). Give the name of that one."
        )
    return require_object_name("service_account", name)


def _parser() -> Parser:
    """The parser, without environment variables: JOB_NAME and others are set by build servers, for something else."""
    parser = Parser(
        prog="python -m job submit",
        usage="python -m job submit NAME [options] [-- options of fit]",
        positional=("name",),
        default_env=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options, by their names.")
    parser.add_function_arguments(main, skip={"fit_arguments"})
    for action in actions(parser):
        if action.dest in FLAGS and action.default is False:
            action.nargs, action.const = "?", True
    return parser


def _require_in_front(parser: Parser, args: list[str]) -> None:
    """Check that options of fit stand behind the ``--``.

    Raises:
        ConfigError: one does not.
    """
    own = {name.replace("_", "-") for name in (*option_names(parser), "help")}
    known = options_of_command("fit") | set(TRAINING_ALIASES)
    for argument in args:
        name = argument[2:].partition("=")[0]
        if argument.startswith("--") and name.replace("_", "-") not in own and (name in known or "." in name):
            raise ConfigError(f"--{name} is an option of fit. Give it after --: python -m job submit … -- --{name} …")
