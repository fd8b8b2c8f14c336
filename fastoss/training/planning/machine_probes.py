"""Parts of `fastoss doctor` that import heavy libraries: `python machine_probes.py PART,PART FILE CARDS` writes its lines to FILE, one by one.

A process that dies leaves the lines that it had; machine.py says that it died, and starts the parts that are left.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:] = [entry for entry in sys.path if entry != os.path.dirname(os.path.abspath(__file__))]  # its neighbours are no top-level modules

_REDUCE_S = 90
UNSLOTH_HINT = "pip install 'fastoss[unsloth]'"
Found = tuple[str, str, str, str | None]


def torch_lines() -> Iterator[Found]:
    import torch

    yield "torch", "ok", torch.__version__, None
    if not torch.cuda.is_available():
        driver = any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/dxg"))
        if driver:
            built = "this torch is built for the CPU" if torch.version.cuda is None else f"this torch is built for CUDA {torch.version.cuda}"
            yield "CUDA", "broken", f"there is a GPU, but torch cannot use it ({built})", "install a torch for your driver: https://pytorch.org"
        else:
            yield "CUDA", "absent", "torch sees no GPU", None
        return
    for number in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(number)
        free, total = torch.cuda.mem_get_info(number)
        told = f"{torch.version.cuda}, card {number}: compute capability {major}.{minor}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        if (major, minor) < (8, 0):
            yield "CUDA", "slow", told, "older than Ampere: no bf16 and no FlashAttention"
        elif free < 0.9 * total:
            yield "CUDA", "slow", told, "another program holds memory on this card (nvidia-smi names it)"
        else:
            yield "CUDA", "ok", told, None


def kernel_lines() -> Iterator[Found]:
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    from fastoss.model.attention import prove_attention, register_packed_attention

    gpu = torch.cuda.is_available()
    if importlib.util.find_spec("triton") is None:
        yield "Triton", "broken" if gpu else "absent", "not installed", "pip install triton" if gpu else None
    else:
        version = importlib.metadata.version("triton")
        yield "Triton", "ok" if gpu else "absent", version if gpu else f"{version}, of no use without a GPU", None
    device = torch.device("cuda" if gpu else "cpu")
    # One small layer with gpt-oss's real heads and window: the kernels see no more of a model than that.
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_local_experts": 2, "num_experts_per_tok": 1, "vocab_size": 64}
    config = GptOssConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config._attn_implementation = register_packed_attention()
    model = GptOssForCausalLM(config).to(device, torch.bfloat16 if gpu else torch.float32)
    begun = time.perf_counter()
    line = prove_attention(model).removeprefix("attention: ")
    if "eager" in line:
        fix = "a GPU of compute capability 8.0 or more, with Triton" if gpu else None
        yield "attention with sinks", "slow", line, fix
    else:
        yield "attention with sinks", "ok", f"{line}; compared with the reference, output and gradients ({time.perf_counter() - begun:.1f} s)", None
    ids = torch.randint(3, 64, (1, 32), device=device)
    model(input_ids=ids, labels=ids).loss.backward()
    yield "gpt-oss in transformers", "ok", "a step of one small layer, forward and backward", None


def library_lines() -> Iterator[Found]:
    for name in ("transformers", "trl", "peft", "accelerate", "datasets"):
        yield from _imported(name, required=True)
    gpu = any(Path(path).exists() for path in ("/dev/nvidiactl", "/dev/dxg"))
    yield from _imported("bitsandbytes", required=gpu, hint=UNSLOTH_HINT)
    if not gpu:
        version = _version("unsloth")
        told = f"{version}, which is used where there is a GPU" if version else "not installed; only a GPU machine needs it"
        yield "Unsloth", "ok" if version else "absent", told, None
        return
    if _version("unsloth") is None:
        yield "Unsloth", "broken", 'not installed: it is the default on a GPU (or model.backend = "transformers")', UNSLOTH_HINT
        return
    # Imported last, in a process of its own: it must come before transformers.
    code = "import unsloth"
    environment = os.environ | {"UNSLOTH_AUTO_INSTALL": "0", "UNSLOTH_DISABLE_STATISTICS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    said = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:200]
    yield "Unsloth", "ok" if done.returncode == 0 else "broken", str(_version("unsloth")) if done.returncode == 0 else said, (
        None if done.returncode == 0 else UNSLOTH_HINT
    )  # fmt: skip


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _imported(name: str, *, required: bool, hint: str = "pip install -e . -c constraints.txt in the project's folder") -> Iterator[Found]:
    version = _version(name)
    if version is None:
        yield name, "broken" if required else "absent", "not installed", hint if required else None
        return
    try:
        importlib.import_module(name)
    except Exception as problem:
        yield name, "broken", f"{version} cannot be imported: {type(problem).__name__}: {problem}"[:300], hint
    else:
        yield name, "ok", version, None


def exchange_lines() -> Iterator[Found]:
    """A short all-reduce between the cards, or between two processes on the CPU, by torchrun."""
    cards = int(sys.argv[3])
    if cards == 1:
        yield "NCCL", "absent", "one card: nothing to exchange", None
        return
    kind, processes = ("nccl", cards) if cards else ("gloo", 2)
    name = "NCCL between the cards" if cards else "gloo between two processes"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), __file__, "reduce", kind]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_REDUCE_S)
    except subprocess.TimeoutExpired:
        fix = (
            "NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1 may help; NCCL_DEBUG=INFO says more"
            if cards
            else "the machine is busy, or a firewall stops localhost"
        )
        yield name, "broken" if cards else "slow", f"no answer within {_REDUCE_S} s", fix
        return
    result = next((json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"sum"')), None)
    if done.returncode or result is None or result["sum"] != processes * (processes + 1) / 2:
        said = next((line for line in reversed(done.stderr.splitlines()) if "Error" in line), "no reason given")
        yield name, "broken", said.strip()[:300], "NCCL_DEBUG=INFO says more" if cards else "the machine is busy, or a firewall stops localhost"
        return
    speed = result["gb_per_second"]
    slow = bool(cards) and speed < 5
    told = f"{processes} processes add up 64 MB, {speed:.1f} GB/s" if cards else f"{processes} processes add up 64 MB in {result['seconds']:.2f} s"
    yield (
        name,
        "slow" if slow else "ok",
        told,
        "the cards exchange over the host: gradients of a LoRA still pass, ZeRO-3 would be slow" if slow else None,
    )


def reduce(kind: str) -> None:
    """One rank of the all-reduce."""
    import torch

    from fastoss.training.signals import end_with_parent

    end_with_parent()  # a reduction that hangs must not hold the cards once nobody waits for it
    rank = int(os.environ["RANK"])
    if kind == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group(kind)
    device = "cuda" if kind == "nccl" else "cpu"
    values = torch.full((16 * 2**20,), float(rank + 1), device=device)
    torch.distributed.all_reduce(values)
    total = values[0].item()
    begun = time.perf_counter()
    torch.distributed.all_reduce(values)
    values[0].item()
    seconds = time.perf_counter() - begun
    if rank == 0:
        print(json.dumps({"sum": total, "seconds": seconds, "gb_per_second": values.numel() * 4 / 1e9 / seconds}), flush=True)  # noqa: T201
    torch.distributed.destroy_process_group()


PARTS = {"torch": torch_lines, "kernels": kernel_lines, "libraries": library_lines, "exchange": exchange_lines}


def main() -> None:
    part, file = sys.argv[1:3]
    if part == "reduce":
        reduce(file)
        return
    lines: list[dict[str, Any]] = []
    done: list[str] = []

    def note() -> None:
        Path(file).write_text(json.dumps({"lines": lines, "done": done}), encoding="utf-8")

    for name in part.split(","):
        try:
            for what, state, told, fix in PARTS[name]():
                lines.append({"what": what, "state": state, "told": told, "fix": fix})
                note()
        except Exception as problem:
            told = f"{type(problem).__name__}: {problem}".splitlines()[0][:300]
            lines.append({"what": name, "state": "broken", "told": told, "fix": "install fastoss again, in a fresh .venv"})
        done.append(name)
        note()


if __name__ == "__main__":
    main()
