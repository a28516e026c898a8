"""Aliases, hyphens, positional arguments, recipes and messages of the command line."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from support import TINY, options, run_here

from job import argparse_internals
from job.api import fit
from job.cli import launch
from job.cli.arguments import DATA_ALIASES, FLAGS, TRAINING_ALIASES, canonical_arguments
from job.cli.help import COMMON, common_help
from job.cli.messages import closest_option, without_unions
from job.cli.parser import Parser
from job.cli.training import TrainingCLI
from job.config.recipes import FOLDER, recipe_names
from job.errors import ConfigError

OPTIONS = {"run_dir", "config", "data.global_batch_size", "trainer.max_epochs", "trainer.strategy", "help-all"}


def canonical(*args: str) -> list[str]:
    return canonical_arguments(args, options=OPTIONS, aliases=TRAINING_ALIASES, positional=("run_dir",))


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--epochs", "3"], ["--trainer.max_epochs=3"]),
        (["--max-epochs=3"], ["--trainer.max_epochs=3"]),
        (["--batch-size", "8"], ["--data.global_batch_size=8"]),
        (["--data.global-batch-size", "8"], ["--data.global_batch_size=8"]),
        (["--run-dir", "gs://a/b"], ["--run_dir=gs://a/b"]),
        (["gs://a/b"], ["--run_dir=gs://a/b"]),
        (["--epochs", "3", "gs://a/b"], ["--trainer.max_epochs=3", "--run_dir=gs://a/b"]),
        (["--profile", "gs://a/b"], ["--profile", "--run_dir=gs://a/b"]),
        (["--run_dir=x", "y"], ["--run_dir=x", "y"]),
        (["--epochs", "-1"], ["--trainer.max_epochs=-1"]),
        (["--run_dir", "--epochs", "3"], ["--run_dir", "--trainer.max_epochs=3"]),
        (["--trainer.strategy.a-b", "1"], ["--trainer.strategy.a_b=1"]),
        (["--unknown-option", "1"], ["--unknown-option=1"]),
        (["-h"], ["--help"]),
        (["--help-all"], ["--help-all"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_canonical_arguments(args: list[str], expected: list[str]) -> None:
    assert canonical(*args) == expected


def test_the_options_of_a_parser_are_listed() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    one, two = parser.add_argument("--one"), parser.add_argument("-t", "--two.three")
    assert argparse_internals.actions(parser) == [one, two]
    assert argparse_internals.option_names(parser) == {"one", "two.three"}


def test_an_option_of_the_command_is_not_an_alias() -> None:
    args = ["--batch_size", "8"]
    assert canonical_arguments(args, options={"batch_size"}, aliases=DATA_ALIASES) == ["--batch_size=8"]


@pytest.mark.parametrize(
    ("args", "variables", "libraries"),
    [
        (["--run_dir", "runs/1"], {}, []),
        (["s3://bucket/run", "--data.root=gs://bucket/data"], {}, ["gcsfs", "s3fs"]),
        (["--model.backbone", "timm/resnet18"], {}, ["timm"]),
        (["--config", "demo"], {}, ["timm"]),
        (["--config=no/such/file"], {}, []),
        ([], {"JOB_CONFIG": "demo", "JOB_DATA__ROOT": "gs://bucket/data"}, ["gcsfs", "timm"]),
    ],
)
def test_launch_imports_the_libraries_that_the_options_need(
    args: list[str], variables: dict[str, str], libraries: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launch.optional_libraries(args) == libraries


def test_recipes_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert canonical("--config", "head") == canonical("-c", "head") == [f"--config={FOLDER / 'head.yaml'}"]
    assert canonical("--config=other/head.yaml") == ["--config=other/head.yaml"]
    with pytest.raises(ConfigError, match="no recipe 'heed'") as excinfo:
        canonical("--config", "heed")
    assert all(name in str(excinfo.value) for name in recipe_names())
    (tmp_path / "head").write_text("{}")
    assert canonical("--config", "head") == ["--config=head"]


def test_a_recipe_named_by_a_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JOB_CONFIG", "demo")
    for args in (["--run_dir=x", "--data.root=y"], {"run_dir": "x", "data": {"root": "y"}}):
        assert TrainingCLI("fit", args).model_config.backbone == "timm/tf_efficientnet_lite0"
    monkeypatch.setenv("JOB_CONFIG", "heed")
    with pytest.raises(ConfigError, match="no recipe 'heed'"):
        TrainingCLI("fit", ["--run_dir=x", "--data.root=y"])


def test_training_from_python_takes_no_grace(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"grace is 3\.0, but job\.fit never ends the process"):
        fit({"run_dir": str(tmp_path / "run"), "data": {"root": str(tmp_path)}, "grace": 3.0})


@pytest.fixture(scope="module", params=["fit", "check", "tune", "validate", "test"])
def cli(request: pytest.FixtureRequest) -> TrainingCLI:
    return TrainingCLI(request.param, ["--run_dir=x", "--data.root=y", "--model.weights=none"])


def test_options_without_a_value_are_known_ahead_of_the_parser(cli: TrainingCLI) -> None:
    without_value = {
        name.removeprefix("--")
        for name, action in cli.parser._option_string_actions.items()
        if name.startswith("--") and action.nargs in (0, "?") and not name.endswith(".help")
    }
    assert without_value <= FLAGS


def test_common_options_exist_and_have_the_defaults_that_help_says(cli: TrainingCLI) -> None:
    known = {action.dest: action for action in cli.parser._actions}
    for option in (option for group in COMMON[cli.verb].values() for option in group):
        name = option.alias_of or option.name
        if option.alias_of:
            assert cli.parser.aliases.get(option.name) == name
        assert name in known, name
        if option.default:
            assert str(known[name].default) == option.default, name
        assert f"--{option.name} " in common_help(cli.verb)


def test_common_help_is_short() -> None:
    assert 20 <= sum(len(group) for group in COMMON["fit"].values()) <= 32
    assert common_help("fit").count("\n") < 80


@pytest.mark.parametrize(
    ("arguments", "name", "weight_decay"),
    [
        ([], "Adam", 0),
        (["--model.optimizer", "AdamW"], "AdamW", 0.01),
        (["--model.optimizer", "AdamW", "--model.optimizer.weight_decay", "0.1"], "AdamW", 0.1),
        (["--model.optimizer.weight_decay", "0.1", "--model.optimizer", "AdamW"], "AdamW", 0.1),
        (["--model.optimizer", "SGD", "--model.optimizer", "AdamW"], "AdamW", 0.01),
        (["--config", "finetune"], "AdamW", 0.05),
        (["--config", "finetune", "--model.optimizer", "SGD"], "SGD", 0.05),
    ],
)
def test_a_class_has_its_own_defaults(arguments: list[str], name: str, weight_decay: float) -> None:
    """Not those of the class that is the option's default."""
    optimizer = TrainingCLI("fit", ["--run_dir=x", "--data.root=y", *arguments]).config["model"]["optimizer"]
    assert optimizer.class_path == f"torch.optim.{name}"
    assert optimizer.init_args.weight_decay == weight_decay


def test_aliases_reach_the_configuration() -> None:
    args = ["--lr", "0.25", "--model.optimizer", "SGD", "--epochs=4", "--batch-size", "6", "--data.root=y", "runs/1"]
    config = TrainingCLI("fit", args).config
    assert config["model.optimizer.class_path"] == "torch.optim.SGD"
    assert config["model.lr"] == 0.25
    assert config["trainer.max_epochs"] == 4
    assert config["data.global_batch_size"] == 6
    assert config["run_dir"] == "runs/1"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--trainer.max_epoch 1", "Did you mean --trainer.max_epochs?"),
        ("--trainer.max_epochs many", "--trainer.max_epochs many: expected a whole number or null."),
        ("--trainer.limit_val_batches x", "--trainer.limit_val_batches x: expected a number or null."),
        ("--data.image_size large", "--data.image_size large: expected a whole number or auto."),
        ("--lr x", "--model.lr x: expected a number or null."),
        ("--model.optimizer.weight_decay x", "weight_decay x: expected a number."),
        ("--resume yes", "--resume yes: expected one of auto, never, must, best."),
        ("--grace 0", "--grace 0: it must be above 0."),
        ("--model.mean 1", "--model.mean 1: expected a list, such as [1, 2] or null."),
        (
            "--model.lr_scheduler StepLR --model.lr_scheduler.step_size x",
            "--model.lr_scheduler.step_size x: expected a whole number.\n    See --help.",
        ),
        ("--model.optimizer AdmW", "Did you mean torch.optim.AdamW?"),
        ("--model.optimizer torch.optim.AdmW", "Did you mean torch.optim.AdamW?"),
        ("--model.lr_scheduler StepLr", "Did you mean torch.optim.lr_scheduler.StepLR?"),
        ("--trainer.callbacks EarlyStoping", "Did you mean pytorch_lightning.callbacks.EarlyStopping?"),
        ("--data.augment Resiz", "Did you mean torchvision.transforms.v2.Resize?"),
        ("--model.optimizer AdamW --model.optimizer.weight_decy 1", "'weight_decy'. Did you mean weight_decay?"),
        ("--trainer.devices 2", "--trainer.devices is reserved: job itself sets"),
        ("--learning-rate 1", "Did you mean --lr?"),
        ("--backbone resnet18", "Did you mean --model.backbone?"),
        ("--output_dir x", "Did you mean --run_dir?"),
    ],
)
def test_messages_say_what_is_expected(words: str, message: str, tmp_path: Path) -> None:
    outcome = run_here("fit", *options(TINY, data__root=tmp_path, run_dir=tmp_path / "run"), *words.split())
    assert outcome.returncode == 2
    assert message in outcome.output
    assert not [
        word for word in ("Union", "<class", "typing.", "NoneType", "NestedArg", "Traceback") if word in outcome.output
    ]


@pytest.mark.parametrize(
    ("misspelt", "option"),
    [("run-dri", "run_dir"), ("epohcs", "epochs"), ("num_epochs", "epochs"), ("root", "data.root"), ("zzz", None)],
)
def test_closest_option(misspelt: str, option: str | None) -> None:
    assert closest_option(misspelt, ["run_dir", "epochs", "data.root"]) == option


def test_unions_in_help() -> None:
    assert without_unions("(type: Union[str, list[str],\n  Union[int, null]], default)") == (
        "(type: str | list[str] |\n  int | null, default)"
    )


def test_help_of_a_light_command_shows_no_union() -> None:
    parser = Parser(prog="x")
    parser.add_argument("--a", type=str | list[str] | None, default=None)
    assert "Union" not in parser.format_help()


@pytest.mark.parametrize("spelling", [["RUN"], ["--run_dir", "RUN"], ["--run-dir=RUN"]], ids=" ".join)
@pytest.mark.parametrize("command", ["validate", "test", "predict", "checkpoints"])
def test_one_way_to_name_a_run(command: str, spelling: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = [word.replace("RUN", str(run_dir)) for word in spelling]
    before = ["ls"] if command == "checkpoints" else []
    extra = {"predict": ["--input", tmp_path], "validate": ["--data.root", tmp_path], "test": ["--data.root", tmp_path]}
    outcome = run_here(command, *before, *words, *extra.get(command, []))
    assert outcome.returncode == 2
    assert f"no checkpoint in {run_dir}/checkpoints" in outcome.output
