"""Where in a TOML file a mistake stands: pydantic knows the key, this finds the line and the nearest known key."""

from __future__ import annotations

import difflib
import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from fastoss.errors import FastossError

_NAMED = 5  # further mistakes that are named

Key = tuple[str, ...]


@dataclass
class RecipeSource:
    """The text of a recipe, and which keys the command line has overridden."""

    path: Path
    lines: list[str]
    overridden: dict[Key, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> tuple[RecipeSource, dict[str, Any]]:
        """Read and parse a TOML file. `FastossError` names file and line."""
        try:
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise FastossError("recipe not found", place=str(path), hint=_other_recipes(path)) from None
        except UnicodeDecodeError as problem:
            raise FastossError(f"not UTF-8 text (byte {problem.start})", place=str(path), hint="save it as UTF-8") from None
        except OSError as problem:
            raise FastossError(f"cannot be read: {problem.strerror}", place=str(path)) from None
        try:
            table = tomllib.loads(text)
        except tomllib.TOMLDecodeError as problem:
            found = re.search(r"^(.*) \(at line (\d+), column (\d+)\)$", str(problem))
            fact, place = (found[1], f"{path}:{found[2]}:{found[3]}") if found else (str(problem), str(path))
            raise FastossError(f"not valid TOML: {fact}", place=place) from None
        return cls(path, text.splitlines()), table

    def place(self, key: Key) -> str:
        """`file:line` of a key (or of the section nearest to it), or the `--set` that gave it."""
        for length in range(len(key), 0, -1):
            given = [text for other, text in self.overridden.items() if other[:length] == key[:length] and (other == key or length == len(key))]
            if given:
                return given[0]
            line = self._line(key[:length])
            if line:
                return f"{self.path}:{line}"
        return str(self.path)

    def _line(self, key: Key) -> int | None:
        section: Key = ()
        counts: dict[str, int] = {}
        for number, line in enumerate(self.lines, 1):
            header = re.match(r"\s*(\[\[?)\s*([^\]]+?)\s*\]", line)
            if header and "=" not in line.split("#")[0].split("[")[0]:
                section = tuple(part.strip().strip("\"'") for part in header[2].split("."))
                if header[1] == "[[":
                    counts[header[2]] = counts.get(header[2], -1) + 1
                    section = (*section, str(counts[header[2]]))
                if section == key:
                    return number
                continue
            entry = re.match(r"\s*([A-Za-z0-9_\"'.-]+)\s*=", line)
            if entry:
                full = section + tuple(part.strip("\"'") for part in entry[1].split("."))
                # An inline table (`identity = { name = … }`) holds its keys on one line.
                if full == key or (full == key[: len(full)] and re.search(rf"[{{,]\s*{re.escape(key[-1])}\s*=", line)):
                    return number
        return None


def explain(problems: ValidationError, source: RecipeSource, model: type[BaseModel]) -> FastossError:
    """The first of pydantic's findings as one clear error; the number of further ones is said."""
    errors = problems.errors()
    unknown = [e for e in errors if e["type"] == "extra_forbidden"]
    error = (unknown or errors)[0]
    key = tuple(str(part) for part in error["loc"])
    dotted = ".".join(key)
    hint = None
    if error["type"] == "extra_forbidden":
        known = _known_keys(model, key[:-1])
        fact = f"unknown key `{dotted}`"
        close = difflib.get_close_matches(key[-1], known, n=1, cutoff=0.6)
        hint = f"did you mean `{close[0]}`?" if close else f"known here: {', '.join(known)}"
    elif error["type"] == "missing":
        fact = f"`{dotted}` is missing"
        hint = 'a recipe needs at least one [[data]] with source = "…"' if key[0] == "data" else None
    else:
        fact = f"`{dotted}`: {_plain(error)}"
    # An invalid entry makes its list invalid too: only findings about other keys count as more.
    elsewhere = {e["loc"] for e in unknown or errors} - {error["loc"][:length] for length in range(len(error["loc"]) + 1)}
    if elsewhere:
        others = sorted(".".join(map(str, loc)) for loc in elsewhere)
        fact += f"; wrong as well: {', '.join(others[:_NAMED])}" + (", …" if len(others) > _NAMED else "")
    return FastossError(fact, place=source.place(key), hint=hint)


def _plain(error: Any) -> str:
    given = error["input"]
    shown = f'"{given}"' if isinstance(given, str) else str(given).lower() if isinstance(given, bool) else str(given)
    message = error["msg"].replace("Value error, ", "").replace("Input should be", "should be").replace("valid integer", "whole number")
    if error["type"] == "tuple_type":
        message = f'should be a list, such as ["{given}"]' if isinstance(given, str) else "should be a list"
    elif error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        message = "should be a table, with keys of its own"
    return f"{message[0].lower()}{message[1:]}, not {shown if len(shown) < 60 else shown[:57] + '…'}"


def _known_keys(model: type[BaseModel], parents: Key) -> list[str]:
    for part in parents:
        if part.isdigit():
            continue
        info = model.model_fields.get(part)
        if info is None:
            return []
        candidates = [info.annotation, *get_args(info.annotation)]
        inner = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not inner:
            return []
        model = inner[0]
    return list(model.model_fields)


def _other_recipes(path: Path) -> str | None:
    folder = path.parent if path.parent.is_dir() else Path("recipes")
    names = sorted(p.name for p in folder.glob("*.toml") if p.name != "pyproject.toml") if folder.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {folder / close[0]}?"
    return f"recipes here: {', '.join(names)}" if names else None
