"""A trained network that classifies images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor

from job import checkpoint, redact
from job.checkpoint.state import CLASSIFIER_KEY
from job.cluster import ranks
from job.data.augment import ResizeMode, resize
from job.data.dataset import Preprocessing
from job.data.pixels import MAX_IMAGE_PIXELS
from job.data.python_images import PythonImage, is_one_image, pixels_of, pixels_of_each
from job.errors import CheckpointError, ConfigError, DivergedError, JobError
from job.model.calibrator import Calibrator, read_fitted
from job.model.classifier import TTA, Classifier, from_spec, mean_over_flips
from job.model.compile import compile_module
from job.model.spec import decode_spec, net_state
from job.model.tasks import TASKS
from job.predict.precision import Precision, automatic_precision

Calibrated = Literal["auto", "true", "false"]
"""Whether probabilities are calibrated; auto: where the checkpoint has a calibration."""


@dataclass(frozen=True)
class Prediction:
    """Class probabilities of one image.

    Attributes:
        label: name of the most probable class.
        probabilities: probability by class name, summing to 1.
        rejected: whether the probability of ``label`` is below the threshold of rejection; None without one.
    """

    label: str
    probabilities: dict[str, float]
    rejected: bool | None = field(default=None, kw_only=True)

    def as_json(self) -> dict[str, Any]:
        """The entries of a JSON line."""
        probability = self.probabilities[self.label]
        entry = {"label": self.label, "probability": probability, "probabilities": self.probabilities}
        return entry if self.rejected is None else {**entry, "rejected": self.rejected}


@dataclass(frozen=True)
class MultilabelPrediction(Prediction):
    """Class probabilities of one image that may have several labels, or none.

    Attributes:
        label: name of the most probable class, even if it is below its threshold.
        probabilities: probability by class name; they are independent of each other.
        labels: names of the classes whose probability reaches their threshold, in the order of classes.
    """

    labels: list[str]

    def as_json(self) -> dict[str, Any]:
        """The entries of a JSON line."""
        return {"labels": self.labels, "probabilities": self.probabilities}


class Predictor:
    """A trained network and the preprocessing it was evaluated with; see :func:`load`.

    Args:
        net: the network.
        resize: how images are made square.
        tta: test-time augmentation: "hflip" averages predictions over horizontal flips.
        thresholds: of a multi-label network: probability of each class from which it is predicted. Empty: 0.5.
        max_image_pixels: height times width of the largest image to decode.
        fingerprint: the first 16 hexadecimal digits of the checkpoint's SHA-256.
        precision: "bf16" computes by autocast, "fp32" in float32.
        calibrator: of the network's probabilities; None: they are not calibrated.
        reject_below: probability of the most probable class below which a prediction is marked as rejected; None: none
            is. For one label per image.

    Attributes:
        thresholds: probability of each class from which it is predicted, of several labels; of calibrated
            probabilities where they are, with the same decisions.
    """

    def __init__(
        self,
        net: Classifier,
        resize: str,
        tta: TTA = "none",
        thresholds: Sequence[float] = (),
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        fingerprint: str = "",
        precision: Precision = "fp32",
        calibrator: Calibrator | None = None,
        reject_below: float | None = None,
    ) -> None:
        self.net = net.eval()
        self.calibrator = calibrator
        self.reject_below = reject_below
        self.tta = tta
        self.max_image_pixels = max_image_pixels
        self.fingerprint = fingerprint
        self.precision: Precision = precision
        self._compiled_batch_size = 0
        thresholds = thresholds or [0.5] * len(net.classes)
        if calibrator is not None and TASKS[net.task].takes_several_labels:
            thresholds = calibrator.calibrated_thresholds(thresholds)
        self.thresholds = tuple(thresholds)
        self.resize: ResizeMode = "crop" if resize == "crop" else "squash"

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the network's outputs."""
        return self.net.classes

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return self.net.mean.device

    @property
    def calibrated(self) -> bool:
        """Whether probabilities are calibrated."""
        return self.calibrator is not None

    @property
    def preprocessing(self) -> Preprocessing:
        """Preprocessing of images."""
        return Preprocessing(self.net.image_size, self.resize, max_image_pixels=self.max_image_pixels)

    @property
    def row_fields(self) -> dict[str, Any]:
        """Entries that all rows of predictions have."""
        return {"model": self.fingerprint, "calibrated": self.calibrated}

    def compile(self, batch_size: int) -> None:
        """Compile the network by ``torch.compile``, and predict a batch of black images.

        Smaller batches are padded to this size, since each other shape would be compiled anew.

        Args:
            batch_size: images per batch.

        Raises:
            ConfigError: it cannot be compiled on this machine.
        """
        size = self.net.image_size
        images = torch.zeros(batch_size, size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)  # as a loader has them
        compile_module(self.net, self.device, "--compile")
        self._compiled_batch_size = batch_size
        try:
            self.predict_batch(images)
        except (JobError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of any part of torch.compile, or of the compiler that it calls
            reason = " ".join(str(error).split("\n")[:2]).strip()[:500]
            raise ConfigError(
                f"--compile: torch.compile failed for {self.net.name} on {self.device} ({type(error).__name__}: "
                f"{reason}). Leave the option out."
            ) from error

    @overload  # a string is one image, although it is an iterable of strings
    def predict(self, images: PythonImage, batch_size: int = 32) -> Prediction: ...  # type: ignore[overload-overlap]

    @overload
    def predict(self, images: Iterable[PythonImage], batch_size: int = 32) -> list[Prediction]: ...

    def predict(
        self, images: PythonImage | Iterable[PythonImage], batch_size: int = 32
    ) -> Prediction | list[Prediction]:
        """Classify one image, or several.

        Args:
            images: an image, or any iterable of them. An image is a path or URI, the bytes of an image file, a file
                open for reading, a Pillow image, an array [H, W] or [H, W, C], or a tensor [C, H, W], with 1, 3 or 4
                channels of uint8 or of floats from 0 to 1. An array [N, H, W, C] or tensor [N, C, H, W] is N images.
            batch_size: images at a time.

        Returns:
            the prediction of one image; a list of them for several.

        Raises:
            DataError: one of them is no readable image.
            StorageError: one of them cannot be read.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, not {batch_size}.")
        size, limit = self.net.image_size, self.max_image_pixels
        if is_one_image(images):
            return self.predict_batch(resize(pixels_of(images, size, limit), size, self.resize)[None])[0]
        predictions: list[Prediction] = []
        several = cast("Iterable[PythonImage]", images)
        pixels = (resize(each, size, self.resize) for each in pixels_of_each(several, size, limit))
        while batch := list(islice(pixels, batch_size)):
            predictions += self.predict_batch(torch.stack(batch))
        return predictions

    def predict_batch(self, images: Tensor) -> list[Prediction]:
        """Classify prepared images, uint8 [B, 3, S, S].

        Raises:
            DivergedError: the network's outputs are not finite.
        """
        return self.predictions(self.probabilities(images))

    def probabilities(self, images: Tensor) -> Tensor:
        """Probability of each class, float [B, C] on :attr:`device`, of prepared images, uint8 [B, 3, S, S].

        On CUDA this does not wait for the device.
        """
        count = len(images)
        if count < self._compiled_batch_size:
            images = torch.cat([images, images[:1].expand(self._compiled_batch_size - count, -1, -1, -1)])
        images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")
        # Images are prepared outside inference mode: torch.compile would compile anew for tensors that are made in it.
        with torch.inference_mode(), autocast:
            logits = mean_over_flips(self.net, images) if self.tta == "hflip" else self.net(images)
            if self.calibrator is not None:
                logits = self.calibrator.apply(logits)
            return TASKS[self.net.task].probabilities(logits)[:count]

    def predictions(self, probabilities: Tensor) -> list[Prediction]:
        """The predictions that follow from probabilities, float [B, C].

        Raises:
            DivergedError: they are not finite.
        """
        probabilities = probabilities.cpu()
        if not probabilities.isfinite().all():
            raise DivergedError(
                "the network's outputs are not finite: its weights have diverged. Use another checkpoint."
            )
        best = probabilities.argmax(dim=1).tolist()
        return [self._prediction(label, values) for label, values in zip(best, probabilities.tolist(), strict=True)]

    def _prediction(self, best: int, values: list[float]) -> Prediction:
        label, by_class = self.classes[best], dict(zip(self.classes, values, strict=True))
        if not TASKS[self.net.task].takes_several_labels:
            rejected = None if self.reject_below is None else values[best] < self.reject_below
            return Prediction(label, by_class, rejected=rejected)
        chosen = zip(self.classes, values, self.thresholds, strict=True)
        return MultilabelPrediction(label, by_class, [name for name, value, least in chosen if value >= least])


def load(
    uri: str,
    device: str | None = None,
    tta: TTA = "none",
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    precision: Precision | Literal["auto"] = "fp32",
    calibrated: Calibrated = "auto",
    reject_below: float | None = None,
    target_precision: float | None = None,
) -> Predictor:
    """Load a model for prediction.

    Args:
        uri: a checkpoint file, or a run_dir (its best checkpoint).
        device: a torch device; default: the GPU of this rank (LOCAL_RANK, or the first), where CUDA has one, else the
            CPU.
        tta: test-time augmentation: "hflip" averages predictions over horizontal flips.
        max_image_pixels: height times width of the largest image to decode; default: 178,956,970, as in Pillow.
        precision: "bf16" computes by autocast, "fp32" in float32, "auto" in bf16 where the device does so natively.
        calibrated: "auto" calibrates probabilities where the checkpoint has a calibration, "true" requires one, and
            "false" leaves them as the network computes them.
        reject_below: probability below which predictions are marked as rejected.
        target_precision: instead of it, share of the accepted predictions that were to be right in validation.

    Raises:
        ConfigError: rejection was asked for by both, of several labels, or at a precision that validation did not
            reach or measure.
        CheckpointError: there is no such checkpoint, it is damaged, or it lacks the required calibration.
    """
    uri = checkpoint.resolve(redact.remember(uri))
    saved = checkpoint.load(uri)
    if device is None:
        gpus = torch.cuda.device_count()
        device = f"cuda:{ranks.local_rank() % gpus}" if gpus else "cpu"
    place = torch.device(device)
    net = from_spec(saved[CLASSIFIER_KEY], net_state(saved, uri), source=uri, device_type=place.type)
    spec = decode_spec(saved[CLASSIFIER_KEY], uri)
    fingerprint = checkpoint.sha256(uri)[:16]
    chosen = automatic_precision(place) if precision == "auto" else precision
    takes_several_labels = TASKS[spec.task].takes_several_labels
    if takes_several_labels and (reject_below is not None or target_precision is not None):
        raise ConfigError(
            "rejection is for one label per image: of several labels each class has a threshold. Leave --reject_below "
            "and --target_precision out."
        )
    # Not read where nothing needs it: --calibrated=false is for checkpoints whose calibration is damaged, too.
    is_needed = calibrated != "false" or target_precision is not None
    fitted = read_fitted(saved, uri, len(spec.classes), spec.task) if is_needed else None
    calibrator = None if calibrated == "false" or fitted is None or fitted.is_identity else fitted
    if calibrated == "true" and calibrator is None:
        raise CheckpointError(
            f"{uri} has no calibration; the report of its run says why. Use --calibrated=auto, or another checkpoint."
        )
    if target_precision is not None:
        if reject_below is not None:
            raise ConfigError("--reject_below and --target_precision are both given. Leave one of them out.")
        reject_below = _threshold_for(target_precision, fitted, calibrator, uri)
    if reject_below is not None and not 0 <= reject_below <= 1:
        raise ConfigError(f"--reject_below must be from 0 to 1, not {reject_below}.")
    return Predictor(
        net.to(place),
        spec.resize,
        tta,
        spec.thresholds,
        max_image_pixels,
        fingerprint,
        chosen,
        calibrator,
        reject_below,
    )


def _threshold_for(precision: float, fitted: Calibrator | None, applied: Calibrator | None, uri: str) -> float:
    """The threshold of rejection at which the accepted predictions of validation had this precision.

    Args:
        precision: the least.
        fitted: what the checkpoint holds.
        applied: by which probabilities are changed; None: they stay as they are.
        uri: of the checkpoint, for messages.
    """
    if not 0 < precision <= 1:
        raise ConfigError(f"--target_precision must be above 0 and at most 1, not {precision}.")
    if fitted is None or fitted.risk_coverage is None:
        raise ConfigError(
            f"--target_precision takes a threshold from validation, and {uri} has none: its validation images were too "
            "few, as the report of its run then says, or it was written within an epoch or by an earlier version. Give "
            "a threshold by --reject_below."
        )
    if applied is None and not fitted.is_identity:
        raise ConfigError(
            "--target_precision chooses a threshold of calibrated probabilities. Leave --calibrated=false out, or give "
            "a threshold by --reject_below."
        )
    point = fitted.risk_coverage.at(precision)
    if point is None:
        raise ConfigError(
            f"no threshold reached the precision {precision:g} on the validation images of {uri}. Choose a lower "
            "--target_precision."
        )
    return point.threshold
