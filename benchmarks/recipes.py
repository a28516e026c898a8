"""The accuracy that each recipe in job/configs reaches: several seeds each, mean ± standard deviation.

Run it by ``make benchmark-recipes``. EfficientNet-Lite0 with ImageNet's weights; a few of the tutorial's photographs to
train on, 400 others to validate, and scikit-learn's digits.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table
from train import ARCHIVE, CONFIGS, ours, photographs

from job import storage
from job.demo.digits import digit_images
from job.demo.weights import BACKBONE, efficientnet_lite0

TUTORIAL = [f"--config={CONFIGS / 'cats_and_dogs.yaml'}", "--trainer.max_epochs=6"]
"""Its own settings; as many epochs as finetune.yaml has."""
SHIFTED = "--config=" + str(CONFIGS / "demo.yaml")
"""The demo's augmentation, for signs that are others when mirrored."""


def measure(folder: Path, name: str, options: list[str], seeds: int) -> tuple[list[float], float]:
    """Best validation accuracy by seed, and seconds of a run."""
    found, seconds = [], []
    for seed in range(seeds):
        run = ours(folder / f"{name}-{seed}", 2, *options, f"--seed_everything={seed}")
        found.append(max(value for value, _ in run["accuracies"]))
        seconds.append(run["seconds"])
    return found, statistics.mean(seconds)


def main() -> None:
    """Print a table a data set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=160, help="photographs to train on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="recipes to measure; default: all, on both data sets")
    given = parser.parse_args()
    if not ARCHIVE.exists():
        sys.exit(f"{ARCHIVE} is not there: set JOB_TEST_CATS_AND_DOGS to the tutorial's archive.")
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = folder / "weights.safetensors"
        weights.write_bytes(efficientnet_lite0())
        digits = folder / "digits"
        for key, content in digit_images().items():
            storage.write_bytes(f"{digits}/{key}", content)
        photos = photographs(folder, given.images, 400)
        half = "[0.5,0.5,0.5]"
        common = [f"--model.backbone={BACKBONE}", f"--model.weights={weights}", f"--model.mean={half}"]
        common += [f"--model.std={half}", "--data.global_batch_size=32", "--trainer.accelerator=cpu"]
        common += [f"--data.cache_dir={folder}/cache", f"--features.uri={folder}/features"]
        recipes = {name: [f"--config={CONFIGS / name}.yaml"] for name in ("head", "finetune", "augmented")}
        sets = {
            f"cats and dogs, {given.images} to train on": ([], photos, {"tutorial": TUTORIAL, **recipes}),
            "digits, 1,438 to train on": (
                [SHIFTED],
                digits,
                {"demo": [], "finetune": recipes["finetune"]},
            ),
        }
        for title, (base, root, chosen) in sets.items():
            table = Table("recipe", "best validation accuracy", "by seed", "seconds", title=title, title_justify="left")
            wanted = {recipe: options for recipe, options in chosen.items() if not given.only or recipe in given.only}
            for recipe, options in wanted.items():
                values, seconds = measure(
                    folder, f"{root.name}-{recipe}", [*base, *options, *common, f"--data.root={root}"], given.seeds
                )
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                by_seed = " ".join(f"{value:.4f}" for value in values)
                table.add_row(recipe, f"{statistics.mean(values):.4f} ± {spread:.4f}", by_seed, f"{seconds:.0f}")
                print(recipe, values, f"{seconds:.0f} s", file=sys.stderr, flush=True)
            if wanted:
                console.print(table)


if __name__ == "__main__":
    main()
