"""A LoRA adapter's tensors, whichever library wrote them: told apart, checked, and turned into one layout.

Four layouts of expert LoRA are in the wild for gpt-oss. Three have the same names and the same number of values, so a library
that reads the wrong one loads it without a word and answers nonsense:

* `peft`: what PEFT 0.17, 0.18 and 0.20 and later mean (and vLLM, and Unsloth since 2026-09-17). Fused: lora_A (experts · r, in)
  with the expert first, lora_B (out, r · experts) with the expert last (PEFT, `ParamWrapper.get_delta_weight`).
* `swapped`: PEFT 0.19 turned both round for gpt-oss: lora_A reads the outputs, lora_B writes the inputs.
* `grouped`: Unsloth before 2026-09-17: as `peft`, but lora_B's columns lie expert by expert.
* `split`: Unsloth on 4-bit checkpoints: every expert is a module with a plain pair of its own.
"""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastoss.errors import FastossError
from fastoss.export.tensors import Checkpoint, ShardWriter, Wanted, plan_shards
from fastoss.model.adapter import STAMP
from fastoss.model.lora import ATTENTION_MODULES, EXPERT_PARAMETERS
from fastoss.run import read_json, whole_folder, write_json

LAYOUTS = ("peft", "swapped", "grouped", "split")
_STAMPED = {"peft-0.19": "peft", "peft": "peft"}  # the stamp's first name for it; what it names is PEFT 0.21's layout
WEIGHTS = "adapter_model.safetensors"

_KEY = re.compile(
    r"^(?:base_model\.model\.)?model\.layers\.(?P<layer>\d+)\."
    r"(?:self_attn\.(?P<module>[qkvo]_proj)"
    r"|mlp\.experts\.(?P<list>gate_up|down)_projs\.(?P<expert>\d+)"
    r"|mlp\.experts(?P<inner>\.base_layer)?)"
    r"\.lora_(?P<side>[AB])(?:\.default)?\.weight$"
)
# PEFT options that change what a pair means; none of them is ours.
_OTHER_MEANINGS = {
    "use_dora": False, "fan_in_fan_out": False, "lora_bias": False, "bias": "none", "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
    "trainable_token_indices": None, "use_qalora": False, "layer_replication": None, "use_bdlora": None,
}  # fmt: skip


class Pair(NamedTuple):
    """One LoRA pair in float32: a weight changes by scale · b @ a. Of experts both have a first axis more.

    a: ([experts,] r, in), b: ([experts,] out, r).
    """

    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True)
class _Where:
    """The tensors in the file that make up one pair: (lora_A, lora_B) once, or once for each expert."""

    keys: tuple[tuple[str, str], ...]
    fused: bool


class Adapter:
    """An adapter's pairs by the base tensor that they change, as `model.layers.3.mlp.experts.gate_up_proj`.

    Raises `FastossError` for a tensor that belongs to no pair, and where the layout cannot be told.
    """

    def __init__(self, folder: Path, layout: str | None = None):
        self.folder = folder
        self.config: dict[str, Any] = read_json(folder / "adapter_config.json")
        self.file = Checkpoint(folder) if (folder / WEIGHTS).is_file() else _no_weights(folder)
        for option, plain in _OTHER_MEANINGS.items():
            if self.config.get(option, plain) not in (plain, None):
                raise FastossError(f"`{option}` = {self.config[option]!r} is not understood", place=str(folder / "adapter_config.json"))
        self.r = int(self.config["r"])
        alpha = float(self.config["lora_alpha"])
        self.scale = alpha / self.r**0.5 if self.config.get("use_rslora") else alpha / self.r
        self.where = self._find_pairs()
        self.experts = self._count_experts()
        self.evidence: list[str] = []
        self.layout = self._tell_layout(layout)

    def names(self) -> list[str]:
        return list(self.where)

    @functools.lru_cache(maxsize=2)  # noqa: B019 - an adapter lives as long as its export
    def pair(self, name: str) -> Pair:
        """The pair that changes base tensor `name`. Two are kept, since experts are asked for one by one."""
        found = self.where[name]
        sides = [(self.file.read(a).float(), self.file.read(b).float()) for a, b in found.keys]
        if not found.fused:
            return Pair(*sides[0]) if "self_attn" in name else Pair(torch.stack([a for a, _ in sides]), torch.stack([b for _, b in sides]))
        a, b = sides[0]
        count, r = self.experts, self.r
        if self.layout == "grouped":
            return Pair(a.reshape(count, r, -1), b.reshape(-1, count, r).transpose(0, 1).contiguous())
        first, last = a.reshape(count, r, -1), b.reshape(-1, r, count).permute(2, 0, 1).contiguous()  # (experts, ·, r)
        if self.layout == "swapped":
            return Pair(last.transpose(1, 2).contiguous(), first.transpose(1, 2).contiguous())
        return Pair(first, last)

    def delta(self, name: str, expert: int | None = None) -> torch.Tensor:
        """The change of a weight in float32 as the base stores it: attention (out, in), an expert (in, out)."""
        pair = self.pair(name)
        if expert is None:
            return self.scale * (pair.b @ pair.a)
        return self.scale * (pair.b[expert] @ pair.a[expert]).T

    def groups(self) -> dict[str, list[str]]:
        return {
            "attention": [name for name in self.where if "self_attn" in name],
            "experts": [name for name in self.where if "experts" in name],
        }

    def count(self) -> int:
        """How many pairs there are, each expert's on its own."""
        return sum(1 if "self_attn" in name else self.experts for name in self.where)

    def zero_pairs(self) -> Iterator[tuple[str, int | None]]:
        """Pairs whose lora_B or lora_A is all zero: they change nothing (an expert to which no token was routed, say)."""
        for name in self.where:
            pair = self.pair(name)
            if "self_attn" in name:
                if not (pair.a.any() and pair.b.any()):
                    yield name, None
                continue
            for expert in range(self.experts):
                if not (pair.a[expert].any() and pair.b[expert].any()):
                    yield name, expert

    def _find_pairs(self) -> dict[str, _Where]:
        sides: dict[tuple[str, int], dict[str, str]] = {}
        fused: set[str] = set()
        for key in self.file.names():
            found = _KEY.match(key)
            if found is None:
                raise FastossError(f"`{key}` is not a LoRA weight of gpt-oss's attention or experts", place=str(self.folder / WEIGHTS))
            layer = f"model.layers.{found['layer']}"
            if found["module"]:
                name, expert = f"{layer}.self_attn.{found['module']}.weight", 0
            elif found["list"]:
                name, expert = f"{layer}.mlp.experts.{found['list']}_proj", int(found["expert"])
            else:
                name, expert = f"{layer}.mlp.experts{found['inner'] or ''}", 0
                fused.add(name)
            sides.setdefault((name, expert), {})[found["side"]] = key
        for (name, expert), pair in sides.items():
            if set(pair) != {"A", "B"}:
                raise FastossError(f"`{next(iter(pair.values()))}` has no other half", place=f"{self.folder / WEIGHTS}: {name} {expert}")
        named: dict[str, list[tuple[int, tuple[str, str]]]] = {}
        for (name, expert), pair in sides.items():
            named.setdefault(name, []).append((expert, (pair["A"], pair["B"])))
        # Fused pairs are nested in the order in which PEFT met the targets: which one is which, their shapes tell.
        widest = max((max(self.file.shape(a)[1], self.file.shape(b)[0]) for name in fused for _, (a, b) in named[name]), default=0)
        pairs = {}
        for name, entries in named.items():
            keys = tuple(keys for _, keys in sorted(entries))
            if name in fused:
                (a, b), layer = keys[0], name.split(".mlp.")[0]
                is_gate_up = self._named_target(layer, widest in (self.file.shape(a)[1], self.file.shape(b)[0]))
                pairs[f"{layer}.mlp.experts.{'gate_up' if is_gate_up else 'down'}_proj"] = _Where(keys, True)
            else:
                pairs[name] = _Where(keys, False)
        if len(pairs) != len(named):
            raise FastossError("two pairs would change the same experts", place=str(self.folder / WEIGHTS))
        order = [f"self_attn.{module}.weight" for module in ATTENTION_MODULES] + [f"mlp.experts.{name}" for name in EXPERT_PARAMETERS]

        def place(name: str) -> tuple[int, int]:
            _, _, layer, rest = name.split(".", 3)
            return int(layer), order.index(rest)

        return {name: pairs[name] for name in sorted(pairs, key=place)}

    def _named_target(self, layer: str, by_shape: bool) -> bool:
        """Whether a layer's lone fused pair is gate_up's: by the config's `target_parameters` where they name one of the two."""
        number = layer.rsplit(".", 1)[1]
        targets = [(re.search(r"(\d+)\.mlp\.", target), target.rsplit(".", 1)[-1]) for target in self.config.get("target_parameters") or []]
        names = {name for found, name in targets if found is None or found[1] == number}
        return "gate_up_proj" in names if len(names) == 1 else by_shape

    def _count_experts(self) -> int:
        counts = {self.file.shape(w.keys[0][0])[0] // self.r if w.fused else len(w.keys) for name, w in self.where.items() if "experts" in name}
        if len(counts) > 1:
            raise FastossError(f"its pairs name {sorted(counts)} experts", place=str(self.folder / WEIGHTS))
        return counts.pop() if counts else 0

    def _tell_layout(self, said: str | None) -> str:
        fused = [w.keys[0] for name, w in self.where.items() if w.fused and name.endswith("gate_up_proj")]
        anything_fused = any(w.fused for w in self.where.values())
        if not anything_fused:
            return "split" if self.experts else "peft"
        stamp = read_json(self.folder / STAMP) if (self.folder / STAMP).is_file() else {}
        if fused:
            a, b = (self.file.shape(key) for key in fused[0])
            self.evidence.append(f"gate_up's lora_A is {list(a)}, its lora_B {list(b)}")
            # gate_up writes twice as many values as an expert has inside, more than the model's width: the wide side is its output.
            if a[1] > b[0]:
                self.evidence.append("lora_A reads as many values as gate_up writes: both are turned round, as PEFT 0.19 did")
                return "swapped"
        if said is not None:
            return said
        if stamp.get("lora_layout") in _STAMPED:
            self.evidence.append(f"{STAMP} names its layout")
            return _STAMPED[stamp["lora_layout"]]
        return self._tell_columns()

    def _tell_columns(self) -> str:
        """`peft` or `grouped`: the same shapes. Experts that were never trained have zero columns, and those lie in one order or the other."""
        for where in self.where.values():
            if where.fused:
                zero = (self.file.read(where.keys[0][1]) == 0).all(dim=0)
                if zero.any() and not zero.all():
                    by_expert = zero.reshape(self.experts, self.r)
                    by_rank = zero.reshape(self.r, self.experts)
                    whole = {"grouped": bool((by_expert.all(1) == by_expert.any(1)).all()), "peft": bool((by_rank.all(0) == by_rank.any(0)).all())}
                    if whole["grouped"] != whole["peft"]:
                        layout = "grouped" if whole["grouped"] else "peft"
                        self.evidence.append(f"the columns of experts that were never trained lie as `{layout}` has them")
                        return layout
        if (self.config.get("auto_mapping") or {}).get("unsloth_fixed"):
            hint = "name it with --layout: grouped (Unsloth before 2026-09-17) or peft (later); the base's answers with it show which is right"
            raise FastossError("Unsloth wrote it, and whether before or after its change of lora_B cannot be told", place=str(self.folder), hint=hint)
        version = self.config.get("peft_version")
        self.evidence.append(f"PEFT {version} wrote it" if version else "PEFT wrote it")
        return "peft"


def _no_weights(folder: Path) -> Checkpoint:
    hint = "fastoss reads safetensors only"
    raise FastossError(f"no {WEIGHTS}", place=str(folder), hint=hint)


def check_lines(adapter: Adapter) -> list[str]:
    """What `fastoss adapter check` says of an adapter."""
    groups = adapter.groups()
    layers = {name: len({n.split(".")[2] for n in names}) for name, names in groups.items()}
    experts = f"experts {len(groups['experts'])} pairs in {layers['experts']} layers, {adapter.experts} experts each"
    lines = [
        f"layout: {adapter.layout}" + (f" ({'; '.join(adapter.evidence)})" if adapter.evidence else ""),
        f"r {adapter.r}, scale {adapter.scale:g}; attention {len(groups['attention'])} pairs in {layers['attention']} layers; {experts}",
    ]
    zero = list(adapter.zero_pairs())
    total = adapter.count()
    if len(zero) == total:
        lines.append("note: every pair is zero: this adapter changes nothing")
    elif zero:
        name, expert = zero[0]
        which = name if expert is None else f"{name}, expert {expert}"
        lines.append(f"note: {len(zero)} of {total} pairs are zero and change nothing (the first: {which})")
    ready = (
        "stock PEFT loads it as it is"
        if adapter.layout == "peft"
        else "today's PEFT would read it wrongly or not at all: convert it with --convert DIR"
    )
    return [*lines, ready]


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """Write an adapter in the `peft` layout into an existing folder: config, weights in their own dtype, and its stamp."""
    if adapter.layout == "peft":
        for name in (WEIGHTS, "adapter_config.json"):
            shutil.copyfile(adapter.folder / name, folder / name)
    else:
        _write_fused(adapter, folder)
    if (adapter.folder / STAMP).is_file():
        write_json(folder / STAMP, read_json(adapter.folder / STAMP) | {"lora_layout": "peft"})


def _write_fused(adapter: Adapter, folder: Path) -> None:
    groups = adapter.groups()
    config = adapter.config | {
        "target_modules": sorted({name.split(".")[-2] for name in groups["attention"]}),
        "target_parameters": [name.removeprefix("model.layers.") for name in groups["experts"]] or None,
        "peft_version": _peft_version(),
    }
    tensors: dict[str, torch.Tensor] = {}
    for name in adapter.names():
        a, b = adapter.pair(name)
        if "self_attn" in name:
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
        else:
            layer = name.split(".mlp.")[0]
            nested = name.endswith("gate_up_proj") and f"{layer}.mlp.experts.down_proj" in adapter.where
            prefix = f"base_model.model.{layer}.mlp.experts" + (".base_layer" if nested else "")
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
        dtype = adapter.file.entries[adapter.where[name].keys[0][0]].dtype
        tensors |= {f"{prefix}.lora_A.weight": a.to(dtype), f"{prefix}.lora_B.weight": b.to(dtype)}
    wanted = [Wanted(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    writer = ShardWriter(folder, plan_shards(wanted, limit=sum(w.bytes for w in wanted)))
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()
    (folder / "model.safetensors").rename(folder / WEIGHTS)
    write_json(folder / "adapter_config.json", config)


def _peft_version() -> str:
    from importlib.metadata import version

    return version("peft")


def check_adapter(path: Path, layout: str | None = None, convert: Path | None = None) -> list[str]:
    """Tell an adapter's layout, and write it in today's when `convert` names a folder. `FastossError` when it is none."""
    from fastoss.model.lora import adapter_folder

    if layout is not None and layout not in LAYOUTS:
        raise FastossError("there is no such layout", place=f"--layout {layout}", hint=f"one of {', '.join(LAYOUTS)}")
    adapter = Adapter(adapter_folder(str(path)), layout)
    lines = check_lines(adapter)
    if convert is not None:
        if convert.exists() and any(convert.iterdir()):
            raise FastossError("the folder is not empty", place=f"--convert {convert}")
        with whole_folder(convert) as beside:
            write_adapter(adapter, beside)
        lines.append(f"converted: {convert}")
    return lines
