"""The container files, as far as they can be held to their word without Docker: sources, versions, user, health check, ports."""

from __future__ import annotations

import fnmatch
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import ROOT

FILES = ("docker/Dockerfile", "docker/cpu.Dockerfile")
HEALTH = "http://127.0.0.1:7860/health"


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, its text) in order; continued lines joined, comments left out."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())]


def of(name: str, instruction: str) -> list[str]:
    return [text for word, text in instructions(name) if word == instruction]


def pins(name: str) -> dict[str, str]:
    """What a constraints file pins, names as PyPI compares them."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    pairs = [line.split("==") for line in lines]
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in pairs}


def sent_to_the_build(path: Path) -> bool:
    """What .dockerignore lets through: everything is ignored that is not named; a later line overrules an earlier one."""
    relative, sent = str(path.relative_to(ROOT)), True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        bare = pattern.removeprefix("!")
        # `a/**` is all below a, `**/a` is a anywhere, and what lies in an ignored folder is ignored as well.
        forms = [bare.removeprefix("**/"), f"*/{bare.removeprefix('**/')}"] if bare.startswith("**/") else [bare]
        if any(fnmatch.fnmatch(relative, form) or fnmatch.fnmatch(relative, f"{form}/*") for form in forms):
            sent = pattern.startswith("!")
    return sent


@pytest.mark.parametrize("name", FILES)
def test_what_is_copied_is_there_and_is_sent_to_the_build(name):
    copied = of(name, "COPY")
    assert len(copied) >= 5
    for text in copied:
        *sources, _target = text.split()
        for source in sources:
            path = ROOT / source
            assert path.exists(), source
            files = [path] if path.is_file() else [found for found in path.rglob("*") if found.is_file() and "__pycache__" not in found.parts]
            assert files
            for file in files:
                assert sent_to_the_build(file), file


def test_nothing_else_is_sent_to_the_build():
    for name in (
        ".git/config",
        "runs/quickstart/adapter/adapter_model.safetensors",
        "users.txt",
        ".env",
        "recipes/.env",
        "fastoss/__pycache__/cli.pyc",
        "docs/log.md",
    ):
        assert not sent_to_the_build(ROOT / name), name


@pytest.mark.parametrize("name", FILES)
def test_versions_are_those_of_the_makefile_and_of_pyproject(name):
    makefile = (ROOT / "Makefile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    runs = of(name, "RUN")
    torch = re.search(r"^TORCH_CPU := (torch==\S+)", makefile, re.MULTILINE)
    assert torch is not None
    installed = [text for text in runs if "pip install" in text]
    assert len(installed) >= 2
    assert any(torch[1] in text for text in installed)
    # Whatever is installed is pinned, or brings nothing else along (torch alone, our own code).
    for text in installed:
        assert "-c constraints.txt" in text or "--no-deps" in text, text
    asked = [extra for text in installed for group in re.findall(r"\.\[([\w,]+)\]", text) for extra in group.split(",")]
    assert {"demo", "serve"} <= set(asked) <= set(project["optional-dependencies"])
    assert ("unsloth" in asked) == (name == "docker/Dockerfile")


@pytest.mark.parametrize("name", FILES)
def test_base_images_are_pinned(name):
    (base,) = of(name, "FROM")
    assert re.search(r":\d+\.\d+\.\d+-", base), base  # a full version: neither `latest` nor a moving minor
    if name == "docker/cpu.Dockerfile":
        lowest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
        major, minor = re.findall(r"python:(\d+)\.(\d+)", base)[0]
        assert lowest == f">={major}.{minor}"
    else:
        cuda = re.findall(r"cuda:(\d+)\.", base)[0]
        assert f"nvidia-nccl-cu{cuda}" in pins("docker/constraints.txt")  # the wheels' CUDA is the base's


def test_the_gpu_image_installs_what_was_tested_and_the_unsloth_of_the_makefile():
    """docker/constraints.txt agrees with constraints.txt wherever both name a package, and with pyproject's ranges."""
    from packaging.requirements import Requirement

    tested, gpu = pins("constraints.txt"), pins("docker/constraints.txt")
    both = set(tested) & set(gpu)
    assert {"torch", "transformers", "trl", "peft", "datasets"} <= both
    assert {package: gpu[package] for package in both} == {package: tested[package] for package in both}
    makefile = (ROOT / "Makefile").read_text()
    for package in ("unsloth", "unsloth_zoo"):
        assert f"{package}=={gpu[package.replace('_', '-')]}" in makefile
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for line in [*project["dependencies"], *extras["unsloth"], *extras["demo"], *extras["serve"], *extras["gguf"]]:
        wanted = Requirement(line)
        version = gpu[re.sub(r"[-_.]+", "-", wanted.name).lower()]
        assert wanted.specifier.contains(version), (line, version)


@pytest.mark.parametrize("name", FILES)
def test_nobody_is_root_and_health_is_asked(name):
    order = [word for word, _ in instructions(name)]
    users = of(name, "USER")
    assert users
    assert users[-1] not in ("root", "0")
    assert users[-1].isdigit()
    assert order.index("USER") < order.index("CMD")
    assert f"--uid {users[-1]}" in " ".join(of(name, "RUN"))
    (health,) = of(name, "HEALTHCHECK")
    assert HEALTH in health
    volumes = of(name, "VOLUME")[0]
    environment = " ".join(of(name, "ENV"))
    assert '"/work/runs"' in volumes
    assert '"/cache"' in volumes
    assert "FASTOSS_CACHE=/cache/" in environment
    assert "HF_HOME=/cache/" in environment


@pytest.mark.parametrize("name", FILES)
def test_no_secret_is_in_a_file(name):
    for word, text in instructions(name):
        if word in ("ENV", "ARG"):
            assert not re.search(r"TOKEN|PASSWORD|SECRET|_KEY|DEMO_USERS", text), text


def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "compose.yaml").read_text())


def test_compose_has_two_services_of_one_image():
    services = compose()["services"]
    assert set(services) == {"train", "demo"}
    for service in services.values():
        assert (ROOT / service["build"]["dockerfile"]).is_file()
        assert service["cap_drop"] == ["ALL"]
        assert not service.get("privileged", False)
        devices = service["deploy"]["resources"]["reservations"]["devices"]
        assert devices[0]["capabilities"] == ["gpu"]
        named = {volume.split(":")[0] for volume in service["volumes"] if not volume.startswith(".")}
        assert named == set(compose()["volumes"]) == {"runs", "cache"}


def test_compose_publishes_the_demo_on_this_machine_only_and_asks_its_health():
    train, demo = compose()["services"]["train"], compose()["services"]["demo"]
    assert demo["ports"] == ["127.0.0.1:7860:7860"]
    assert "ports" not in train
    assert train["healthcheck"] == {"disable": True}
    assert HEALTH in demo["healthcheck"]["test"][-1]
    assert "--no-auth" not in demo["command"]


def test_compose_holds_no_secret():
    """Every variable is passed on from the shell: named, without a value."""
    for service in compose()["services"].values():
        assert service["environment"]
        assert all(value is None for value in service["environment"].values())


@pytest.mark.parametrize("service", ["train", "demo"])
def test_compose_commands_are_understood(service):
    """The options that compose.yaml and the images give exist."""
    from typer.main import get_command

    import app
    from fastoss import cli

    words = [re.sub(r"\$\{\w+:-(.*)\}", r"\1", word) for word in compose()["services"][service]["command"]]
    if service == "train":
        assert words[0] == "fastoss"
        command = get_command(cli.app).commands[words[1]]  # type: ignore[attr-defined]
        assert (ROOT / words[2]).is_file()
        given = words[3:]
    else:
        assert words[:2] == ["python", "app.py"]
        import typer

        root = typer.Typer()
        root.command()(app.demo)
        command = get_command(root)
        given = words[3:]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in given if word.startswith("--")} <= known


@pytest.mark.parametrize("name", FILES)
def test_shell_lines_are_whole(name):
    for text in of(name, "RUN"):
        assert shlex.split(text), text
        assert not text.rstrip().endswith("&&")
