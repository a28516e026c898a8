"""``python -m job serve``: answer predictions over HTTP."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Literal

from job.cli.parser import call_with_options
from job.errors import ConfigError
from job.process.cpus import available_cpus
from job.serve.settings import DEFAULT_PORT, MAX_IMAGE_PIXELS, Limits, Settings, VertexEnvironment

PACKAGES = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")
MOST_WORKERS = 8


def serve(args: list[str]) -> None:
    """Run ``python -m job serve ARGS``."""
    call_with_options("serve", main, args, positional=("run_dir",))


def main(
    run_dir: str | None = None,
    ckpt: str | None = None,
    host: str | None = None,
    port: int | None = None,
    name: str = "model",
    device: str | None = None,
    precision: Literal["auto", "bf16", "fp32"] = "auto",
    compile: bool = False,
    tta: Literal["none", "hflip"] = "none",
    max_batch_size: int = 32,
    max_wait_ms: float = 5.0,
    max_queue: int = 512,
    max_instances: int = 128,
    max_body_mb: float = 32.0,
    max_pending_mb: float = 512.0,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    max_connections: int = 1024,
    timeout: float = 30.0,
    num_workers: int | None = None,
    grace: float = 25.0,
    drain_delay: float = 5.0,
    calibrated: Literal["auto", "true", "false"] = "auto",
) -> None:
    """Answer predictions over HTTP, by the protocols of Vertex AI and KServe, and for files as they are.

    Args:
        run_dir: folder of the run; its best checkpoint is used unless --ckpt names another one. Default:
            AIP_STORAGE_URI, which Vertex AI sets.
        ckpt: checkpoint file, RUN_DIR/checkpoints/last, or a run_dir, which means its best checkpoint.
        host: address to listen on. 0.0.0.0 or :: lets other machines connect: the server has no passwords. Default:
            localhost, and 0.0.0.0 on Vertex AI.
        port: port to listen on; 0 takes any free one. Default: AIP_HTTP_PORT, which Vertex AI sets, or 8080.
        name: the model's name in the routes /v1/models/NAME and /v2/models/NAME.
        device: torch device. Default: the first GPU, where CUDA has one, else the CPU.
        precision: bf16 computes by autocast, fp32 in float32. auto is bf16 where the hardware multiplies it natively,
            else fp32.
        compile: compile the network by torch.compile, which takes a minute and a C++ compiler; every batch is then
            padded to --max_batch_size.
        tta: test-time augmentation: hflip averages predictions over horizontal flips.
        max_batch_size: images that the model computes at once.
        max_wait_ms: milliseconds that an image waits for others, if there are any.
        max_queue: images that wait or are computed, of all requests; a request beyond it gets status 429.
        max_instances: images per request.
        max_body_mb: megabytes per request.
        max_pending_mb: megabytes of all requests that are held in memory; a request beyond it gets status 429.
        max_image_pixels: height times width of the largest image; a larger one is unreadable.
        max_connections: open connections; one beyond it gets status 503.
        timeout: seconds for the body of a request to arrive, and then for its predictions.
        num_workers: number of decoding threads. Default: one per CPU core, at most 8.
        grace: seconds from a signal to the end of the process, in which accepted requests are finished.
        drain_delay: seconds of them in which new requests are still accepted, while readiness is false.
        calibrated: auto calibrates probabilities where the checkpoint has a calibration; true requires one; false
            leaves them as the network computes them.
    """
    vertex = VertexEnvironment.of(os.environ)
    checkpoint_uri = ckpt or run_dir or vertex.storage_uri
    if checkpoint_uri is None:
        raise ConfigError("serve needs a checkpoint. Give --run_dir or --ckpt.")
    limits = Limits(
        max_batch_size=max_batch_size,
        max_wait_ms=max_wait_ms,
        max_queue=max_queue,
        max_instances=max_instances,
        max_body_mb=max_body_mb,
        max_pending_mb=max_pending_mb,
        max_image_pixels=max_image_pixels,
        max_connections=max_connections,
        timeout=timeout,
    )
    chosen_port = port if port is not None else vertex.port
    settings = Settings(
        host=host or ("localhost" if vertex.port is None else "0.0.0.0"),
        port=DEFAULT_PORT if chosen_port is None else chosen_port,
        name=name,
        predict_route=vertex.predict_route,
        health_route=vertex.health_route,
        limits=limits,
        num_workers=min(available_cpus(), MOST_WORKERS) if num_workers is None else num_workers,
        grace=grace,
        drain_delay=drain_delay,
    )
    if missing := [package for package in PACKAGES if find_spec(package) is None]:
        raise ConfigError(f'serve needs {", ".join(missing)}: pip install ".[serve]"')
    # torch takes seconds to import: not for --help or a misspelt option.
    from job.predict.predictor import Predictor, load
    from job.serve.device import require_device
    from job.serve.server import serve as run

    if device is not None:
        require_device(device)

    def load_model() -> Predictor:
        predictor = load(checkpoint_uri, device, tta, max_image_pixels, precision, calibrated)
        if compile:
            predictor.compile(max_batch_size)
        return predictor

    run(load_model, settings)
