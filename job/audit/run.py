"""An audit from beginning to end: features, pixels, all checks, files in ``run_dir/audit``."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from dataclasses import dataclass

import msgspec
import numpy as np
import pytorch_lightning as pl

from job import storage
from job.audit.confusion import Confusion, confused_pairs, confusion_of
from job.audit.copies import find_copies
from job.audit.findings import Suspects
from job.audit.gallery import choose, pictures_of, render
from job.audit.image_faults import find_faults
from job.audit.label_errors import find_label_errors, find_wrong_classes
from job.audit.manifest import require_nameable, write_manifest
from job.audit.out_of_fold import Checked, OutOfFold, images_to_check
from job.audit.outliers import find_outliers
from job.audit.pixels import RECORD, Records, inspect
from job.audit.pool import ImagePool
from job.audit.result import AuditResult, ClassSummary, ConfusedClasses, ManifestSummary
from job.audit.search import Samples
from job.audit.settings import AuditSettings, Kind
from job.audit.terminal import SHOWN, print_summary
from job.audit.unlabelled import open_without_labels
from job.cluster import ranks
from job.data.datamodule import ImageDataModule
from job.data.dataset import Preprocessing
from job.errors import DataError
from job.features.extract import features_of
from job.features.training_options import extraction_settings, feature_precision, frozen_network
from job.model.classifier import Classifier
from job.model.config import ModelConfig
from job.predict.predictor import load
from job.process import temporary
from job.process.terminal import say
from job.resilience.lease import Lease
from job.storage.json_files import write_json

log = logging.getLogger("job")

FOLDER = "audit"
"""Folder of the results, below run_dir."""
FINDINGS_FILE, SUMMARY_FILE, PAGE_FILE = "audit.jsonl", "audit.json", "audit.html"
NO_LABELS = "there is none to check"
ONE_CLASS = "all images have one class"
NO_CHECK = "--audit.folds=0"
NO_CLASSES = ("0", "1")
"""Of a head that is not used."""


@dataclass(frozen=True)
class Inspected:
    """The images of all parts, and what is known about each.

    Attributes:
        pool: images and features.
        records: what the pixels say, [N].
        errors: why some cannot be read, by sample id.
    """

    pool: ImagePool
    records: Records
    errors: dict[int, str]


@dataclass(frozen=True)
class LabelCheck:
    """The check of labels.

    Attributes:
        images: number of images whose label was checked.
        not_checked: number of the others, by reason.
        confusion: counts of predictions; None where there are none, or images have several labels.
    """

    images: int
    not_checked: dict[str, int]
    confusion: Confusion | None = None


class Audit:
    """Checks of a data set by the features of a frozen backbone.

    Args:
        config: hyperparameters of the model, of which backbone, weights and task count.
        data: the images.
        settings: of the checks.
        trainer: chooses device and precision.
        run_dir: folder of the run; the results are in its folder ``audit``.
        ckpt: checkpoint whose backbone computes the features, in place of ``config``.

    Raises:
        ConfigError: an option cannot be used.
    """

    def __init__(
        self,
        config: ModelConfig,
        data: ImageDataModule,
        settings: AuditSettings,
        trainer: pl.Trainer,
        run_dir: str,
        ckpt: str | None = None,
    ) -> None:
        self.config = config
        self.data = data
        self.settings = settings
        self.trainer = trainer
        self.run_dir = run_dir
        self.folder = storage.join(run_dir, FOLDER)
        self.ckpt = ckpt
        self.device = trainer.strategy.root_device
        self.precision = feature_precision(trainer, "audit")
        self._began = time.monotonic()

    def run(self) -> AuditResult | None:
        """Check all images, and write the results; called on all ranks, of which rank 0 returns them.

        The other ranks share the computation of features and the inspection of pixels, and are done then.
        """
        data = self.data
        data.trainer = self.trainer  # as Lightning does: the index is that of run_dir
        if self.settings.labels == "none":
            open_without_labels(data, self.run_dir)
        else:
            self._set_up()
        if (manifest := self.settings.write_manifest) is not None:
            require_nameable(manifest, list(data.parts.values()))
        lease = Lease(self.folder)
        with lease.released_at_end():
            ranks.from_rank_zero(lease.acquire)
            inspected = self._inspect(*self._network())
            if ranks.rank():
                return None
            return self._finish(inspected, lease)

    def _set_up(self) -> None:
        try:
            self.data.setup("fit")
        except DataError as error:
            raise DataError(f"{error} To audit images without their labels, add --audit.labels=none.") from error

    def _network(self) -> tuple[Classifier, Preprocessing]:
        """The network and the preprocessing of images, as evaluation has it."""
        if self.ckpt is not None:
            predictor = load(self.ckpt)
            return predictor.net.to(self.device).eval(), predictor.preprocessing
        classes = NO_CLASSES if self.settings.labels == "none" else self.data.classes
        net = frozen_network(self.config, classes, self.data.image_size, self.device)
        return net, self.data.preprocessing("val")

    def _inspect(self, net: Classifier, preprocessing: Preprocessing) -> Inspected:
        data = self.data
        settings = extraction_settings(data, self.run_dir, self.precision)
        pool = ImagePool(
            {
                part: features_of(net, index, preprocessing, settings, seed=data.seed, cache=data.cache)
                for part, index in data.parts.items()
                if len(index)
            }
        )
        records = np.zeros(len(pool), RECORD)
        errors: dict[int, str] = {}
        for part, features in pool.features.items():
            start, stop = pool.samples_of(part).start, pool.samples_of(part).stop
            unreadable = inspect(
                features.index,
                records[start:stop],
                str(data.cache_dir),
                data.cache,
                data.num_workers,
                data.max_image_pixels,
            )
            errors |= {start + sample: reason for sample, reason in unreadable.items()}
            for bad in features.bad:
                reason = bad.line.removeprefix(f"{features.index.uri(bad.sample)} ")
                errors.setdefault(start + bad.sample, reason)
        return Inspected(pool, records, errors)

    def _finish(self, inspected: Inspected, lease: Lease) -> AuditResult:
        """Run the checks, and write and print their results."""
        pool, records = inspected.pool, inspected.records
        readable = records["readable"] & pool.valid
        faults = find_faults(records)
        suspects = Suspects(pool)
        suspects.add_unreadable(inspected.errors)
        suspects.add_faults(records, faults)
        candidates = readable & ~faults.blank
        copies = find_copies(pool, records, candidates, self.settings.similarity, self.device, self.data.seed)
        suspects.add_copies(copies)
        single = np.flatnonzero(candidates & (copies.group == np.arange(len(pool))))
        suspects.add_outliers(*find_outliers(pool, single, self.device, self.data.seed))
        checked = images_to_check(pool, copies.group, readable, faults.blank)
        check = self._check_labels(suspects, checked, copies.group)
        suspects.finish()
        left_out = suspects.left_out(self.settings.left_out_kinds())
        leaves_nothing = self.settings.write_manifest is not None and len(left_out) == len(pool)
        manifest = None if leaves_nothing else self._write_manifest(suspects, left_out, lease)
        result = self._result(suspects, check, manifest)
        self._write(result, suspects, lease)
        first = {each.kind: each for each in reversed(suspects.found)}
        errors = [each for each in suspects.found if each.kind == "label_error"][:SHOWN]
        ordered = [first[kind] for kind in result.findings]
        print_summary(result, list(suspects.findings(ordered)), list(suspects.findings(errors)))
        say(f"Pictures: {storage.join(self.folder, PAGE_FILE)}; all findings: {FINDINGS_FILE} beside it.")
        if leaves_nothing:
            raise DataError(
                f"every image is suspect: --audit.write_manifest {self.settings.write_manifest} would be empty, and is "
                "not written. Limit --audit.leave_out."
            )
        return result

    def _check_labels(self, suspects: Suspects, checked: Checked, groups: Samples) -> LabelCheck:
        """Add the label errors."""
        pool, count = suspects.pool, len(checked.samples)
        if reason := self._reason_not_to_check(pool, checked):
            return LabelCheck(0, {**checked.left_out, **({reason: count} if count else {})})
        predictions = OutOfFold(pool, checked, groups, self.settings.folds, self.data.seed, self.device)
        if pool.has_several_labels:
            classes = np.setdiff1d(np.arange(len(pool.classes)), checked.rare)
            suspects.add_wrong_classes(
                find_wrong_classes(predictions.predict, checked.samples, pool.multi_hot_of, classes)
            )
            return LabelCheck(count, checked.left_out)
        errors = find_label_errors(predictions.predict, checked.samples, pool.labels, len(pool.classes))
        suspects.add_label_errors(errors)
        confusion = confusion_of(predictions.predict(checked.samples), pool.labels, len(pool.classes))
        return LabelCheck(count, checked.left_out, confusion)

    def _reason_not_to_check(self, pool: ImagePool, checked: Checked) -> str:
        if not self.settings.folds:
            return NO_CHECK
        if not len(checked.samples):
            return NO_LABELS
        if pool.has_several_labels:
            return "" if len(checked.rare) < len(pool.classes) else "every class has too few images"
        return "" if len(np.unique(pool.labels[checked.samples])) > 1 else ONE_CLASS

    def _write_manifest(self, suspects: Suspects, left_out: dict[int, Kind], lease: Lease) -> ManifestSummary | None:
        uri = self.settings.write_manifest
        if uri is None:
            return None
        count = write_manifest(uri, suspects.pool, left_out, lease.require_held)
        return ManifestSummary(uri=uri, images=count, left_out=dict(Counter(left_out.values()).most_common()))

    def _result(self, suspects: Suspects, check: LabelCheck, manifest: ManifestSummary | None) -> AuditResult:
        pool, confusion = suspects.pool, check.confusion
        counts = {part: index.class_counts() for part, index in pool.indexes().items()}
        errors = np.zeros(len(pool.classes), np.int64)
        chosen = np.array([each.sample for each in suspects.found if each.kind == "label_error"], np.int64)
        if not pool.has_several_labels:
            errors = np.bincount(pool.labels[chosen], minlength=len(pool.classes))
        accuracy = np.full(len(pool.classes), math.nan) if confusion is None else confusion.accuracy()
        largest = counts.get("train", next(iter(counts.values())))
        present = largest[largest > 0]
        pairs = [] if confusion is None else confused_pairs(confusion)
        return AuditResult(
            task="multilabel" if pool.has_several_labels else "classification",
            backbone=self.config.backbone if self.ckpt is None else self.ckpt,
            images={part: len(index) for part, index in pool.indexes().items()},
            findings=suspects.counts(),
            suspects=len({each.sample for each in suspects.found}),
            groups=suspects.groups,
            labels_checked=check.images,
            labels_not_checked=check.not_checked,
            imbalance=float(present.max() / present.min()) if len(present) > 1 else None,
            classes=[
                ClassSummary(
                    name=name,
                    images={part: int(each[number]) for part, each in counts.items()},
                    label_errors=int(errors[number]),
                    accuracy=None if math.isnan(accuracy[number]) else float(accuracy[number]),
                )
                for number, name in enumerate(pool.classes)
            ],
            confused=[
                ConfusedClasses(classes=(pool.classes[first], pool.classes[second]), error=error, images=images)
                for first, second, error, images in pairs
            ],
            manifest=manifest,
            seconds=round(time.monotonic() - self._began, 1),
        )

    def _write(self, result: AuditResult, suspects: Suspects, lease: Lease) -> None:
        lease.require_held()
        storage.remove(storage.join(self.folder, SUMMARY_FILE))
        scratch = temporary.folder("audit")
        try:
            path = scratch / FINDINGS_FILE
            with path.open("wb") as file:
                for finding in suspects.findings():
                    file.write(msgspec.json.encode(finding) + b"\n")
            storage.upload(path, storage.join(self.folder, FINDINGS_FILE), lease.require_held)
        finally:
            temporary.remove(scratch)
        pictures = pictures_of(suspects, choose(suspects, self.settings.thumbnails), self.data)
        page = render(result, pictures, self.run_dir)
        storage.write_text(storage.join(self.folder, PAGE_FILE), page, lease.require_held)
        write_json(storage.join(self.folder, SUMMARY_FILE), msgspec.to_builtins(result), lease.require_held)
