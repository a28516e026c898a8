"""The grid of a sweep, random draws, and mistyped values."""

from __future__ import annotations

from dataclasses import replace

import pytest

from job.errors import ConfigError
from job.model.config import ModelConfig
from job.sweep.run import backbones_of
from job.sweep.trials import SweepSettings, Trial


def test_grid_has_every_combination_once() -> None:
    settings = SweepSettings(
        lr="0.01,1e-3,0.01",
        weight_decay=[0.0, 0.1],
        hidden="none,256x32",
        label_smoothing=0.1,
        class_weights="none, balanced",
        dropout="0",
    )
    trials = settings.trials(2, seed=0)
    assert len(trials) == len(set(trials)) == 2 * 2 * 2 * 2 * 2
    assert trials[0] == Trial(0, 0.01, 0.0, (), 0.1, "none", 0.0)
    assert {trial.hidden for trial in trials} == {(), (256, 32)}


@pytest.mark.parametrize("value", ["[[], [256]]", [[], [256]], "none,256", "linear, 256"])
def test_forms_of_hidden_layers(value: str | list[list[int]]) -> None:
    assert {trial.hidden for trial in SweepSettings(hidden=value).trials(1, 0)} == {(), (256,)}


def test_random_draws_are_reproducible_and_in_range() -> None:
    settings = SweepSettings(lr="1e-4..1e-1", weight_decay="0..1", samples=50)
    trials = settings.trials(1, seed=3)
    assert trials == settings.trials(1, seed=3) != settings.trials(1, seed=4)
    assert len(set(trials)) == 50
    assert all(1e-4 <= trial.lr <= 1e-1 and 0 <= trial.weight_decay <= 1 for trial in trials)
    assert sum(trial.lr < 10**-2.5 for trial in trials) in range(15, 36)  # uniform in the logarithm


def test_fewer_combinations_than_draws() -> None:
    settings = SweepSettings(lr="0.1,0.2", weight_decay="0", hidden="none", label_smoothing="0", samples=50)
    assert len(settings.trials(1, seed=0)) == 2
    assert settings.trials(3, seed=0) == replace(settings, samples=0).trials(3, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": "0.1,abc"}, "--sweep.lr: 'abc' is no number"),
        ({"lr": "0.1,,0.2"}, "--sweep.lr: '' is no number"),
        ({"lr": ""}, "--sweep.lr: '' is no number"),
        ({"lr": []}, "--sweep.lr is empty"),
        ({"lr": "0"}, "--sweep.lr must be above 0"),
        ({"lr": "nan"}, "--sweep.lr must be above 0"),
        ({"lr": "1e-4..1e-1"}, "--sweep.lr is a range, which needs random draws"),
        ({"lr": "1e-1..1e-4", "samples": 9}, "--sweep.lr: 1e-1..1e-4 is no range"),
        ({"weight_decay": "-1"}, "--sweep.weight_decay must be between"),
        ({"hidden": "256y32"}, "--sweep.hidden: '256y32'"),
        ({"hidden": "0"}, "--sweep.hidden"),
        ({"hidden": "[[256]"}, "--sweep.hidden"),
        ({"hidden": [[2.5]]}, "--sweep.hidden"),
        ({"hidden": "99999"}, "--sweep.hidden"),
        ({"label_smoothing": "1"}, "--sweep.label_smoothing must be at least 0 and below 1"),
        ({"dropout": "1.5"}, "--sweep.dropout"),
        ({"class_weights": "balance"}, "'balance' is neither none nor balanced"),
        ({"folds": 1}, "--sweep.folds must be at least 2"),
        ({"folds": 1001}, "--sweep.folds must be at least 2 and at most 1,000"),
        ({"epochs": 0}, "--sweep.epochs"),
        ({"batch_size": -3}, "--sweep.batch_size"),
        ({"lr": ",".join(f"{n + 1}e-4" for n in range(2000))}, "the grid has .* combinations"),
    ],
)
def test_mistyped_values(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SweepSettings(**options)  # type: ignore[arg-type]


def test_backbones() -> None:
    several = backbones_of(ModelConfig(backbone="resnet18, resnet34", weights="DEFAULT"))
    assert [(each.backbone, each.weights) for each in several] == [("resnet18", "DEFAULT"), ("resnet34", "DEFAULT")]
    several = backbones_of(ModelConfig(backbone="resnet18,resnet34", weights="a.pth,b.pth"))
    assert [each.weights for each in several] == ["a.pth", "b.pth"]
    assert backbones_of(ModelConfig(backbone="resnet18", weights="a,b.pth"))[0].weights == "a,b.pth"
    for backbone, weights in (("resnet18,", "none"), ("resnet18,resnet18", "none"), ("resnet18,resnet34", "a.pth")):
        with pytest.raises(ConfigError, match=r"--model\.(backbone|weights)"):
            backbones_of(ModelConfig(backbone=backbone, weights=weights))
