"""The README and docs/: commands parse, options and files exist, examples are valid, the website builds."""

from __future__ import annotations

import ast
import configparser
import importlib
import inspect
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from graphlib import TopologicalSorter
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, get_args

import fsspec
import pytest
import torch
import yaml
from support import REPOSITORY
from torch.distributed.run import get_args_parser

from job import cli, errors
from job.cli.parser import ParserMixin
from job.cluster.environment import Platform
from job.errors import ConfigError
from job.model.task import per_sample_loss
from job.process import logs

README = REPOSITORY / "README.md"
PAGES = [README, REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
GUIDE = REPOSITORY / "k8s" / "README.md"
"""Its commands are checked by test_manifests.py."""
SERVING = REPOSITORY / "docs" / "serve.md"
"""Its commands for Kubernetes are checked by test_serve_manifests.py."""
FORMS = sorted((REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
MAKEFILE = (REPOSITORY / "Makefile").read_text()
TARGETS = {name for line in re.findall(r"^([a-z][\w -]*):(?!=)", MAKEFILE, re.MULTILINE) for name in line.split()}
README_WORDS = 1000
SOURCE_FOLDERS = ("job", "tests", "docs", "k8s", "docker", "benchmarks", ".github", ".ci")
OTHER_PROGRAMS_OPTIONS = {"--nnodes", "--max-restarts", "--device", "--quick", "--clear-soft-delete", "--disk-size"}
OTHER_PROGRAMS_OPTIONS |= {"--logdir", "--load_fast", "--flex-start", "--ephemeral-storage-local-ssd", "--tpu-topology"}
OTHER_PROGRAMS_OPTIONS |= {"--machine-type", "--accelerator", "--disk-type", "--reservation-affinity", "--reservation"}
OTHER_PROGRAMS_OPTIONS |= {"--patch", "--model-repository", "--require-hashes", "--no-deps", "--only-binary"}
OTHER_PROGRAMS_OPTIONS |= {"--build-arg", "--upgrade", "--data-binary", "--rm", "--entrypoint", "--target", "--file"}
"""Options of other programs that the text names."""


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    blocks = []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        blocks.append(Block(page, text[: match.start()].count("\n") + 1, match[1], match[2]))
    assert text.count("```") == 2 * len(blocks), f"{page}: a fence is not closed, or indented"
    return blocks


def prose_of(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


BLOCKS = [block for page in [*PAGES, GUIDE] for block in blocks_of(page)]


def commands_of(text: str) -> Iterator[list[str]]:
    """Return the words of each line, without comments and leading assignments of variables."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words:
            yield words


COMMANDS = [
    pytest.param(words, id=f"{block}-{' '.join(words)[:50]}")
    for block in BLOCKS
    if block.language == "bash"
    for words in commands_of(block.text)
]


class Parsed(Exception):
    """The arguments were accepted."""


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Parse the arguments of ``python -m job`` with the parser of their command, and stop there."""
    parse_args = ParserMixin.parse_args

    def parse_and_stop(self: ParserMixin, *args: Any, **kwargs: Any) -> None:
        parse_args(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(ParserMixin, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", ["job"])  # LightningCLI warns of arguments given besides
    monkeypatch.chdir(REPOSITORY)  # where commands name files

    def parse(args: list[str]) -> None:
        verb, *arguments = args
        if verb == "launch":
            return parse(arguments)
        assert verb in cli.COMMANDS, verb
        if arguments in (["--help"], ["--help-all"]):
            return None
        # A run_dir that exists nowhere, so that no bucket is asked for its configuration.
        with pytest.raises(Parsed):
            cli.run_command(verb, [word.replace("gs://BUCKET/runs", "memory://no-such-run") for word in arguments])
        return None

    return parse


def check_python(words: list[str], options: Callable[[list[str]], None]) -> None:
    if words[:2] == ["-m", "job"]:
        options([word for word in words[2:] if word != "--print_config"])
        return
    script = REPOSITORY / words[0]
    assert script.is_relative_to(REPOSITORY / "benchmarks")
    for option in [word for word in words[1:] if word.startswith("--")]:
        assert f'"{option}"' in script.read_text(), option


def check_torchrun(words: list[str], options: Callable[[list[str]], None]) -> None:
    parsed = get_args_parser().parse_args(words)
    assert (parsed.module, parsed.training_script) == (True, "job")
    options(parsed.training_script_args)


def check_make(words: list[str], options: Callable[[list[str]], None]) -> None:
    targets = [word for word in words if "=" not in word]
    assert targets
    assert set(targets) <= TARGETS


def check_kubectl(words: list[str], options: Callable[[list[str]], None]) -> None:
    assert words[:2] == ["apply", "-k"]
    assert (REPOSITORY / words[2] / "kustomization.yaml").exists()


def check_docker(words: list[str], options: Callable[[list[str]], None]) -> None:
    dockerfile = (REPOSITORY / "docker" / "Dockerfile").read_text()
    if words[0] == "build":
        flags = dict(zip(words[1::2], words[2::2], strict=False))
        assert (REPOSITORY / flags["--file"]).exists()
        assert re.search(rf"^FROM .* AS {flags['--target']}$", dockerfile, re.MULTILINE)
        return
    image = next(place for place, word in enumerate(words) if word.startswith("localhost/job:"))
    options(words[image + 1 :])


def check_pip(words: list[str], options: Callable[[list[str]], None]) -> None:
    assert words[0] == "install"
    extras = configparser.ConfigParser()
    extras.read(REPOSITORY / "setup.cfg")
    for word in words[1:]:
        if match := re.fullmatch(r"\.\[(.*)\]", word):
            assert set(match[1].split(",")) <= set(extras["options.extras_require"])
        elif word not in ("-c", "."):
            assert (REPOSITORY / word).exists(), word


def check_export(words: list[str], options: Callable[[list[str]], None]) -> None:
    """Options of filesystems by environment variables, as fsspec reads them."""
    for word in words:
        name = word.partition("=")[0]
        prefix, protocol, option = name.lower().split("_", 2)
        assert prefix == "fsspec"
        parameters = {
            parameter
            for base in fsspec.get_filesystem_class(protocol).__mro__
            for parameter in inspect.signature(base.__init__).parameters
        }
        assert option in parameters, name


def check_curl(words: list[str], options: Callable[[list[str]], None]) -> None:
    """Requests to the server of predictions, whose tests send them."""
    assert words[-1] == "localhost:8080/predict"


CHECKS: dict[str, Callable[[list[str], Callable[[list[str]], None]], None]] = {
    "python": check_python,
    "export": check_export,
    "torchrun": check_torchrun,
    "make": check_make,
    "kubectl": check_kubectl,
    "docker": check_docker,
    "pip": check_pip,
    "curl": check_curl,
}


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_is_accepted(words: list[str], options: Callable[[list[str]], None]) -> None:
    assert words[0] in CHECKS, f"no check for {words[0]}: add one"
    CHECKS[words[0]](words[1:], options)


@pytest.mark.parametrize(
    "line",
    [
        "python -m job fit --run_dir runs/1 --data.rooot images",
        "python -m job launch fit --run_dir runs/1 --model.backbone",
        "python -m job predikt --ckpt runs/1",
        "python benchmarks/train.py --bakcbones",
        "torchrun --nprocs=2 -m job fit --run_dir runs/1",
        "make demoo",
        "kubectl apply -k k8s/overlays/gqu",
        "docker build --file docker/Dockerfile --target gqu --tag x .",
        "pip install .[tim]",
    ],
)
def test_a_wrong_command_is_refused(line: str, options: Callable[[list[str]], None]) -> None:
    words = shlex.split(line)
    with pytest.raises((AssertionError, ConfigError, SystemExit)):
        CHECKS[words[0]](words[1:], options)


def test_options_of_filesystems_have_the_names_of_fsspec() -> None:
    words = re.findall(r"FSSPEC_(?:S3|GS)_\w+", (REPOSITORY / "docs" / "data.md").read_text())
    assert len(words) >= 5
    check_export(words, lambda _: None)
    with pytest.raises(AssertionError):
        check_export(["FSSPEC_S3_ENDPOINT=x"], lambda _: None)


def test_every_block_has_a_language_that_is_checked() -> None:
    assert {block.language for block in BLOCKS} <= {"bash", "sh", "yaml", "python", "text"}
    assert {block.page for block in BLOCKS if block.language == "sh"} == {GUIDE, SERVING}


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "yaml"], ids=str)
def test_a_yaml_block_is_valid(block: Block, options: Callable[[list[str]], None], tmp_path: Path) -> None:
    content = yaml.safe_load(block.text)
    assert isinstance(content, dict)
    if block.page != GUIDE and "resources" not in content:
        (tmp_path / "config.yaml").write_text(block.text)
        options(["fit", "--config", str(tmp_path / "config.yaml"), "--run_dir", "runs/1"])
    for path in (path for path in content.get("resources", []) + content.get("components", [])):
        # Of a run in runs/NAME, beside the repository in a folder job.
        assert (REPOSITORY / path.removeprefix("../../job/") / "kustomization.yaml").exists()


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=str)
def test_a_python_block_uses_existing_names(block: Block) -> None:
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "job":
            for name in node.names:
                assert hasattr(importlib.import_module(node.module), name.name)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "job":
            assert hasattr(importlib.import_module("job"), node.attr)
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef))]
    exec(compile(ast.Module(imports, []), str(block), "exec"), {})


@pytest.fixture(scope="module")
def known_options() -> set[str]:
    """The options of all commands."""
    names = set(logs.OPTIONS)

    def collect(self: ParserMixin, *args: Any, **kwargs: Any) -> None:
        names.update(option for action in self._actions for option in action.option_strings)
        names.update(f"--{alias}" for alias in self.aliases)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ParserMixin, "parse_args", collect)
        patch.setattr(sys, "argv", ["job"])
        for verb in cli.COMMANDS:
            if verb != "launch":
                with pytest.raises(Parsed):
                    cli.run_command(verb, [])
    return names


@pytest.mark.parametrize("page", [*PAGES, GUIDE], ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_options_in_the_text_exist(page: Path, known_options: set[str]) -> None:
    for code in re.findall(r"`([^`\n]*)`", prose_of(page)):
        for option in re.findall(r"(?<![\w-])--[A-Za-z][\w.-]*", code):
            parts = option.split(".")
            # An argument of a class that an option names, as in --model.optimizer.lr.
            exists = any(".".join(parts[:length]) in known_options for length in range(len(parts), 1, -1))
            assert exists or option in known_options | OTHER_PROGRAMS_OPTIONS, f"{page}: {option}"


@pytest.mark.parametrize("page", [*PAGES, GUIDE], ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_files_and_targets_in_the_text_exist(page: Path) -> None:
    for code in re.findall(r"`([^`\n]*)`", prose_of(page)):
        if code.partition("/")[0] in SOURCE_FOLDERS and re.fullmatch(r"[\w./-]+", code):
            assert (REPOSITORY / code).exists(), f"{page}: {code}"
        if command := re.fullmatch(r"make( [A-Z]+=\S+)* ([a-z-]+)( [A-Z]+=\S+)*", code):
            assert command[2] in TARGETS, f"{page}: {code}"
        if module := re.fullmatch(r"(job(?:\.\w+)+)\.(\w+)", code):
            assert hasattr(importlib.import_module(module[1]), module[2]), f"{page}: {code}"
        if verb := re.match(r"python -m job (\w+)", code):
            assert verb[1] in cli.COMMANDS, f"{page}: {code}"


@pytest.mark.parametrize("page", [*PAGES, GUIDE], ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_relative_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path) if path else page
        assert linked.exists(), f"{page}: {target}"
        if anchor:
            included = re.match(r'--8<-- "(.*)"', linked.read_text())
            source = REPOSITORY / included[1] if included else linked
            headings = re.findall(r"^#+ (.*)$", prose_of(source), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page}: {target}"


def test_the_readme_is_short_and_has_its_two_commands() -> None:
    text = README.read_text()
    assert len(text.split()) <= README_WORDS
    first = next(block for block in blocks_of(README) if block.language == "bash")
    assert [words[:2] for words in commands_of(first.text)] == [["make", "demo"], ["make", "test"]]


def test_make_knows_its_targets() -> None:
    """``make --dry-run`` accepts the targets that the tests read from the Makefile."""
    assert {"demo", "test", "test-all", "lint", "docs"} <= TARGETS
    result = subprocess.run(["make", "--dry-run", *sorted(TARGETS)], capture_output=True, text=True, cwd=REPOSITORY)
    assert result.returncode == 0, result.stderr


def test_the_workflow_runs_the_commands_of_ci() -> None:
    script = re.findall(r"^make .*$", (REPOSITORY / ".ci" / "run").read_text(), re.MULTILINE)
    workflow = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert steps == script
    assert set(script) >= {"make lint", "make docs", "make test-all"}


@pytest.mark.parametrize(
    "file", sorted((REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda f: f.stem
)
def test_an_issue_template_is_a_form(file: Path) -> None:
    form = yaml.safe_load(file.read_text())
    if file.stem == "config":
        assert set(form) <= {"blank_issues_enabled", "contact_links"}
        return
    assert {"name", "description", "body"} <= set(form)
    for element in form["body"]:
        assert element["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes")
        assert element["attributes"]["label"]
    identifiers = [element["id"] for element in form["body"]]
    assert len(set(identifiers)) == len(identifiers)


def test_the_picture_is_well_formed() -> None:
    for file in (REPOSITORY / "docs" / "images").glob("*.svg"):
        assert ElementTree.parse(file).getroot().get("aria-label")


def test_the_picture_and_the_table_name_every_package() -> None:
    packages = {folder.parent.name for folder in (REPOSITORY / "job").glob("*/__init__.py")}
    picture = (REPOSITORY / "docs" / "images" / "architecture.svg").read_text()
    table = (REPOSITORY / "docs" / "architecture.md").read_text()
    for package in packages:
        assert f">{package}<" in picture, package
        assert f"`job/{package}/`" in table, package


def test_the_exit_codes_are_those_of_the_code() -> None:
    table = (REPOSITORY / "docs" / "reliability.md").read_text().partition("## Exit codes")[2]
    rows = re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE)
    documented = {int(code) for row in rows for code in row.split(", ")}
    assert documented == {0} | {value for name, value in vars(errors).items() if name.startswith("EXIT_")}


def test_the_platforms_are_those_of_the_launcher() -> None:
    table = (REPOSITORY / "docs" / "clusters.md").read_text().partition("| Platform |")[2].partition("\n\n")[0]
    variables = set(re.findall(r"`([A-Z_]+)`", table))
    assert variables
    source = (REPOSITORY / "job" / "cluster" / "environment.py").read_text()
    assert not {name for name in variables if f'"{name}"' not in source}
    assert len(table.strip().splitlines()) - 2 == len(get_args(Platform)) - 1  # of a rank there is nothing to detect


def test_the_example_loss_trains() -> None:
    (block,) = (block for block in BLOCKS if "def focal_loss" in block.text)
    namespace: dict[str, Any] = {}
    exec(block.text, namespace)
    logits, labels = torch.tensor([[2.0, 0.0, 1.0], [0.5, 0.1, 0.2]]), torch.tensor([0, 2])
    losses = namespace["focal_loss"](logits, labels, gamma=0.0)
    torch.testing.assert_close(losses, per_sample_loss(logits, labels))
    assert (namespace["focal_loss"](logits, labels, gamma=2.0) < losses).all()


@pytest.mark.parametrize("name", ["walks.md", "extending.md"])
def test_names_beside_a_file_are_in_it(name: str) -> None:
    """Functions and classes in table rows that name a file."""
    checked = 0
    for row in re.findall(r"^\|.*`job/.*\|$", (REPOSITORY / "docs" / name).read_text(), re.MULTILINE):
        code = re.findall(r"`([^`]*)`", row)
        files = [REPOSITORY / word for word in code if word.startswith("job/") and word.endswith(".py")]
        text = "\n".join(file.read_text() for file in files)
        for word in code:
            if files and re.fullmatch(r"[A-Za-z_][\w.]*", word) and not word.endswith(".py"):
                assert re.search(rf"\b{word.rpartition('.')[2]}\b", text), (word, row)
                checked += 1
    assert checked > 10


def test_imports_have_no_cycles() -> None:
    modules = {}
    for file in (REPOSITORY / "job").rglob("*.py"):
        parts = file.relative_to(REPOSITORY).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for name, file in modules.items():
        for node in ast.parse(file.read_text()).body:  # those within functions come later
            if isinstance(node, ast.ImportFrom) and node.module in modules:
                members = [f"{node.module}.{alias.name}" for alias in node.names]
                graph[name] |= {member if member in modules else node.module for member in members} - {name}
            elif isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names if alias.name in modules}
    assert any(graph.values())
    TopologicalSorter(graph).prepare()  # CycleError names the modules


def test_every_recipe_is_in_the_table_of_recipes() -> None:
    text = (REPOSITORY / "docs" / "recipes.md").read_text()
    for recipe in (REPOSITORY / "job" / "recipes").glob("*.yaml"):
        assert f"`job/recipes/{recipe.name}`" in text


def test_every_command_is_in_the_table_of_commands() -> None:
    text = (REPOSITORY / "docs" / "configuration.md").read_text()
    for verb in cli.COMMANDS:
        assert f"`{verb}`" in text


needs_mkdocs = pytest.mark.skipif(
    find_spec("material") is None, reason="mkdocs-material is not installed: pip install '.[docs]'"
)


def build_website(source: Path, site: Path) -> subprocess.CompletedProcess[str]:
    (command,) = re.findall(r"^\t\S+/python (-m mkdocs build .*)$", MAKEFILE, re.MULTILINE)
    return subprocess.run(
        [sys.executable, *command.split(), "--site-dir", str(site)], capture_output=True, text=True, cwd=source
    )


@needs_mkdocs
def test_the_website_builds_without_a_warning(tmp_path: Path) -> None:
    result = build_website(REPOSITORY, tmp_path / "site")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "site" / "index.html").exists()


@needs_mkdocs
@pytest.mark.parametrize(
    "mistake", ["[x](no-such-page.md)", "[x](data.md#no-such-heading)", '--8<-- "no-such-file.md"']
)
def test_the_website_does_not_build_with_a_broken_link(mistake: str, tmp_path: Path) -> None:
    for name in ("mkdocs.yml", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(REPOSITORY / name, tmp_path)
    shutil.copytree(REPOSITORY / "docs", tmp_path / "docs")
    (tmp_path / "k8s").mkdir()
    shutil.copy(GUIDE, tmp_path / "k8s")
    with (tmp_path / "docs" / "tpu.md").open("a") as page:
        page.write(f"\n{mistake}\n")
    result = build_website(tmp_path, tmp_path / "site")
    assert result.returncode != 0
    assert "no-such" in result.stderr
