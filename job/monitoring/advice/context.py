"""A piece of advice, and the settings of a run that advice depends on."""

from __future__ import annotations

from dataclasses import dataclass

from job.data.repeated_images import RepeatedImages


@dataclass(frozen=True)
class Advice:
    """A warning about a run.

    Attributes:
        kind: what it is about; each kind is logged once per attempt.
        message: what was observed, as a sentence.
        suggestion: what to change, as a sentence.
    """

    kind: str
    message: str
    suggestion: str


@dataclass(frozen=True)
class Context:
    """Settings and data of a run that advice depends on.

    Attributes:
        class_counts: training samples per class.
        train_images: samples of a training epoch.
        val_images: samples of the last validation.
        has_several_labels: samples have any number of labels.
        max_epochs: length of the run; None: unlimited.
        milestones: epochs after which layers are unfrozen, as in ``--model.milestones``.
        early_stopping: the run has early stopping.
        lr: learning rate of the head.
        backbone_lr_factor: learning rate of the backbone relative to the head's.
        has_augmentation: ``--data.augment`` is given.
        mixes_images: MixUp or CutMix is on, so that accuracy and loss of training are those of mixed images.
        label_smoothing: as in ``--model.label_smoothing``.
        is_balanced: classes are drawn or weighted equally.
        image_size: height and width of the model's input, in pixels.
        num_workers: decoding threads or processes of a rank.
        available_cpus: CPUs of a rank.
        trains_on_cpu: the CPUs that decode images train, too.
        data_bytes: size of all images, if they are in a bucket and the cache can be used; else 0.
        cache_bytes: size of the cache of samples from buckets.
        has_cached_features: training reads cached features, not images.
        repeated_images: training images with the same content; None where there are few.
    """

    class_counts: tuple[int, ...]
    train_images: int
    val_images: int
    has_several_labels: bool = False
    max_epochs: int | None = None
    milestones: tuple[int, ...] = ()
    early_stopping: bool = False
    lr: float = 1e-3
    backbone_lr_factor: float = 1.0
    has_augmentation: bool = False
    mixes_images: bool = False
    label_smoothing: float = 0.0
    is_balanced: bool = False
    image_size: int = 224
    num_workers: int = 1
    available_cpus: int = 1
    trains_on_cpu: bool = False
    data_bytes: int = 0
    cache_bytes: int = 0
    has_cached_features: bool = False
    repeated_images: RepeatedImages | None = None

    def next_milestone(self, epoch: int) -> int | None:
        """The first milestone of this run that lies after ``epoch`` completed epochs."""
        ends = [m for m in self.milestones if m >= epoch and (self.max_epochs is None or m < self.max_epochs)]
        return ends[0] if ends else None
