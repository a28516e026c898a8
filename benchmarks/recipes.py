"""Benchmark of the recipes in job/recipes: validation accuracy, mean and standard deviation over seeds.

Run it by ``make benchmark-recipes``. It fine-tunes EfficientNet-Lite0 with ImageNet's weights on two data sets: some of
the tutorial's photographs, and scikit-learn's digits.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table
from train import ARCHIVE, CONFIGS, job_fit, photographs

from job import storage
from job.demo.digits import digit_images
from job.demo.weights import BACKBONE, efficientnet_lite0

TRAIN, VALIDATION = 160, 400
RECIPES = {
    "head": [f"--config={CONFIGS / 'head.yaml'}"],
    # As many epochs as in finetune.yaml.
    "tutorial": [f"--config={CONFIGS / 'cats_and_dogs.yaml'}", "--trainer.max_epochs=6"],
    "finetune": [f"--config={CONFIGS / 'finetune.yaml'}"],
    "augmented": [f"--config={CONFIGS / 'augmented.yaml'}"],
}


def photos(folder: Path) -> tuple[Path, dict[str, list[str]]]:
    """Return a folder of images, and options by recipe."""
    return photographs(folder, TRAIN, VALIDATION), RECIPES


def digits(folder: Path) -> tuple[Path, dict[str, list[str]]]:
    """Return a folder of images, and options by recipe: shifts instead of flips, which change the meaning of digits."""
    for key, content in digit_images().items():
        storage.write_bytes(f"{folder}/digits/{key}", content)
    demo = CONFIGS / "demo.yaml"
    shifts = folder / "shifts.yaml"
    shifts.write_text(yaml.safe_dump({"data": yaml.safe_load(demo.read_text())["data"]}))
    recipes = {**RECIPES, "demo": [f"--config={demo}"]}
    return folder / "digits", {name: [*options, f"--config={shifts}"] for name, options in recipes.items()}


SETS = {
    f"{TRAIN} cats and dogs, 224 px": photos,
    "1,438 digits, 64 px": digits,
}


def measure(run: Path, options: list[str], seeds: int) -> tuple[list[float], float]:
    """Return the best validation accuracy per seed, and the mean seconds of a run."""
    accuracies, seconds = [], []
    for seed in range(seeds):
        result = job_fit(run.with_name(f"{run.name}-{seed}"), 2, *options, f"--seed_everything={seed}")
        accuracies.append(max(value for value, _ in result["accuracies"]))
        seconds.append(result["seconds"])
    return accuracies, statistics.mean(seconds)


def main() -> None:
    """Print a table per data set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", nargs="*", choices=SETS, default=list(SETS), help="data sets; default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="recipes to measure; default: all")
    arguments = parser.parse_args()
    if not ARCHIVE.exists():
        sys.exit(f"{ARCHIVE} does not exist: set JOB_TEST_CATS_AND_DOGS to the tutorial's archive.")
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = folder / "weights.safetensors"
        weights.write_bytes(efficientnet_lite0())
        half = "[0.5,0.5,0.5]"
        common = [f"--model.backbone={BACKBONE}", f"--model.weights={weights}", f"--model.mean={half}"]
        common += [f"--model.std={half}", "--data.global_batch_size=32", "--trainer.accelerator=cpu"]
        common += [f"--data.cache_dir={folder}/cache", f"--features.uri={folder}/features"]
        for title in arguments.sets:
            root, recipes = SETS[title](folder)
            table = Table("recipe", "best validation accuracy", "by seed", "seconds", title=title, title_justify="left")
            for recipe, options in recipes.items():
                if arguments.only and recipe not in arguments.only:
                    continue
                run = folder / f"{root.name}-{recipe}"
                values, seconds = measure(run, [*options, *common, f"--data.root={root}"], arguments.seeds)
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                by_seed = " ".join(f"{value:.4f}" for value in values)
                table.add_row(recipe, f"{statistics.mean(values):.4f} ± {spread:.4f}", by_seed, f"{seconds:.0f}")
                print(title, recipe, values, f"{seconds:.0f} s", file=sys.stderr, flush=True)
            console.print(table)


if __name__ == "__main__":
    main()
