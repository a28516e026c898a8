"""Sweep of architectures: correctness of channels_last on a CPU, compared with the default memory format.

``python benchmarks/memory_formats.py --csv FILE`` tries each architecture with random weights in a child process: a
forward and backward pass in training mode and one in evaluation mode, in both formats. A child that is killed by a
signal counts as a failure of its format. Where glibc's heap checker is installed, children run under it, because writes
out of bounds seldom crash by themselves. ``--module job/model/channels_last.py`` writes the list that the package
reads: the architectures whose results agree. The table also contains the CPU seconds of one pass.

The architectures are all of torchvision's, and timm's in ``POPULAR`` and the two smallest of each family.
Architectures with more than ``--max_parameters`` are not run, and use the default format.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import signal
import sys
import time
from pathlib import Path
from typing import Any

HEAP_CHECKER = "libc_malloc_debug.so.0"
TOLERANCE = {"features": 1e-3, "gradient": 1e-2}
SMALL = ("test_", "atto", "femto", "pico", "nano", "tiny", "xxs", "xs", "small", "_t", "_s", "18", "lite0", "b0", "_0")
POPULAR = """
    resnet18 resnet26d resnet34 resnet50 resnet50d resnet101 resnext50_32x4d wide_resnet50_2 seresnet50 ecaresnet50d
    efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_lite0
    tf_efficientnet_b0 tf_efficientnet_lite0 tf_efficientnet_lite1 tf_efficientnet_lite2 tf_efficientnet_lite3
    tf_efficientnet_lite4 efficientnetv2_rw_t efficientnetv2_rw_s tf_efficientnetv2_b0 tf_efficientnetv2_s
    mobilenetv2_100 mobilenetv3_large_100 mobilenetv3_small_100 mobilenetv4_conv_small mobilenetv4_conv_medium
    convnext_atto convnext_femto convnext_pico convnext_nano convnext_tiny convnext_small convnext_base
    convnextv2_atto convnextv2_nano convnextv2_tiny densenet121 dla34 dpn68 regnetx_002 regnety_004 regnety_016
    repvgg_a0 repvgg_a2 fastvit_t8 fastvit_t12 fastvit_sa12 mobileone_s0 vit_tiny_patch16_224 vit_small_patch16_224
    vit_base_patch16_224 deit_tiny_patch16_224 deit3_small_patch16_224 swin_tiny_patch4_window7_224
    maxvit_tiny_tf_224 edgenext_small inception_v3 inception_v4 xception vgg16 vgg16_bn
""".split()  # noqa: SIM905


def main() -> None:
    """Run the architectures that are not in the table yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--csv", type=Path, required=True, help="table of results; architectures in it are not run again"
    )
    parser.add_argument("--module", type=Path, help="list of architectures to write for the package")
    parser.add_argument("--only", nargs="*", help="architectures to run instead of all")
    parser.add_argument("--max_parameters", type=float, default=150e6)
    parser.add_argument("--seconds", type=float, default=120.0, help="limit per architecture")
    options = parser.parse_args()
    if "GLIBC_TUNABLES" not in os.environ and sys.platform == "linux":
        variables = {"LD_PRELOAD": HEAP_CHECKER, "GLIBC_TUNABLES": "glibc.malloc.check=3", "OMP_NUM_THREADS": "1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **variables})  # noqa: S606
    rows = {row["name"]: row for row in csv.DictReader(options.csv.open())} if options.csv.exists() else {}
    for name in options.only or architectures():
        if name in rows:
            continue
        rows[name] = {"name": name, **measured(name, options)}
        print(rows[name], flush=True)
        with options.csv.open("w", newline="") as file:
            columns = ("name", "size", "parameters", "result", "features", "gradient", "default_s", "channels_last_s")
            table = csv.DictWriter(file, columns, restval="")
            table.writeheader()
            table.writerows(rows[key] for key in sorted(rows))
    if options.module:
        write_module(options.module, rows)


def architectures() -> list[str]:
    """Return all architectures of torchvision, and popular and small ones of timm."""
    import timm
    import torch
    import torchvision
    from timm.models._registry import _model_to_module

    families: dict[str, list[str]] = {}
    for name in timm.list_models():
        families.setdefault(_model_to_module[name], []).append(name)
    chosen = [name for name in POPULAR if timm.is_model(name)]
    for names in families.values():
        small = sorted(names, key=lambda name: (not any(mark in name for mark in SMALL), name))[:10]
        sizes = {}
        for name in small:
            try:
                with torch.device("meta"):
                    sizes[name] = sum(p.numel() for p in timm.create_model(name, num_classes=0).parameters())
            except Exception:  # not every builder works on the meta device
                sizes[name] = 30_000_000
        chosen += sorted(sizes, key=lambda name: sizes[name])[:2]
    chosen += timm.list_models("test_*")
    return [*torchvision.models.list_models(module=torchvision.models), *(f"timm/{n}" for n in dict.fromkeys(chosen))]


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Try one architecture in a forked process; ``result`` is "ok", or the failure."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reader)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.alarm(int(options.seconds))
        with os.fdopen(writer, "w", buffering=1) as pipe:
            try:
                try_layouts(name, options, pipe)
            except Exception as error:
                pipe.write(json.dumps({"result": f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"}) + "\n")
        os._exit(0)
    os.close(writer)
    result: dict[str, Any] = {"result": "did not start"}
    with os.fdopen(reader) as pipe:
        for line in pipe:
            result.update(json.loads(line))
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        result["result"] = f"{signal.Signals(os.WTERMSIG(status)).name} in {result['result']}"
    return result


def try_layouts(name: str, options: argparse.Namespace, pipe: Any) -> None:
    """Write intermediate results as lines of JSON, so that a crash leaves the last of them."""
    import torch

    from job.model.backbone import build_backbone

    torch.set_num_threads(1)
    torch.manual_seed(0)
    pipe.write(json.dumps({"result": "build"}) + "\n")
    net = build_backbone(name)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    pipe.write(json.dumps({"parameters": parameters}) + "\n")
    if parameters > options.max_parameters:
        pipe.write(json.dumps({"result": "not run"}) + "\n")
        return
    size = (getattr(net, "default_cfg", None) or {}).get("input_size", (3, 224, 224))[-1]
    pipe.write(json.dumps({"size": size}) + "\n")
    images, outputs = torch.randn(2, 3, size, size), {}
    state = None
    for layout in (torch.contiguous_format, torch.channels_last):
        label = "default" if layout == torch.contiguous_format else "channels_last"
        pipe.write(json.dumps({"result": label}) + "\n")
        net.to(memory_format=layout)
        batch = images.contiguous(memory_format=layout)
        net.train()
        forward_and_backward(net, batch)
        if state is None:
            state = {key: value.clone() for key, value in net.state_dict().items()}
        for key, value in net.state_dict().items():
            value.copy_(state[key])
        net.eval()
        began = time.process_time()
        features, gradient = forward_and_backward(net, batch)
        pipe.write(json.dumps({f"{label}_s": round(time.process_time() - began, 3)}) + "\n")
        outputs[label] = (features, gradient)
    (one, grad), (other, other_grad) = outputs["default"], outputs["channels_last"]
    errors = {"features": relative_error(one, other), "gradient": relative_error(grad, other_grad)}
    exceeded = [key for key, value in errors.items() if not value <= TOLERANCE[key]]
    result = f"{exceeded[0]} differ" if exceeded else "ok"
    pipe.write(json.dumps({"result": result, **{key: f"{value:.1e}" for key, value in errors.items()}}) + "\n")


def forward_and_backward(net: Any, images: Any) -> tuple[Any, Any]:
    """Return features, and the gradient of all parameters as one vector."""
    import torch

    net.zero_grad()
    features = net(images)
    torch.manual_seed(1)
    (features * torch.randn(features.shape)).sum().backward()
    gradients = [p.grad.contiguous().flatten() for p in net.parameters() if p.grad is not None]
    return features.detach(), torch.cat(gradients)


def relative_error(one: Any, other: Any) -> float:
    """Norm of the difference, divided by the norm of the first."""
    return float((one - other).norm() / one.norm().clamp(min=1e-30))


def write_module(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Write the names of architectures with result "ok", and the versions of the libraries."""
    import timm
    import torch
    import torchvision

    good = sorted(name for name, row in rows.items() if row["result"] == "ok")
    listed = "\n".join(f'        "{name}",' for name in good)
    path.write_text(
        '"""Architectures that are correct in channels_last on a CPU (benchmarks/memory_formats.py)."""'
        "\n\n"
        "from __future__ import annotations\n\n"
        f'MEASURED_WITH = {{"torch": "{torch.__version__}", "torchvision": "{torchvision.__version__}", '
        f'"timm": "{timm.__version__}", "cpu": "{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"}}\n\n'
        f"CHANNELS_LAST_ON_CPU = frozenset(\n    [\n{listed}\n    ]\n)\n"
    )


if __name__ == "__main__":
    main()
