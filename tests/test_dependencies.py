"""docs/dependencies.md: every dependency with its range and licence, every import declared, every file of others in NOTICE."""

from __future__ import annotations

import importlib.metadata as metadata
import re
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `([\w-]+)` \| ([\w, ]*?) ?\| (.+?) \| (.+?) \| .+ \|$", PAGE, re.MULTILINE)

CLASSIFIERS = {
    "License :: OSI Approved :: Apache Software License": "Apache-2.0",
    "License :: OSI Approved :: MIT License": "MIT",
    "License :: OSI Approved :: Python Software Foundation License": "PSF-2.0",
}
# What names a licence in a text, tried in this order: the two BSD texts begin alike.
PHRASES = (
    (r"Apache(-2\.0| 2\.0| License|$)", "Apache-2.0"),
    (r"BSD[- ]3-Clause|Neither the name", "BSD-3-Clause"),
    (r"BSD[- ]2-Clause|Redistributions of source code", "BSD-2-Clause"),
    (r"^MIT|Permission is hereby granted, free of charge", "MIT"),
)


def declared() -> dict[str, tuple[list[str], str]]:
    """Package → the extras that name it, and its range, as `pyproject.toml` has them."""
    groups = {"": PROJECT["project"]["dependencies"], **PROJECT["project"]["optional-dependencies"], "build": PROJECT["build-system"]["requires"]}
    found: dict[str, tuple[list[str], str]] = {}
    for extra, lines in groups.items():
        for line in lines:
            wanted = Requirement(line)
            if wanted.name == "fastoss":
                continue
            written = re.sub(r"^[\w.-]+", "", line).strip()
            extras, first = found.setdefault(wanted.name, ([], written))
            assert first == written, f"{wanted.name} has two ranges"
            extras.append(extra)
    return found


def stated_licence(package: metadata.Distribution) -> str:
    """The licence as SPDX names it: from the expression, else a classifier, else the licence field or file."""
    expression = package.metadata.get("License-Expression")  # `[…]` raises KeyError where a library has put its own importlib_metadata in place
    if expression:
        return expression
    for classifier in package.metadata.get_all("Classifier") or []:
        if classifier in CLASSIFIERS:
            return CLASSIFIERS[classifier]
    texts = [package.metadata.get("License") or ""]
    texts += [file.locate().read_text(encoding="utf-8") for file in package.files or [] if re.search(r"dist-info/.*LICENSE", str(file))]
    for text in texts:
        for phrase, licence in PHRASES:
            if re.search(phrase, text, re.MULTILINE):
                return licence
    return "none stated"


def test_each_dependency_has_its_row():
    rows = {name: ([extra for extra in extras.split(", ") if extra] or [""], span.strip("`").replace("any", "")) for name, extras, span, _ in ROWS}
    assert len(rows) == len(ROWS) > 40
    assert rows == declared()


def test_licences_are_those_of_the_installed_packages():
    licences = {name: licence for name, _, _, licence in ROWS}
    installed = {}
    for name in licences:
        try:
            installed[name] = stated_licence(metadata.distribution(name))
        except metadata.PackageNotFoundError:
            assert name in ("hatchling", "unsloth", "unsloth_zoo"), f"{name} is not installed"
    assert installed == {name: licences[name] for name in installed}


def test_what_the_code_imports_is_declared():
    """Nothing is leant on that another package merely happens to bring."""
    modules = metadata.packages_distributions()
    known = {re.sub(r"[-_.]+", "-", name).lower() for name in declared()}
    ours = {"fastoss", "tests", "benchmarks", "app", *(path.stem for path in (ROOT / "benchmarks").glob("*.py"))}
    undeclared = set()
    for path in [ROOT / "app.py", *(path for folder in ("fastoss", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py"))]:
        for module in re.findall(r"^ *(?:import|from) (\w+)[\w.]*(?: import .+| as \w+)?(?:  #.*)?$", path.read_text(encoding="utf-8"), re.MULTILINE):
            packages = {re.sub(r"[-_.]+", "-", name).lower() for name in modules.get(module, [])}
            if module not in sys.stdlib_module_names and module not in ours and packages and not packages & known:
                undeclared.add((module, path.name))
    assert undeclared == set()


def test_files_of_others_stand_in_the_notice_and_all_assets_on_the_page():
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    shipped = PAGE.split("## What is shipped", 1)[1]
    assets = {path.name for path in (ROOT / "fastoss" / "assets").iterdir() if path.suffix not in (".py", "") and path.name != "plan.json"}
    assert all(f"{name}`" in shipped for name in assets)
    of_others = set(re.findall(r"`fastoss/assets/([\w.]+)` \| OpenAI", shipped))
    assert of_others == set(re.findall(r"^- ([\w.]+):", notice, re.MULTILINE)) == {"o200k_base.tiktoken.xz", "chat_template.jinja"}
