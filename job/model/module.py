"""The LightningModule: two-stage transfer learning of a pretrained backbone."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, ReduceLROnPlateau

from job.cluster import ranks
from job.data.datamodule import image_data
from job.data.dataset import Batch
from job.data.sampler import sample_seed
from job.errors import CheckpointError, ConfigError, DivergedError
from job.lightning_internals import logs_are_due
from job.model.backbone import build_backbone
from job.model.classifier import Classifier, mean_over_mirrored, probabilities
from job.model.compile import compile_module
from job.model.divergence import DivergenceGuard
from job.model.ema import WeightAverage
from job.model.freeze import Stage, apply_stage, stage_at
from job.model.hyperparameters import plain_hyperparameters, restore_module
from job.model.loss import balanced_weights, mixing, per_sample_loss, smoothed
from job.model.memory_format import log_layout
from job.model.metrics import EvaluationMetrics
from job.model.normalisation import completed
from job.model.optimizer import (
    ParameterGroup,
    fuse,
    make_optimizer,
    parameter_groups,
    require_step,
    stand_ins,
    with_fusion_of,
)
from job.model.scheduling import AutoSchedule, build_scheduler, plateau_settings, require_length
from job.model.spec import decode_spec, net_state, require_state
from job.model.steps import accumulation, optimizer_steps, window_samples
from job.model.threads import cpu_threads, is_short
from job.model.weights import versioned
from job.torch_internals import compile_seconds

log = logging.getLogger(__name__)


class TransferLearningModel(pl.LightningModule):
    """Fine-tunes a pretrained backbone with a new head.

    The backbone is frozen until ``milestones[0]``, its last layers train from there, and all of it
    from ``milestones[1]``.

    Args:
        backbone: an architecture of torchvision.models (resnet50, vit_b_16, …), or timm/NAME.
        weights: DEFAULT (the library's pretrained ones), none, or the URI of a state dict or checkpoint (.pth,
            .safetensors, .ckpt), or of another run's run_dir, which means its best checkpoint.
        hidden: widths of the head's hidden layers.
        mean: per-channel mean of the pretraining images, in [0, 1]. Default: that of the pretrained weights.
        std: per-channel standard deviation. Default: that of the pretrained weights.
        milestones: epochs at which the last layers, then all, are unfrozen.
        unfreeze_last: share of the backbone's layers that milestones[0] unfreezes.
        train_bn: train batch normalisation in the frozen part, too.
        backbone_lr_factor: learning rate of the backbone's last layers relative to the head's.
        first_lr_factor: that of its first layers relative to its last; in between it falls geometrically, in 8 steps.
        decay_norm_and_bias: let the optimizer's weight decay act on biases and normalisation, too.
        label_smoothing: share of each training target that goes to all classes alike.
        class_weights: "balanced" weighs each class's loss in training inversely to how often it occurs.
        mixup: alpha of MixUp; 0: none. Mixing is within a process's share of a batch.
        cutmix: alpha of CutMix; 0: none. With both, one is chosen for each batch.
        ema: decay of a moving average of the weights, which is then what is validated and predicts; 0: none.
        compile_backbone: let torch.compile make faster code for the backbone, which takes a C++ compiler and time.
        optimizer: any torch optimizer; default Adam with lr 0.001.
        lr_scheduler: any torch scheduler; default MultiStepLR at milestones with lr_gamma. Arguments that count its
            intervals (total_steps, total_iters, T_max, …) may be "auto": all of the run. OneCycleLR's max_lr is the
            head's rate, or a list with a rate for each parameter group.
        lr_gamma: factor of the default scheduler.
        lr_interval: step the scheduler every "epoch" or every "step" of the optimizer.
        nonfinite: "stop" ends the run at a loss or gradient that is not finite; "skip" drops the gradients of such a
            step, and waits for a GPU in each step to know.
        max_skipped_steps: consecutive steps that nonfinite="skip" may drop before the run ends.
        seed: seed of the head's initial weights; follows --seed_everything.
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        weights: str = "DEFAULT",
        hidden: list[int] = [256, 32],  # noqa: B006  (never changed; a list is what YAML gives)
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        milestones: list[int] = [5, 10],  # noqa: B006
        unfreeze_last: float = 0.5,
        train_bn: bool = False,
        backbone_lr_factor: float = 0.1,
        first_lr_factor: float = 1.0,
        decay_norm_and_bias: bool = True,
        label_smoothing: float = 0.0,
        class_weights: Literal["none", "balanced"] = "none",
        mixup: float = 0.0,
        cutmix: float = 0.0,
        ema: float = 0.0,
        compile_backbone: bool = False,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: AutoSchedule | LRSchedulerCallable | None = None,
        lr_gamma: float = 0.3,
        lr_interval: Literal["epoch", "step"] = "epoch",
        nonfinite: Literal["stop", "skip"] = "stop",
        max_skipped_steps: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(plain_hyperparameters(locals()), logger=False)  # SavedConfig logs the configuration
        if sorted(milestones) != list(milestones) or len(milestones) > Stage.ALL:
            raise ConfigError(f"--model.milestones must be at most two epochs in rising order, not {milestones}.")
        if not 0 < unfreeze_last <= 1:
            raise ConfigError(f"--model.unfreeze_last is a share, above 0 and at most 1, not {unfreeze_last}.")
        if any(width < 1 for width in hidden):
            raise ConfigError(f"--model.hidden must be positive widths, not {hidden}.")
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"--model.label_smoothing is a share, at least 0 and below 1, not {label_smoothing}.")
        if mixup < 0 or cutmix < 0:
            raise ConfigError(f"--model.mixup and --model.cutmix are at least 0, not {mixup} and {cutmix}.")
        if not 0 <= ema < 1:
            raise ConfigError(f"--model.ema is at least 0 and below 1, not {ema}.")
        if not 0 < first_lr_factor <= 1:
            raise ConfigError(f"--model.first_lr_factor is above 0 and at most 1, not {first_lr_factor}.")
        if max_skipped_steps < 0:
            raise ConfigError(f"--model.max_skipped_steps is at least 0, not {max_skipped_steps}.")
        self.backbone_name = backbone
        self.weights = weights
        self.hidden = list(hidden)
        self.normalisation = {"mean": mean, "std": std}
        self.milestones = list(milestones)
        self.unfreeze_last = unfreeze_last
        self.train_bn = train_bn
        self.backbone_lr_factor = backbone_lr_factor
        self.first_lr_factor = first_lr_factor
        self.decay_norm_and_bias = decay_norm_and_bias
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights
        self.mixup = mixup
        self.cutmix = cutmix
        self.ema = ema
        self.compile_backbone = compile_backbone
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_gamma = lr_gamma
        self.lr_interval = lr_interval
        self.guard: DivergenceGuard | None = DivergenceGuard(nonfinite, max_skipped_steps)
        self.seed = seed
        self.mirror = False
        self.stage = Stage.HEAD
        self._mix = mixing(mixup, cutmix)
        self._head_alone = False
        self._threads = torch.get_num_threads()
        self._compile_seconds = 0.0
        self._weights: Tensor | None = None
        self._average: WeightAverage | None = None
        self._averages: dict[str, Tensor] = {}
        self.net: Classifier
        self.metrics: EvaluationMetrics
        self.confusion = torch.empty(0, 0, dtype=torch.int64)
        self._recipe: dict[str, str] = {}

    def configure_model(self) -> None:
        """Build the network, once the data has said which classes there are (a Lightning hook)."""
        if hasattr(self, "net"):
            return
        device_type = self.trainer.strategy.root_device.type
        if device_type == "xla" and self.trainer.state.fn == "fit":
            self._require_possible_on_xla()
        data = image_data(self.trainer)
        # In host memory, from the host's generator: the head begins alike on every accelerator.
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            backbone = build_backbone(self.backbone_name, self.weights, data.image_size)
            mean, std = completed(self.normalisation, self.backbone_name, self.weights)
            self.net = Classifier(
                backbone,
                name=self.backbone_name,
                classes=data.classes,
                hidden=self.hidden,
                image_size=data.image_size,
                mean=mean,
                std=std,
                device_type=device_type,
            )
        if self.trainer.state.fn == "fit":
            log_layout(self.net.name, self.net.memory_format, device_type)
        if self.compile_backbone:
            compile_module(self.net.backbone, self.trainer.strategy.root_device)
        self.resize: str = data.resize
        samples = max((len(index) for part, index in data.parts.items() if part != "train"), default=0)
        self.metrics = EvaluationMetrics(data.classes, samples=samples, synchronise=self.trainer.world_size > 1)
        self.enter_stage(Stage.HEAD if self.milestones else Stage.ALL)

    def _require_possible_on_xla(self) -> None:
        if self.ema:
            raise ConfigError("--model.ema does not exist on XLA: each step's decay would be compiled anew.")
        if self.guard is not None and self.guard.nonfinite == "skip":
            raise ConfigError("--model.nonfinite=skip does not exist on XLA, where each step would wait. Use stop.")

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, map_location: Any = None, *_: Any, **overrides: Any
    ) -> TransferLearningModel:
        """Restore a module, and the network that its checkpoint describes, from a file or run_dir at any URI.

        Args:
            checkpoint_path: as ``--ckpt`` of validate.
            map_location: device of the module. Default: the CPU.
            overrides: arguments of this class in place of the saved hyperparameters, among them ``optimizer`` and
                ``lr_scheduler``, which are not saved. Lightning's own options (``strict``, ``weights_only``,
                ``hparams_file``) are accepted and without effect: loading is strict, and runs no code.

        Raises:
            CheckpointError: there is no such checkpoint, or it is damaged.
        """
        return restore_module(cls, str(checkpoint_path), torch.device(map_location or "cpu"), overrides)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] to logits [B, num_logits]."""
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """This batch's share of the mean loss over the *global* samples of an optimizer step.

        Every rank divides by the number of global samples and multiplies by the world size, which DDP's averaging
        takes out again: so a last, smaller batch weighs each sample the same however it falls on the ranks. Where
        gradients are accumulated, those are the samples of all batches of the step; Lightning divides by the number of
        batches, which the last step of an epoch may have less of.
        """
        losses = self.training_losses(batch)
        total = torch.where(batch["mask"], losses, 0.0).sum()
        mean: Tensor = total * (self.trainer.world_size / batch["global_size"])
        # A step from kept features takes little longer than Lightning's log, in which ranks wait for one another.
        if "features" not in batch or self.trainer.is_last_batch or logs_are_due(self.trainer):
            self.log("train/loss", mean, sync_dist=True, batch_size=batch["global_size"])
        accumulate = self.trainer.accumulate_grad_batches
        if accumulate == 1:
            return mean
        data = image_data(self.trainer)
        batches, size = int(self.trainer.num_training_batches), len(data.parts["train"])
        samples = window_samples(batch_idx, accumulate, batches, size, data.global_batch_size)
        return total * (self.trainer.world_size * accumulate / samples)

    def training_losses(self, batch: Batch) -> Tensor:
        """float [B], of smoothed, mixed and weighted targets where the settings say so."""
        if not self.label_smoothing and self._mix is None and self.class_weights == "none":
            return per_sample_loss(self._logits(batch), batch["label"])
        targets = smoothed(batch["label"], len(self.net.classes), self.label_smoothing)
        if self._mix is not None:
            images, targets = self._mix(batch["image"].float(), targets)
            batch = {**batch, "image": images}
        losses = per_sample_loss(self._logits(batch), targets)
        if self.class_weights == "balanced":
            if self._weights is None:
                labels = image_data(self.trainer).parts["train"].labels
                self._weights = balanced_weights(labels, len(self.net.classes)).to(targets.device)
            losses = losses * (targets @ self._weights)
        return losses

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """What the metrics take: losses [B], probabilities [B, C], labels [B], mask [B]."""
        logits = self._logits(batch)
        return {
            "losses": per_sample_loss(logits, batch["label"]),
            "probabilities": probabilities(logits),
            "labels": batch["label"],
            "mask": batch["mask"],
        }

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """As :meth:`validation_step`."""
        return self.validation_step(batch, batch_idx)

    def on_validation_start(self) -> None:
        """Let all ranks measure the same network, in a fit with --model.ema the average one."""
        if self.guard is not None and self.trainer.state.fn == "fit":
            self.guard.before_validation()
        if self._average is not None:
            self._average.swap(averaged=True)
        ranks.broadcast([b for b in self.net.buffers() if b.is_floating_point()])

    def on_validation_end(self) -> None:
        """Go on from the weights in training."""
        if self._average is not None:
            self._average.swap(averaged=False)

    def on_validation_batch_end(self, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the metrics."""
        self.metrics.update(**outputs)

    def on_test_batch_end(self, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the metrics."""
        self.metrics.update(**outputs)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/…``."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log ``test/…``."""
        self._log_metrics("test")

    def on_train_start(self) -> None:
        """Freeze and unfreeze by the epoch that a resumed run is in, and accumulate as in it."""
        self._enter_epoch()
        # GradientAccumulationScheduler acts at the start of an epoch, which a run resumed within one does not pass.
        self.trainer.accumulate_grad_batches = accumulation(self.trainer, self.current_epoch)
        if self.guard is not None:
            self.guard.start(self.trainer, self)
        if self.ema:
            self._average = WeightAverage(self.net, self.ema)
            self._average.load(self._averages)
            self._averages = {}

    def on_train_epoch_start(self) -> None:
        """Freeze and unfreeze by the epoch."""
        self._enter_epoch()

    def on_train_epoch_end(self) -> None:
        """Count unreadable samples over all ranks, also where no validation follows; say what compiling took."""
        data = image_data(self.trainer)
        data.share_bad_samples()
        self.log("data/bad_samples", float(len(data.bad_samples)))
        if self.guard is not None and (self.guard.skipped_steps or self.guard.nonfinite == "skip"):
            self.log("train/skipped_steps", float(self.guard.skipped_steps))
        if self.compile_backbone and (seconds := compile_seconds()) > self._compile_seconds:
            log.info("compiling the backbone took %.0f s in this epoch", seconds - self._compile_seconds)
            self._compile_seconds = seconds

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Draw what is random in this step (dropout, stochastic depth) from (seed, epoch, batch, rank) alone.

        So a resumed run needs no generator's state, and draws the same.
        """
        draw = batch_idx * self.trainer.world_size + self.trainer.global_rank
        seed = sample_seed(self.seed, self.current_epoch, draw)
        # torch.manual_seed takes 2 ms, and memory at each call, for accelerators that are not there.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        if self.guard is not None and batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.guard.before_forward(self.net)
        self._threads = torch.get_num_threads()
        if self._head_alone and self.device.type == "cpu" and is_short(self.net.head, len(batch["label"])):
            torch.set_num_threads(1)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Give what lies between two steps its threads back."""
        torch.set_num_threads(self._threads)
        if self.guard is not None and "loss" in outputs:
            self.guard.after_batch(self.trainer, outputs["loss"])

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Look for gradients that are not finite."""
        if self.guard is not None:
            self.guard.before_update(self.trainer, optimizer)

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that were skipped since their gradients were not finite."""
        return self.guard.skipped_steps if self.guard is not None else 0

    def _enter_epoch(self) -> None:
        stage = stage_at(self.current_epoch, self.milestones) if self.milestones else Stage.ALL
        if stage == self.stage:
            return
        log.info("epoch %d: training %s", self.current_epoch, stage.name.lower().replace("_", " "))
        self.enter_stage(stage)
        if self._average is not None:
            self._average.follow(self.net)
        strategy = self.trainer.strategy
        if isinstance(strategy, DDPStrategy):
            # DDP synchronises the parameters that required gradients when it was made, and no others:
            # without a new one the unfrozen layers would drift apart on the ranks, silently.
            strategy.model = self
            strategy.configure_ddp()

    @property
    def constant_epochs(self) -> int:
        """Epochs, from 0, in which the backbone gives the same for the same image."""
        constant = self.milestones and not self.train_bn and self._mix is None
        return self.milestones[0] if constant else 0

    def train(self, mode: bool = True) -> TransferLearningModel:
        """As ``nn.Module.train``, but a frozen backbone stays in eval mode."""
        super().train(mode)
        if mode and hasattr(self, "net"):
            self.enter_stage(self.stage)
        return self

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take each step into the average (a Lightning hook)."""
        super().optimizer_step(*args, **kwargs)
        if self._average is not None and not (self.guard is not None and self.guard.step_skipped):
            self._average.update(self.trainer.global_step)

    def configure_optimizers(self) -> Any:
        """All parameter groups from the start: head, then backbone, its last layers first.

        Frozen parameters have no gradient and are skipped; so the optimizer's state has the same
        shape at every epoch, and loads after any resume.
        """
        groups = self._groups()
        device = self.trainer.strategy.root_device
        if device.type != "xla":
            require_step(self.optimizer, groups)
        optimizer = make_optimizer(self.optimizer, groups)
        fuse(optimizer, device)
        factors = [group.lr_factor for group in groups]
        scheduler = self._scheduler(optimizer, factors)
        config: dict[str, Any] = {"scheduler": scheduler, "interval": self.lr_interval}
        if isinstance(scheduler, ReduceLROnPlateau):
            config |= plateau_settings(scheduler, self.trainer, self.lr_interval, self.net.classes)
        substitute = make_optimizer(self.optimizer, stand_ins(groups))
        require_length(self._scheduler(substitute, factors), self._intervals(), self.lr_interval)
        return {"optimizer": optimizer, "lr_scheduler": config}

    def _groups(self) -> list[ParameterGroup]:
        return parameter_groups(
            self.net,
            unfreeze_last=self.unfreeze_last,
            lr_factor=self.backbone_lr_factor,
            first_lr_factor=self.first_lr_factor,
            decay_norm_and_bias=self.decay_norm_and_bias,
        )

    def _scheduler(self, optimizer: Optimizer, factors: list[float]) -> LRScheduler | ReduceLROnPlateau:
        if self.lr_scheduler is not None:
            return build_scheduler(self.lr_scheduler, optimizer, factors=factors, length=self._intervals())
        if self.lr_interval == "step" and self.milestones:
            raise ConfigError(
                f"--model.lr_interval=step, but the default scheduler's milestones {self.milestones} are epochs. "
                "Choose a --model.lr_scheduler, or --model.lr_interval=epoch."
            )
        return MultiStepLR(optimizer, self.milestones, self.lr_gamma)

    def _intervals(self) -> int | None:
        """How often a run steps its scheduler; None: without end."""
        if self.lr_interval == "epoch":
            epochs = self.trainer.max_epochs
            return None if epochs is None or epochs < 0 else epochs
        data = image_data(self.trainer)
        return optimizer_steps(self.trainer, len(data.parts["train"]), data.global_batch_size)

    def fingerprint(self) -> dict[str, Any]:
        """What a run that resumes must have in common with this one, by name.

        Optimizer and scheduler belong to it: their settings come back from the checkpoint, so that other ones
        would be ignored.
        """
        return {
            "model.milestones": self.milestones,
            "model.unfreeze_last": self.unfreeze_last,
            "model.train_bn": self.train_bn,
            "model.backbone_lr_factor": self.backbone_lr_factor,
            "model.first_lr_factor": self.first_lr_factor,
            "model.decay_norm_and_bias": self.decay_norm_and_bias,
            "model.label_smoothing": self.label_smoothing,
            "model.class_weights": self.class_weights,
            "model.mixup": self.mixup,
            "model.cutmix": self.cutmix,
            "model.ema": self.ema,
            "model.lr_interval": self.lr_interval,
            **self._optimizer_fingerprint(),
        }

    def _optimizer_fingerprint(self) -> dict[str, str]:
        """Settings of optimizer and scheduler, from ones that update stand-ins for the parameters; made once."""
        if not self._recipe:
            groups = self._groups()
            optimizer = make_optimizer(self.optimizer, stand_ins(groups))
            self._recipe["model.optimizer"] = f"{type(optimizer).__name__} {_plain(optimizer.defaults)}"
            schedule = f"MultiStepLR, lr_gamma {self.lr_gamma}"
            if self.lr_scheduler is not None:
                scheduler = self._scheduler(optimizer, [group.lr_factor for group in groups])
                schedule = f"{type(scheduler).__name__} {_plain(scheduler.state_dict())}"
                rates: Any = [
                    [group["max_lr"], group["min_lr"]] for group in optimizer.param_groups if "max_lr" in group
                ]
                schedule += f" {rates or getattr(scheduler, 'max_lrs', '')}".rstrip()  # OneCycleLR, CyclicLR
            self._recipe["model.lr_scheduler"] = schedule
        return self._recipe

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what prediction needs to build the network without this class, and what was computed in."""
        if self.guard is not None:
            self.guard.before_save(self.trainer, checkpoint["state_dict"])
        checkpoint["classifier"] = {**self.net.spec(), "resize": self.resize}
        checkpoint["precision"] = str(self.trainer.precision)
        checkpoint["skipped_steps"] = self.skipped_steps
        if self._average is not None:
            averages, training = self._average.averages, self._average.training
            checkpoint["state_dict"] |= {f"net.{name}": value for name, value in averages.items()}
            different = {name: value for name, value in training.items() if not torch.equal(value, averages[name])}
            checkpoint["training_weights"] = different

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another network, naming the difference; let the optimizer be this hardware's."""
        saved = decode_spec(checkpoint.get("classifier"), "the checkpoint")
        ours = decode_spec({**self.net.spec(), "resize": self.resize}, "this run")
        different = [
            f"{name} was {getattr(saved, name)!r}, is {getattr(ours, name)!r}"
            for name in ours.__struct_fields__
            # Mean and std that nobody has chosen come from the checkpoint, with its buffers.
            if getattr(saved, name) != getattr(ours, name) and self.normalisation.get(name, ()) is not None
        ]
        if different:
            raise CheckpointError(
                f"the checkpoint does not fit this run: {'; '.join(different)}. Use the settings it was trained with, "
                "or another --run_dir."
            )
        require_state(
            net_state(checkpoint, "the checkpoint"),
            {name: tuple(value.shape) for name, value in self.net.state_dict().items()},
            "the checkpoint",
        )
        checkpoint["state_dict"] = versioned(checkpoint["state_dict"], self)
        if self.trainer.state.fn != "fit":
            return
        if self.guard is not None:
            self.guard.skipped_steps = checkpoint.get("skipped_steps", 0)
        was, precision = checkpoint["precision"], str(self.trainer.precision)
        if was != precision:
            log.warning("the run computed at precision %s until here, and goes on at %s", was, precision)
        with_fusion_of(checkpoint["optimizer_states"], self.configure_optimizers()["optimizer"])
        if self.ema:
            state = checkpoint["state_dict"]
            self._averages = {name.removeprefix("net."): value for name, value in state.items()}
            state |= {f"net.{name}": value for name, value in checkpoint["training_weights"].items()}

    def _logits(self, batch: Batch) -> Tensor:
        if self.mirror:
            return mean_over_mirrored(self, batch["image"])
        if "features" in batch:
            features = batch["features"]
        else:
            with cpu_threads(self._threads):
                features = self.net.features(batch["image"])
        logits: Tensor = self.net.head(features)
        return logits

    def enter_stage(self, stage: Stage) -> None:
        """Freeze and unfreeze the backbone."""
        self.stage = stage
        apply_stage(self.net.backbone, stage, last_share=self.unfreeze_last, train_bn=self.train_bn)
        self._head_alone = not self.net.backbone_trains

    def _log_metrics(self, part: str) -> None:
        image_data(self.trainer).share_bad_samples()
        values, self.confusion = self.metrics.compute()
        self.metrics.reset()
        loss = values.get("loss", 0.0)  # absent: no sample counted
        if not math.isfinite(loss):
            when = (
                f" at step {self.trainer.global_step} (epoch {self.current_epoch})"
                if self.trainer.state.fn == "fit"
                else ""
            )
            raise DivergedError(f"{part}/loss is {loss}{when}: the network has diverged.")
        for name, value in values.items():
            self.log(f"{part}/{name}", value)


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Those settings that are numbers, text or pairs of numbers, by name."""
    kinds = (bool, int, float, str, tuple)
    return {name: settings[name] for name in sorted(settings) if isinstance(settings[name], kinds)}
