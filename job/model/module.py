"""The LightningModule: two-stage transfer learning of a pretrained backbone."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from job.checkpoint.initial import (
    INITIAL_WEIGHTS_KEY,
    InitialWeights,
    require_same_start,
    saved_initial_weights,
)
from job.checkpoint.state import CALIBRATOR_KEY, CLASSIFIER_KEY, PRECISION_KEY, SKIPPED_STEPS_KEY
from job.cluster import ranks
from job.data.datamodule import ImageDataModule, image_data
from job.data.dataset import Batch
from job.data.sampler import sample_seed
from job.errors import ConfigError, DivergedError
from job.lightning_internals import logs_are_due, validation_follows
from job.model import lora
from job.model.calibrator import Calibrator, read_calibrator
from job.model.classifier import TTA, Classifier, build_classifier, mean_over_flips
from job.model.compile import compile_module
from job.model.config import ModelConfig
from job.model.divergence import DivergenceGuard
from job.model.ema import WeightAverage, extract_averages
from job.model.evaluation import Evaluation
from job.model.freeze import Stage, apply_stage, stage_at
from job.model.head import cpu_threads, is_small_head
from job.model.loading import read_pretrained, restore_module
from job.model.memory_format import log_layout
from job.model.metrics import TaskMetrics
from job.model.optimizer import OptimizerTrial, fuse, make_optimizer, make_scheduler, parameter_groups
from job.model.scheduling import AutoSchedule, plateau_settings
from job.model.spec import decode_spec, net_state, require_same_network, require_state
from job.model.steps import accumulation, completes_step, optimizer_steps, window_samples
from job.model.task import Task
from job.model.tasks import TASKS
from job.model.training_metrics import TrainingMetrics
from job.model.warm_start import build_from, read_warm_start
from job.model.weights import versioned
from job.torch_internals import compile_seconds

log = logging.getLogger(__name__)


class TransferLearningModel(pl.LightningModule):
    """Fine-tunes a pretrained backbone with a new head.

    The backbone is frozen until ``milestones[0]``; then its last layers train, and from ``milestones[1]`` all of it.

    Args:
        tta: test-time augmentation of validation and test: "hflip" averages over horizontal flips.
        pretrained: load ``weights`` when the network is built; False if a checkpoint follows, which has others.
        init_from: checkpoint file of another run, whose weights the network starts with instead; where a checkpoint
            follows, the URI of a run that it must have started from.
        check_finite: stop or skip steps whose loss or gradients are not finite, as ``nonfinite`` says.
        options: hyperparameters by keyword: the fields of :class:`~job.model.config.ModelConfig`.

    Attributes:
        config: the hyperparameters.
        net: the network; built by :meth:`configure_model`.
        stage: the layers that train now.
        guard: stops or skips steps that are not finite; None without ``check_finite``.
        training_metrics: loss and accuracy of the steps of this epoch.
        group_names: name of each parameter group of the optimizer; several may share one.
        evaluation: result of the last validation or test; None before the first.
        initial_weights: the checkpoint that the run started from; None where it is none of another run.
    """

    def __init__(
        self,
        *,
        tta: TTA = "none",
        pretrained: bool = True,
        init_from: str | None = None,
        check_finite: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self.config = ModelConfig(**options)
        self.save_hyperparameters(self.config.plain_values(), logger=False)  # HyperparameterWriter does
        guard = DivergenceGuard(self.config.nonfinite, self.config.max_skipped_steps) if check_finite else None
        self.guard: DivergenceGuard | None = guard
        self.tta = tta
        self.pretrained = pretrained
        self.init_from = init_from
        self.stage = Stage.HEAD
        self.net: Classifier
        self.resize: str
        self.metrics: TaskMetrics
        self.training_metrics: TrainingMetrics
        self.group_names: tuple[str, ...] = ()
        self.evaluation: Evaluation | None = None
        self.initial_weights: InitialWeights | None = None
        self._calibrator: Calibrator | None = None
        self._was_calibrated = False
        self._head_alone = False
        self._threads = torch.get_num_threads()
        self._compile_seconds = 0.0
        self._average: WeightAverage | None = None
        self._loaded_averages: dict[str, Tensor] = {}
        self._trial: OptimizerTrial | None = None

    @property
    def data(self) -> ImageDataModule:
        """The data module of the Trainer."""
        return image_data(self.trainer)

    def setup(self, stage: str) -> None:
        """Begin a run of a Trainer (a Lightning hook)."""
        self._trial = None

    def configure_model(self) -> None:
        """Build the network, whose classes the data module knows by now (a Lightning hook)."""
        with torch.device("cpu"):  # Lightning calls this hook with the accelerator as the default device
            if hasattr(self, "net"):
                self._add_adapters()
            else:
                self._build()

    def _build(self) -> None:
        """Build network and metrics in host memory; Lightning moves the network to the accelerator."""
        device = self.trainer.strategy.root_device
        if device.type == "xla" and self.trainer.state.fn == "fit":
            self._require_possible_on_xla()
        data = self.data
        self._require_task_for(data)
        self.net = self._build_net(device.type)
        if self.trainer.state.fn == "fit":
            log_layout(self.net.name, self.net.memory_format, device.type)
        self._add_adapters()
        if self.config.compile_backbone:
            compile_module(self.net.backbone, device)
        self.resize = data.resize
        samples = max((len(index) for part, index in data.parts.items() if part != "train"), default=0)
        self.metrics = self.task.make_metrics(data.classes, samples=samples, synchronise=self.trainer.world_size > 1)
        self.enter_stage(Stage.HEAD if self.config.milestones else Stage.ALL)

    def _build_net(self, device_type: str) -> Classifier:
        data, config = self.data, self.config
        if self.init_from is None or not self.pretrained:
            weights = read_pretrained(config.weights) if self.pretrained else "none"
            return build_classifier(
                config, weights, classes=data.classes, image_size=data.image_size, device_type=device_type
            )
        warm_start = read_warm_start(self.init_from, config.backbone, config.pooling)
        self.initial_weights = warm_start.origin
        return build_from(
            warm_start,
            config,
            classes=data.classes,
            image_size=data.image_size,
            resize=data.resize,
            device_type=device_type,
        )

    def _add_adapters(self) -> None:
        """Let a fit with --model.lora_rank train adapters; a checkpoint's network contains their updates already."""
        config, backbone = self.config, self.net.backbone
        if not config.lora_rank or self.trainer.state.fn != "fit" or lora.adapters(backbone):
            return
        parameters = sum(parameter.numel() for parameter in backbone.parameters())
        count = lora.add_adapters(backbone, config)
        trained = sum(parameter.numel() for update in lora.adapters(backbone) for parameter in update.parameters())
        log.info(
            "LoRA: %d weights of the backbone have adapters, with %.3g M parameters beside its %.3g M",
            count,
            trained / 1e6,
            parameters / 1e6,
        )
        self.enter_stage(self.stage)

    def _require_task_for(self, data: ImageDataModule) -> None:
        if data.parts["train"].has_several_labels and not TASKS[self.config.task].takes_several_labels:
            raise ConfigError(
                f"images of {data.parts['train'].root} have several labels, or none, and --model.task is "
                f"{self.config.task}. Use --model.task=multilabel."
            )

    def _require_possible_on_xla(self) -> None:
        if self.config.ema:
            raise ConfigError("--model.ema is not supported on XLA, which would compile each step for its own decay.")
        if self.guard is not None and self.guard.nonfinite == "skip":
            raise ConfigError("--model.nonfinite=skip is not supported on XLA, where each step would wait. Use stop.")

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, map_location: Any = None, *_: Any, **overrides: Any
    ) -> TransferLearningModel:
        """Restore a module and its network from a checkpoint.

        Args:
            checkpoint_path: path or URI of a checkpoint file, or of a run_dir (its best checkpoint).
            map_location: device of the module. Default: the CPU.
            overrides: hyperparameters that replace the saved ones, for example ``optimizer`` and ``lr_scheduler``,
                which are not saved. Lightning's options (``strict``, ``weights_only``, ``hparams_file``) have no
                effect: loading is strict, and runs no code.

        Raises:
            CheckpointError: there is no such checkpoint, or it is damaged.
        """
        return restore_module(cls, str(checkpoint_path), torch.device(map_location or "cpu"), overrides)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] to logits [B, num_logits]."""
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute this batch's part of the mean loss over the *global* samples of an optimizer step.

        Each rank divides by the number of global samples and multiplies by the world size, by which DDP divides. So
        each sample has the same weight, also in a last, smaller batch that is unevenly distributed over the ranks. With
        gradient accumulation the samples are those of all batches of the step, which may be fewer batches in the last
        step of an epoch than the number by which Lightning divides.
        """
        losses, logits = self._losses_and_logits(batch)
        self.training_metrics.add(losses, logits, batch)
        total = torch.where(batch["mask"], losses, 0.0).sum()
        mean: Tensor = total * (self.trainer.world_size / batch["global_size"])
        # Lightning reduces what is logged over ranks, behind a barrier, at which each host waits for its GPU.
        if (logs_are_due(self.trainer) and completes_step(self.trainer, batch_idx)) or validation_follows(self.trainer):
            self.log("train/loss", mean, sync_dist=True, batch_size=batch["global_size"])
        accumulate = self.trainer.accumulate_grad_batches
        if accumulate == 1:
            return mean
        batches, size = int(self.trainer.num_training_batches), len(self.data.parts["train"])
        samples = window_samples(batch_idx, accumulate, batches, size, self.data.global_batch_size)
        return total * (self.trainer.world_size * accumulate / samples)

    @functools.cached_property
    def task(self) -> Task:
        """Targets, loss and metrics of the network's classes."""
        return TASKS[self.config.task](self.config, len(self.net.classes), lambda: self.data.parts["train"])

    def training_losses(self, batch: Batch) -> Tensor:
        """Loss per sample of a training batch, float [B]."""
        return self._losses_and_logits(batch)[0]

    def _losses_and_logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = torch.empty(0)

        def forward(batch: Batch) -> Tensor:
            nonlocal logits
            logits = self._logits(batch)
            return logits

        return self.task.training_losses(batch, forward), logits

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Compute what :class:`~job.model.metrics.TaskMetrics` are updated with."""
        return self.task.evaluate(batch, self._logits(batch))

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """As :meth:`validation_step`."""
        return self.validation_step(batch, batch_idx)

    def on_validation_start(self) -> None:
        """Use the EMA weights in a fit with --model.ema, and the same running statistics on all ranks."""
        self.metrics.fits_calibrator = self.trainer.state.fn == "fit"
        if self.guard is not None and self.trainer.state.fn == "fit":
            self.guard.before_validation()
        if self._average is not None:
            self._average.swap(averaged=True)
        ranks.broadcast([b for b in self.net.buffers() if b.is_floating_point()])

    def on_validation_end(self) -> None:
        """Return to the weights in training."""
        self.metrics.fits_calibrator = False
        if self._average is not None:
            self._average.swap(averaged=False)

    def on_validation_batch_end(self, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the metrics."""
        self.metrics.update_logits(**outputs)

    def on_test_batch_end(self, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the metrics."""
        self.metrics.update_logits(**outputs)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/…``."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log ``test/…``."""
        self._log_metrics("test")

    def on_train_start(self) -> None:
        """Set the stage and the gradient accumulation of the epoch in which the run starts or resumes."""
        self._enter_epoch()
        self.training_metrics = self.task.make_training_metrics()
        # GradientAccumulationScheduler acts at the start of an epoch, which a run resumed within one does not pass.
        self.trainer.accumulate_grad_batches = accumulation(self.trainer, self.current_epoch)
        if self.guard is not None:
            self.guard.start(self.trainer, self)
        if self.config.ema:
            self._average = WeightAverage(self.net, self.config.ema)
            self._average.load(self._loaded_averages)
            self._loaded_averages = {}

    def on_train_epoch_start(self) -> None:
        """Set the stage of the epoch."""
        self._enter_epoch()
        self.training_metrics.start_epoch()

    def on_train_epoch_end(self) -> None:
        """Log unreadable samples over all ranks, also if no validation follows, skipped steps and compile time."""
        self.data.share_bad_samples()
        self.log("data/bad_samples", float(len(self.data.bad_samples)))
        if self.guard is not None and (self.guard.skipped_steps or self.guard.nonfinite == "skip"):
            self.log("train/skipped_steps", float(self.guard.skipped_steps))
        if self.config.compile_backbone and (seconds := compile_seconds()) > self._compile_seconds:
            log.info("compiling the backbone took %.0f s in this epoch", seconds - self._compile_seconds)
            self._compile_seconds = seconds

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed dropout, stochastic depth and mixing by (seed, epoch, batch, rank).

        A resumed run draws the same numbers without a generator's state.
        """
        draw = batch_idx * self.trainer.world_size + self.trainer.global_rank
        seed = sample_seed(self.config.seed, self.current_epoch, draw)
        # torch.manual_seed would take 2 ms, and memory in each call, for absent accelerators.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        self._calibrator = None  # it is that of other weights from here on
        if self.guard is not None and batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.guard.before_forward(self.net)
        self._threads = torch.get_num_threads()
        if self._head_alone and self.device.type == "cpu" and is_small_head(self.net.head, len(batch["label"])):
            torch.set_num_threads(1)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Use all threads again between two steps, check the loss, and log the metrics of training."""
        torch.set_num_threads(self._threads)
        if self.guard is not None and "loss" in outputs:
            self.guard.after_batch(self.trainer, outputs["loss"])
        if logs_are_due(self.trainer) and completes_step(self.trainer, batch_idx):
            self._log_training_metrics()

    def _log_training_metrics(self) -> None:
        """Log ``train/…``, over the epoch so far; ``train/loss`` is that of the step."""
        values = self.training_metrics.compute(lambda sums: self.trainer.strategy.reduce(sums, reduce_op="sum"))
        loss = values.pop("loss", None)
        if self.trainer.is_last_batch and loss is not None:
            values["loss_epoch"] = loss
        self.log_dict({f"train/{name}": value for name, value in values.items()})

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Check that gradients are finite."""
        if self.guard is not None:
            self.guard.before_update(self.trainer, optimizer)

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps skipped because their gradients were not finite."""
        return self.guard.skipped_steps if self.guard is not None else 0

    def _enter_epoch(self) -> None:
        stage = stage_at(self.current_epoch, self.config.milestones)
        if stage == self.stage:
            return
        layers = stage.name.lower().replace("_", " ")
        what = f"adapters of {layers}" if self.config.lora_rank and stage != Stage.HEAD else layers
        log.info("epoch %d: training %s", self.current_epoch + 1, what)
        self.enter_stage(stage)
        if self._average is not None:
            self._average.set_trained(self.net)
        strategy = self.trainer.strategy
        if isinstance(strategy, DDPStrategy):
            # DDP synchronises only the parameters that required gradients when it was created. Without a new one the
            # unfrozen layers would silently differ between ranks.
            strategy.model = self
            strategy.configure_ddp()

    def enter_stage(self, stage: Stage) -> None:
        """Freeze and unfreeze the backbone's layers."""
        self.stage = stage
        apply_stage(self.net.backbone, stage, last_share=self.config.unfreeze_last, train_bn=self.config.train_bn)
        self._head_alone = not self.net.backbone_trains

    @property
    def constant_epochs(self) -> int:
        """Number of first epochs in which the backbone's features of an image do not change."""
        config = self.config
        varies = config.train_bn or config.mixup or config.cutmix
        return config.milestones[0] if config.milestones and not varies else 0

    def train(self, mode: bool = True) -> TransferLearningModel:
        """As ``nn.Module.train``, but frozen layers stay in eval mode."""
        super().train(mode)
        if mode and hasattr(self, "net"):
            self.enter_stage(self.stage)
        return self

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Update the EMA weights after each step (a Lightning hook)."""
        super().optimizer_step(*args, **kwargs)
        if self._average is not None and not (self.guard is not None and self.guard.step_skipped):
            self._average.update(self.trainer.global_step)

    def configure_optimizers(self) -> Any:
        """Create optimizer and scheduler, with all parameters from the start.

        The optimizer skips frozen parameters, which have no gradient. Its state has the same shape in each epoch, and
        can be loaded at any resume.
        """
        trial, length, interval = self._try_optimizer(), self._scheduler_length(), self.config.lr_interval
        groups = parameter_groups(self.net, self.config)
        self.group_names = tuple(group.name for group in groups)
        optimizer = make_optimizer(self.config.optimizer, groups, self.config.lr)
        fuse(optimizer, self.trainer.strategy.root_device)
        scheduler = make_scheduler(self.config, optimizer, groups, length)
        settings: dict[str, Any] = {"scheduler": scheduler, "interval": interval}
        if isinstance(scheduler, ReduceLROnPlateau):
            settings |= plateau_settings(scheduler, self.trainer, interval, self.metrics.names)
        trial.require_length(length, interval)
        return {"optimizer": optimizer, "lr_scheduler": settings}

    def _try_optimizer(self) -> OptimizerTrial:
        """The trial of this run's optimizer and scheduler."""
        if self._trial is None:
            groups, device = parameter_groups(self.net, self.config), self.trainer.strategy.root_device
            self._trial = OptimizerTrial(self.config, groups, device, self._scheduler_length())
        return self._trial

    def _scheduler_length(self) -> int | None:
        """How often the run steps its scheduler; None: unlimited."""
        if self.config.lr_interval == "epoch":
            epochs = self.trainer.max_epochs
            return None if epochs is None or epochs < 0 else epochs
        return optimizer_steps(self.trainer, len(self.data.parts["train"]), self.data.global_batch_size)

    def fingerprint(self) -> dict[str, Any]:
        """Settings, by option, that a run which resumes must share.

        Those of optimizer and scheduler are included: the checkpoint restores their settings, and others would be
        ignored.
        """
        fixed = {f"model.{name}": value for name, value in self.config.fixed_values().items()}
        return {**fixed, **self._try_optimizer().settings}

    def resume_hint(self, different: Collection[str]) -> str:
        """Explain a schedule that is as long as the run, where --trainer.max_epochs has changed."""
        if "model.lr_scheduler" not in different or not isinstance(self.config.lr_scheduler, AutoSchedule):
            return ""
        return (
            " Its length is auto: it was planned for the first --trainer.max_epochs and is not stretched, so that a "
            "longer training is a new run."
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the description of the network, which predicts without this class, and the precision."""
        if self.guard is not None:
            self.guard.before_save(self.trainer, checkpoint["state_dict"])
        checkpoint[CLASSIFIER_KEY] = self._description()
        if self._calibrator is not None:
            checkpoint[CALIBRATOR_KEY] = msgspec.to_builtins(self._calibrator)
        checkpoint[PRECISION_KEY] = str(self.trainer.precision)
        checkpoint[SKIPPED_STEPS_KEY] = self.skipped_steps
        if self.initial_weights is not None:
            checkpoint[INITIAL_WEIGHTS_KEY] = msgspec.to_builtins(self.initial_weights)
        if self._average is not None:
            self._average.save(checkpoint)
        if lora.adapters(self.net.backbone):
            lora.save(checkpoint, self.config.lora_alpha)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another network, naming the difference."""
        # A mean or std that the user has not chosen comes from the checkpoint, with its buffers.
        optional = {name for name in ("mean", "std") if getattr(self.config, name) is None}
        optional |= {"thresholds", "format"}
        require_same_network(checkpoint.get(CLASSIFIER_KEY), self._description(), optional)
        if lora.adapters(self.net.backbone):
            lora.restore(checkpoint, self.net.state_dict())
        elif self.trainer.state.fn == "fit":
            lora.require_none(checkpoint)
        require_state(
            net_state(checkpoint, "the checkpoint"),
            {name: tuple(value.shape) for name, value in self.net.state_dict().items()},
            "the checkpoint",
        )
        checkpoint["state_dict"] = versioned(checkpoint["state_dict"], self)
        self.metrics.restore(decode_spec(checkpoint[CLASSIFIER_KEY], "the checkpoint"))
        if self.trainer.state.fn != "fit":
            classes, task = len(self.net.classes), self.config.task
            self.metrics.calibrator = read_calibrator(checkpoint, "the checkpoint", classes, task)
            return
        self.initial_weights = saved_initial_weights(checkpoint)
        if self.init_from is not None:
            require_same_start(self.initial_weights, self.init_from)
        if self.guard is not None:
            self.guard.skipped_steps = checkpoint.get(SKIPPED_STEPS_KEY, 0)
        saved, precision = checkpoint[PRECISION_KEY], str(self.trainer.precision)
        if saved != precision:
            log.warning("the checkpoint was written at precision %s; the run continues at %s", saved, precision)
        if self.config.ema:
            self._loaded_averages = extract_averages(checkpoint)

    def _description(self) -> dict[str, Any]:
        return {**self.net.spec(), **self.metrics.description(), "resize": self.resize}

    def _logits(self, batch: Batch) -> Tensor:
        if self.tta == "hflip":
            return mean_over_flips(self, batch["image"])
        if "features" in batch:
            features = batch["features"]
        else:
            with cpu_threads(self._threads):
                features = self.net.features(batch["image"])
        logits: Tensor = self.net.head(features)
        return logits

    def _log_metrics(self, part: str) -> None:
        self.data.share_bad_samples()
        fits = part == "val" and self.trainer.state.fn == "fit"
        if fits:
            self.metrics.calibrator = None
            self.metrics.choose_thresholds()
            self.metrics.fit_calibrator()
        self.evaluation = self.metrics.compute()
        self.metrics.reset()
        values = dict(self.evaluation.metrics)
        if fits and (fit := self.evaluation.calibrator_fit) is not None:
            self._calibrator = fit.calibrator
            self._was_calibrated |= fit.after is not None
            if self._was_calibrated and "ece" in values:
                values.setdefault("ece_calibrated", values["ece"])  # Lightning would keep that of earlier weights
        loss = values.get("loss", 0.0)  # absent: no sample counted
        if not math.isfinite(loss):
            when = (
                f" at step {self.trainer.global_step} (epoch {self.current_epoch})"
                if self.trainer.state.fn == "fit"
                else ""
            )
            raise DivergedError(f"{part}/loss is {loss}{when}: the network has diverged.")
        for name, value in values.items():
            # Lightning refuses names with "dataloader_idx", and a class may have that name.
            self.log(f"{part}/{name}", value, add_dataloader_idx=False)


def training_groups(trainer: pl.Trainer) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and parameter group of the optimizer, of the groups that are not frozen."""
    module, groups = cast("TransferLearningModel", trainer.lightning_module), trainer.optimizers[0].param_groups
    for name, group in zip(module.group_names, groups, strict=True):
        if any(parameter.requires_grad for parameter in group["params"]):
            yield name, group
