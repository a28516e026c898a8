"""``--help`` of the commands that build a Trainer: their common options, printed without importing Lightning."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from job.process.logs import HELP

WIDTH = 110
_COLUMN = 30


@dataclass(frozen=True)
class Option:
    """A line of ``--help``.

    Attributes:
        name: the option, as it is documented.
        value: placeholder or choices of its value; empty: a flag.
        text: its meaning.
        default: the default as text, empty where there is none or ``text`` explains it.
        alias_of: the option that it is a short name of.
    """

    name: str
    value: str
    text: str
    default: str = ""
    alias_of: str = ""


_DATA = [
    Option("data.root", "URI", "Class folders, or train/ and val/ (test/) of class folders; also archives and tables."),
    Option("data.train", "URI", "Training images, in place of --data.root; see also --data.val, --data.test."),
    Option("data.image_size", "PIXELS", "Height and width of the model's input.", "224"),
    Option("batch_size", "N", "Images per step, over all processes.", "32", alias_of="data.global_batch_size"),
    Option("data.num_workers", "N", "Decoding threads per process. Default: one per CPU core."),
    Option("data.max_bad_samples", "N", "Unreadable images to tolerate: a number, or a share such as 0.5%.", "0"),
]
_RUN = [
    Option("run_dir", "URI", "Folder of all results: gs://, s3:// or a path. Also the first argument without a name."),
    Option("config", "RECIPE|FILE", "A recipe of this package (head, finetune, augmented, …) or a YAML file."),
]
_HARDWARE = [
    Option("trainer.accelerator", "NAME", "auto, cpu, gpu, mps or tpu.", "auto"),
    Option("trainer.precision", "NAME", "bf16-mixed, 16-mixed, 32-true, … Default: the fastest of this hardware."),
]
_SEED = Option("seed_everything", "N", "Seed of sample order, augmentation and initial weights.", "0")
_FIT = {
    "run": [
        *_RUN,
        Option("resume", "auto|never|must|best", "Continue from the newest checkpoint, or the best.", "auto"),
        _SEED,
    ],
    "data": [
        *_DATA,
        Option("data.augment", "CLASS", "A torchvision.transforms.v2 transform. Default: random horizontal flips."),
    ],
    "model": [
        Option("model.backbone", "NAME", "A torchvision model, or a timm model as timm/NAME.", "resnet50"),
        Option("model.weights", "DEFAULT|none|URI", "Pretrained weights of the backbone.", "DEFAULT"),
        Option("init_from", "RUN_DIR", "Start a new run from another run's weights, also with other classes."),
        Option("model.milestones", "[E1,E2]", "Epochs at which the last layers, then all layers, train.", "[5, 10]"),
        Option("model.ema", "DECAY", "EMA decay; EMA weights are used for evaluation. 0 disables.", "0.0"),
    ],
    "training": [
        Option(
            "model.task", "NAME", "classification, or multilabel for any number of labels per image.", "classification"
        ),
        Option("lr", "RATE", "Learning rate. Default: that of the optimizer.", alias_of="model.lr"),
        Option("model.optimizer", "CLASS", "A torch optimizer. Default: Adam."),
        Option("model.lr_scheduler", "CLASS", "A torch scheduler. Default: MultiStepLR at milestones."),
        Option("epochs", "N", "Number of epochs.", "15", alias_of="trainer.max_epochs"),
        Option(
            "early_stopping",
            "N",
            "Stop after N validations in a row without a better --checkpoint.monitor. 0 disables. Also --patience.",
            "0",
        ),
        Option("trainer.gradient_clip_val", "NORM", "Clip gradients to this norm."),
        Option("trainer.accumulate_grad_batches", "N", "Batches per optimizer step.", "1"),
    ],
    "hardware": _HARDWARE,
    "checkpoints": [
        Option("checkpoint.every_n_steps", "N", "Save every N steps, in addition to every epoch."),
        Option("checkpoint.monitor", "METRIC", "Metric of the best checkpoint. Default: val/accuracy or val/mAP."),
        Option("checkpoint.keep_last", "N", "Number of newest checkpoints to keep.", "2"),
        Option("grace", "SECONDS", "Time to save and exit after a signal.", "25.0"),
    ],
}
_TUNE = {
    "run": [*_RUN, _SEED],
    "data": _DATA,
    "model": _FIT["model"][:3],
    "search": [
        Option("lr_finder.lowest", "RATE", "Lowest learning rate to try.", "1e-06"),
        Option("lr_finder.highest", "RATE", "Highest learning rate to try.", "1.0"),
    ],
    "hardware": _HARDWARE,
}
_EVALUATE = {
    "run": [
        *_RUN[:1],
        Option("ckpt", "URI", "A checkpoint file, or RUN_DIR/checkpoints/last. Default: the best in RUN_DIR."),
        Option("config", "FILE", "A YAML file. Default: RUN_DIR/config.yaml, without classes."),
    ],
    "data": [option for option in _DATA if option.name not in ("data.image_size",)],
    "evaluation": [
        Option("tta", "none|hflip", "Test-time augmentation: average predictions over horizontal flips.", "none"),
    ],
    "hardware": _HARDWARE,
}
_SWEEP = {
    "run": [
        *_RUN[:1],
        Option("config", "FILE", "A YAML file. Default: RUN_DIR/config.yaml, if a fit has left one."),
        _SEED,
    ],
    "data": [option for option in _DATA if option.name != "batch_size"],
    "model": [
        Option("model.backbone", "A,B,…", "One backbone or several: torchvision models, or timm models as timm/NAME."),
        Option("model.weights", "W,X,…", "DEFAULT, none, or one URI per backbone.", "DEFAULT"),
        Option("model.task", "NAME", "classification, or multilabel.", "classification"),
    ],
    "heads": [
        Option("lr", "A,B,…", "Learning rates of AdamW; a range as 1e-4..1e-1 with --samples.", alias_of="sweep.lr"),
        Option("weight_decay", "A,B,…", "Weight decays.", "0,0.01,0.1,1", alias_of="sweep.weight_decay"),
        Option("hidden", "A,B,…", "Hidden layers: none, 256, 256x32, …", "none,64", alias_of="sweep.hidden"),
        Option("label_smoothing", "A,B,…", "Label smoothing.", "0,0.1", alias_of="sweep.label_smoothing"),
        Option("class_weights", "A,B", "none, balanced, or both.", "none", alias_of="sweep.class_weights"),
        Option("dropout", "A,B,…", "Dropout before each linear layer.", "0", alias_of="sweep.dropout"),
        Option("samples", "N", "Random combinations. 0: all combinations.", "0", alias_of="sweep.samples"),
    ],
    "comparison": [
        Option("folds", "N", "Folds of the cross-validation.", "5", alias_of="sweep.folds"),
        Option("epochs", "N", "Epochs per head. Default: about 300 steps.", alias_of="sweep.epochs"),
        Option("batch_size", "N", "Images per step. Default: 32 to 1024.", alias_of="sweep.batch_size"),
    ],
    "hardware": _HARDWARE,
}
_AUDIT = {
    "run": [
        *_RUN[:1],
        Option("config", "FILE", "A YAML file. Default: RUN_DIR/config.yaml, if a fit has left one."),
        _SEED,
    ],
    "data": _DATA,
    "features": [
        *_FIT["model"][:2],
        Option("ckpt", "URI", "A checkpoint or run_dir whose backbone computes the features, instead."),
    ],
    "checks": [
        Option("labels", "auto|none", "none audits images without labels.", "auto", alias_of="audit.labels"),
        Option("folds", "N", "Folds of the check of labels. 0: no such check.", "5", alias_of="audit.folds"),
        Option("similarity", "COSINE", "Least cosine of near copies' features.", "0.85", alias_of="audit.similarity"),
    ],
    "output": [
        Option("write_manifest", "URI", "Table without the suspects, for fit.", alias_of="audit.write_manifest"),
        Option("leave_out", "A,B,…", "Kinds that it leaves out, all or none.", alias_of="audit.leave_out"),
        Option("thumbnails", "N", "Images in audit.html.", "240", alias_of="audit.thumbnails"),
    ],
    "hardware": _HARDWARE,
}
_CHECK = {
    **_FIT,
    "report": [
        Option("json", "", "Print the report as JSON."),
        Option("price_per_hour", "PRICE", "Price of all machines per hour, for an estimate of the whole run."),
    ],
}
COMMON = {
    "fit": _FIT,
    "check": _CHECK,
    "tune": _TUNE,
    "validate": _EVALUATE,
    "test": _EVALUATE,
    "sweep": _SWEEP,
    "audit": _AUDIT,
}
"""Common options by command and group."""
SUMMARIES = {
    "fit": "Train a model, or continue its training, in RUN_DIR.",
    "check": "Find out what would stop a fit with these options, or slow it down; nothing is trained.",
    "tune": "Find an initial learning rate and the largest batch that fits; nothing that is trained is kept.",
    "validate": "Evaluate a checkpoint on the validation images.",
    "sweep": "Train many heads of a frozen backbone at once, and keep the best by cross-validation.",
    "audit": "Find wrong labels, copies, leakage between parts, outliers and broken images in a data set.",
    "test": "Evaluate a checkpoint on the test images.",
}
EXAMPLES = {
    "fit": "python -m job fit gs://BUCKET/runs/1 --config head --data.root gs://BUCKET/data --model.backbone resnet18",
    "check": "python -m job check gs://BUCKET/runs/1 --config head --data.root gs://BUCKET/data --price_per_hour 2.5",
    "tune": "python -m job tune gs://BUCKET/runs/1 --data.root gs://BUCKET/images --model.backbone resnet18",
    "sweep": "python -m job sweep gs://BUCKET/runs/1 --data.root gs://BUCKET/images --model.backbone resnet18,resnet50",
    "audit": "python -m job audit gs://BUCKET/runs/1 --data.root gs://BUCKET/images --write_manifest clean.csv",
    "validate": "python -m job validate gs://BUCKET/runs/1 --tta hflip",
    "test": "python -m job test gs://BUCKET/runs/1 --data.test gs://BUCKET/test-images",
}


def common_help(command: str) -> str:
    """The text of ``--help``."""
    lines = [f"usage: python -m job {command} RUN_DIR [options]", "", SUMMARIES[command], ""]
    lines += ["example:", f"  {EXAMPLES[command]}"]
    for title, group in COMMON[command].items():
        lines += ["", f"{title}:"]
        for option in group:
            lines += _lines(option)
    lines += [
        "",
        HELP,
        "",
        f"All options: python -m job {command} --help-all. A class's own: python -m job {command} "
        "--model.optimizer.help AdamW.",
        "Each option is also a key in a YAML file for --config, and a variable: JOB_DATA__ROOT is --data.root.",
    ]
    return "\n".join(lines)


def _lines(option: Option) -> list[str]:
    head = f"  --{option.name} {option.value}".rstrip()
    text = option.text + (f" Default: {option.default}." if option.default else "")
    text += f" Short for --{option.alias_of}." if option.alias_of else ""
    wrapped = textwrap.wrap(text, WIDTH - _COLUMN)
    if len(head) >= _COLUMN - 1:
        return [head, *(" " * _COLUMN + line for line in wrapped)]
    return [head.ljust(_COLUMN) + wrapped[0], *(" " * _COLUMN + line for line in wrapped[1:])]
