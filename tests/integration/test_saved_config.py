"""A run_dir's config.yaml is data: no class that it names is run."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from support import TINY, Outcome, fit_here, options, picture_files, run, run_here, write_files

from job import storage
from job.cli.evaluate import with_saved_config
from job.errors import StorageError

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit_here(tmp_path_factory.mktemp("finished"), trainer__max_epochs=1)


@pytest.fixture
def validated(finished: Path, tmp_path: Path) -> Callable[..., Outcome]:
    """Validate with a modified config.yaml."""
    original = (finished / "config.yaml").read_text()

    def call(change: Callable[[dict], object] | None = None, content: bytes | None = None, *args: object) -> Outcome:
        tree = yaml.safe_load(original)
        if change is not None:
            change(tree)
        (finished / "config.yaml").write_bytes(content if content is not None else yaml.safe_dump(tree).encode())
        try:
            return run_here("validate", "--run_dir", finished, *args)
        finally:
            (finished / "config.yaml").write_text(original)

    return call


def put(key: str, value: object) -> Callable[[dict], None]:
    def change(tree: dict) -> None:
        *path, last = key.split(".")
        for name in path:
            tree = tree[name]
        tree[last] = value

    return change


def spelt(marker: Path) -> dict[str, tuple[str, object]]:
    shell = {"class_path": "subprocess.Popen", "init_args": {"args": f"touch {marker}", "shell": True}}
    flat = {"class_path": "subprocess.Popen", "args": f"touch {marker}", "shell": True}
    rest = {"class_path": "subprocess.Popen", "dict_kwargs": {"args": f"touch {marker}", "shell": True}}
    ddp = "pytorch_lightning.strategies.DDPStrategy"
    lambda_ = "torchvision.transforms.v2.Lambda"
    planted = {"class_path": "planted.Planted", "init_args": {"path": str(marker)}}
    return {
        "strategy's object": ("trainer.strategy", {"class_path": ddp, "init_args": {"ddp_comm_state": shell}}),
        "flat arguments": ("trainer.strategy", {"class_path": ddp, "init_args": {"ddp_comm_state": flat}}),
        "dict_kwargs": ("trainer.strategy", {"class_path": ddp, "dict_kwargs": {"anything": rest}}),
        "short name": ("trainer.strategy", {"class_path": "DDPStrategy", "init_args": {"ddp_comm_state": shell}}),
        "callback": ("trainer.callbacks", [planted]),
        "one callback": ("trainer.callbacks", planted),
        "bare callback": ("trainer.callbacks", "planted.Planted"),
        "plugin": ("trainer.plugins", [planted]),
        "logger in profiler": ("trainer.profiler", planted),
        "accelerator": ("trainer.accelerator", planted),
        "precision": ("trainer.precision", planted),
        "optimizer": ("model.optimizer", planted),
        "bare optimizer": ("model.optimizer", "planted.Planted"),
        "optimizer's argument": ("model.optimizer", {"class_path": "torch.optim.SGD", "init_args": {"lr": shell}}),
        "scheduler": ("model.lr_scheduler", planted),
        "callable by its path": (
            "model.lr_scheduler",
            {"class_path": "torch.optim.lr_scheduler.LambdaLR", "init_args": {"lr_lambda": "planted.run"}},
        ),
        "transform": ("data.augment", planted),
        "transform's callable": ("data.augment", {"class_path": lambda_, "init_args": {"lambd": "planted.run"}}),
        "nested transform": (
            "data.augment",
            {"class_path": "torchvision.transforms.v2.Compose", "init_args": {"transforms": [shell, planted]}},
        ),
        "plain parameter": ("model.hidden", planted),
        "list": ("model.hidden", [planted]),
        "string": ("model.backbone", planted),
        "float": ("data.val_fraction", shell),
        "data": ("data.root", [planted]),
        "monitor": ("checkpoint.monitor", planted),
        "seed": ("seed_everything", planted),
        "section": ("model", planted),
        "file as section": ("trainer", "/etc/passwd"),
        "config in the file": ("config", "planted.yaml"),
        "path mark": ("data.__path__", "/etc/passwd"),
        "other command": ("ckpt", "planted.ckpt"),
        "dotted key": ("model.optimizer.class_path", "planted.Planted"),
        "placeholder": ("data.image_size", "${oc.env:HOME}"),
    }


PLANTED = """
from pathlib import Path
Path(__file__).with_name("marker").touch()
def run(*args): Path(__file__).with_name("marker").touch()
class Planted:
    def __init__(self, path: str = "", *args, **kwargs): Path(path or __file__).with_name("marker").touch()
"""


@pytest.mark.parametrize("name", list(spelt(Path())))
def test_no_class_named_in_a_saved_configuration_is_run(
    name: str, validated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "planted.py").write_text(PLANTED)
    (tmp_path / "planted.yaml").write_text("trainer:\n  callbacks: [{class_path: planted.Planted}]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    key, value = spelt(marker)[name]
    result = validated(put(key, value))
    time.sleep(0.02)  # a shell would need some time
    assert not marker.exists()
    assert result.returncode in (0, 2), result.output
    assert "Traceback" not in result.output
    if result.returncode == 0:
        assert "config.yaml: 1 setting(s) that name classes" in result.output, "left out without a word"
    else:
        assert "config.yaml" in result.output
        assert key.partition(".")[0] in result.output
    if "subprocess.Popen" in str(value):
        assert result.returncode == 2
        assert key in result.output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00config", "is damaged: 'utf-8' codec"),
        (b"a: [1, 2", "is damaged: while parsing a flow sequence"),
        (b"", "is damaged: it holds no options"),
        (b"just text", "is damaged: it holds no options"),
        (b"- a\n- b\n", "is damaged: it holds no options"),
        (b"1: 2\n", "is damaged: it holds no options"),
        (b"model: 5\n", "is damaged: model holds no options"),
        (b"seed_everything: !!python/object/apply:os.system ['true']\n", "tag"),
        (b"seed_everything: 0\nseed_everything: 1\n", "occurs twice"),
        (b"model: {hidden: many}\n", "model.hidden: Expected `array`, got `str`"),
        (b"model: {head: 3}\n", "has the key 'model.head', which this version of job does not know"),
        (b"data: {image_size: 1.5}\n", "data.image_size: Expected `int | str`, got `float`"),
        (b"[" * 100_000, "levels deep"),
        (b"a: " + b"9" * 100_000, "a number of 100,000 characters"),
        (b"a: " + b"x" * (1 << 20), "a configuration has at most 1,048,576"),
        (
            b"a: &a [x,x,x,x,x,x,x,x,x]\n"
            + b"".join(b"%c: &%c [%s]\n" % (98 + n, 98 + n, b",".join([b"*%c" % (97 + n)] * 9)) for n in range(12)),
            "aliases stand for more than",
        ),
    ],
)
def test_damaged_configurations(content: bytes, message: str, validated) -> None:
    start = time.monotonic()
    result = validated(None, content)
    assert result.returncode == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert time.monotonic() - start < 60  # an expanded alias bomb takes hours


def test_an_unreadable_configuration_is_an_error(validated, monkeypatch) -> None:
    def refused(path: object, *args: object, **kwargs: object) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.info", refused)
    result = validated()
    assert result.returncode == 2
    assert "permission denied" in result.output
    with pytest.raises(StorageError):
        storage.exists("/some/file")


@pytest.mark.parametrize("source", ["--config ", "JOB_CONFIG="])
def test_config_replaces_the_saved_configuration(
    source: str, validated, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user_config = tmp_path / "own.yaml"
    user_config.write_text((finished / "config.yaml").read_text())
    if source == "JOB_CONFIG=":
        monkeypatch.setenv("JOB_CONFIG", str(user_config))
    result = validated(None, b"\xff", *(["--config", user_config] if source == "--config " else []))
    assert result.returncode == 0, result.output
    assert f"{source}{user_config} is used, not the configuration saved in run_dir" in result.output


def test_config_replaces_nothing_in_a_new_run_dir(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "job")
    arguments = ["--run_dir", str(tmp_path), "--config", "own.yaml"]
    for is_saved in (False, True):
        if is_saved:
            (tmp_path / "config.yaml").touch()
        with with_saved_config(arguments) as configured:
            assert configured == arguments
        assert ("not the configuration saved in run_dir" in caplog.text) == is_saved


DENIED = ("subprocess.Popen", "os.system", "builtins.exec", "functools.partial", "pickle.loads", "torch.hub.load")


@pytest.mark.parametrize("path", DENIED)
def test_classes_outside_the_import_policy_are_refused_on_the_command_line(path: str, tmp_path: Path) -> None:
    ddp = "pytorch_lightning.strategies.DDPStrategy"
    (tmp_path / "own.yaml").write_text(f"trainer: {{callbacks: [{{class_path: {path}}}]}}\n")
    for arguments in (
        ["--trainer.strategy", f"{{class_path: {ddp}, init_args: {{ddp_comm_state: {{class_path: {path}}}}}}}"],
        [f"--trainer.strategy={ddp}", f"--trainer.strategy.ddp_comm_state={{class_path: {path}}}"],
        [f"--trainer.strategy={path}"],
        [f"--model.optimizer={path}"],
        [f"--data.augment={{class_path: {path}}}"],
        ["--config", str(tmp_path / "own.yaml")],
    ):
        result = run_here("fit", "--data.root", tmp_path, "--run_dir", tmp_path / "run", *arguments)
        assert result.returncode == 2, arguments
        assert f"{path} is not allowed in a configuration" in result.output, arguments


def test_environment_variables_follow_the_import_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOB_TRAINER__STRATEGY", "{class_path: subprocess.Popen, init_args: {args: true}}")
    result = run_here("fit", "--data.root", tmp_path, "--run_dir", tmp_path / "run")
    assert result.returncode == 2
    assert "subprocess.Popen is not allowed" in result.output


def test_alias_bombs_on_the_command_line_end_at_once(tmp_path: Path) -> None:
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(8)
    )
    (tmp_path / "bomb.yaml").write_text(bomb)
    (tmp_path / "quoted.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": bomb}}))
    (tmp_path / "below.yaml").write_text("model:\n  hidden:\n" + "".join(f"    {line}\n" for line in bomb.split("\n")))
    flow = "{" + ", ".join(bomb.strip().split("\n")) + "}"
    for arguments in (
        ["--config", str(tmp_path / "bomb.yaml")],
        ["--config", str(tmp_path / "below.yaml")],
        ["--config", str(tmp_path / "quoted.yaml")],
        ["--model.hidden", flow],
        ["--trainer.callbacks", f"[{flow}]"],
        ["--model.optimizer", flow],
    ):
        start = time.monotonic()
        result = run_here("fit", "--data.root", tmp_path, "--run_dir", tmp_path / "run", *arguments)
        assert result.returncode == 2, arguments
        assert time.monotonic() - start < 60, arguments


def test_options_cannot_be_abbreviated(finished: Path) -> None:
    for option, whole in (
        ("--trainer.max_epoch=2", "--trainer.max_epochs"),
        ("--checkpoint.keep_las=3", "--checkpoint.keep_last"),
    ):
        result = run_here("fit", "--run_dir", finished, *options(TINY, data__root=finished), option)
        assert result.returncode == 2
        assert f"Did you mean {whole}" in result.output


def test_a_damaged_configuration_does_not_stop_a_fit_and_is_kept(finished: Path, tmp_path: Path) -> None:
    colours = write_files(tmp_path / "colours", picture_files(["blue", "red"], 10))
    settings = {"data__root": colours, "run_dir": tmp_path / "run"}
    assert run_here("fit", *options(TINY, **settings, trainer__max_epochs=1)).returncode == 0
    (tmp_path / "run" / "config.yaml").write_bytes(b"\xff damaged")
    for number in range(1, 70):
        (tmp_path / "run" / f"config.{number}.yaml").touch()
    result = run_here("fit", *options(TINY, **settings, trainer__max_epochs=2))
    assert result.returncode == 0, result.output
    assert "is damaged" in result.output
    kept = [path for path in (tmp_path / "run").glob("config.*.yaml") if path.read_bytes() == b"\xff damaged"]
    assert [path.name for path in kept] == ["config.70.yaml"]
    assert f"kept as {kept[0]}" in result.output
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["trainer"]["max_epochs"] == 2


def test_a_command_in_a_saved_configuration_is_refused_by_the_shell_command(finished: Path, tmp_path: Path) -> None:
    """``subprocess.Popen`` as ddp_comm_state, in a new process."""
    shell = {"class_path": "subprocess.Popen", "init_args": {"args": f"touch {tmp_path}/marker", "shell": True}}
    tree = yaml.safe_load((finished / "config.yaml").read_text())
    ddp = "pytorch_lightning.strategies.DDPStrategy"
    tree["trainer"]["strategy"] = {"class_path": ddp, "init_args": {"ddp_comm_state": shell}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(finished / "checkpoints")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(tree))
    result = run("validate", "--run_dir", tmp_path / "run")
    assert result.returncode == 2
    assert "trainer.strategy.init_args.ddp_comm_state names subprocess.Popen" in result.stderr
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("data.root", "http://169.254.169.254/computeMetadata", "link-local"),
        ("data.root", ["http://127.0.0.1:1/a", "/tmp"], "this machine"),
        ("data.root", "http://localhost:1/a", "on this machine"),
        ("data.allow", ["127.0.0.1"], "data.allow"),
    ],
)
def test_a_saved_configuration_cannot_name_internal_addresses(
    validated: Callable[..., Outcome], finished: Path, key: str, value: object, why: str
) -> None:
    result = validated(put(key, value))
    assert key in result.output
    assert why in result.output
    assert result.returncode == (0 if key == "data.allow" else 2), result.output
    revalidated = validated(put(key, value), None, "--data.root", finished.parent / "colours")
    assert revalidated.returncode == 0, revalidated.output
