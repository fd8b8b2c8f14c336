"""OpenAI's own gpt-oss tokenizer, built offline from its ranks.

The ranks (`o200k_base.tiktoken`, packed) travel in the package. OpenAI's tiktoken encodes with them: three to five times
as fast as the `tokenizers` library, with the same result. Out of the same ranks comes the very `tokenizer.json` that
openai/gpt-oss-20b publishes, proven by its sha256, for the libraries that want that file.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import lzma
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from fastoss.errors import FastossError
from fastoss.run import cache_folder, file_lock, write_whole

if TYPE_CHECKING:
    from tiktoken import Encoding
    from tokenizers import Tokenizer

TOKENIZER_SHA256 = "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3"
RANKS_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
TEMPLATE_SHA256 = "a4c9919cbbd4acdd51ccffe22da049264b1b73e59055fa58811a99efbd7c8146"

# Ids of the control tokens (openai/gpt-oss-20b, tokenizer.json).
START_OF_TEXT, END_OF_TEXT, RETURN, CONSTRAIN, CHANNEL = 199998, 199999, 200002, 200003, 200005
START, END, MESSAGE, CALL = 200006, 200007, 200008, 200012
PAD = END_OF_TEXT
STOP_IDS = (RETURN, END_OF_TEXT, CALL)

SPECIAL = {
    START_OF_TEXT: "<|startoftext|>", END_OF_TEXT: "<|endoftext|>", RETURN: "<|return|>", CONSTRAIN: "<|constrain|>",
    CHANNEL: "<|channel|>", START: "<|start|>", END: "<|end|>", MESSAGE: "<|message|>", CALL: "<|call|>", 200018: "<|endofprompt|>",
}  # fmt: skip

# How o200k cuts text into words before BPE (tiktoken, openai_public.py).
_UPPER, _LOWER, _ENDINGS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_PATTERN = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


# tiktoken's regular expressions panic on about a million spaces in a row; `tokenizers` encodes such texts as well.
_LONG_SPACE = re.compile(r"\s{50000}")


def encode(text: str) -> list[int]:
    """Ids of ordinary text: `<|end|>` in it never becomes a control token."""
    if len(text) > 50_000 and _LONG_SPACE.search(text):
        ids: list[int] = _slow_tokenizer().encode(text, add_special_tokens=False).ids
        return ids
    return _encoding().encode_ordinary(text)


def decode(ids: Iterable[int]) -> str:
    """Text of ids, control tokens spelled out; bytes that are no UTF-8 become U+FFFD."""
    return b"".join(map(token_bytes, ids)).decode("utf-8", "replace")


def token_bytes(token_id: int) -> bytes:
    """The bytes of one token; empty for ids that the model knows and the tokenizer does not (200,019 and up)."""
    try:
        return _encoding().decode_single_token_bytes(token_id)
    except KeyError:
        return b""


@functools.cache
def _encoding() -> Encoding:
    from tiktoken import Encoding

    special = {SPECIAL.get(id, f"<|reserved_{id}|>"): id for id in range(199998, 200019)}
    return Encoding("o200k_harmony", pat_str=_PATTERN, mergeable_ranks=_ranks(), special_tokens=special)


@functools.cache
def _slow_tokenizer() -> Tokenizer:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file()))
    tokenizer.encode_special_tokens = True
    return tokenizer


def tokenizer_file() -> Path:
    """Path of `tokenizer.json` in the cache, built when it is missing or damaged. Safe when two processes ask at once."""
    path = cache_folder() / f"tokenizer-{TOKENIZER_SHA256[:12]}.json"
    if not _is_intact(path):
        with file_lock(path.with_suffix(".lock")):
            if not _is_intact(path):
                write_whole(path, _build())
    return path


def chat_template() -> str:
    """The official Jinja chat template of openai/gpt-oss-20b."""
    return resources.files("fastoss.assets").joinpath("chat_template.jinja").read_text(encoding="utf-8")


def _is_intact(path: Path) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == TOKENIZER_SHA256


def _build() -> bytes:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE

    ranks = _ranks()
    letters = _byte_letters()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocabulary = {spelled(token): rank for token, rank in ranks.items()}
    merges = []
    for token in ranks:  # in the order of rank, which is the order of merging
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = [(left, right) for left, right in cuts if left in ranks and right in ranks]
        pairs.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(spelled(left), spelled(right)) for left, right in pairs]

    tokenizer = Tokenizer(BPE(vocabulary, merges, fuse_unk=False, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated", invert=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    names = [SPECIAL.get(id, f"<|reserved_{id}|>") for id in range(199998, 200019)]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    content = tokenizer.to_str(pretty=True).encode()
    if hashlib.sha256(content).hexdigest() != TOKENIZER_SHA256:
        hint = "install the pinned version of the `tokenizers` library"
        raise FastossError("the tokenizer that was built is not the published one", place="tokenizer.json", hint=hint)
    return content


def _ranks() -> dict[bytes, int]:
    packed = resources.files("fastoss.assets").joinpath("o200k_base.tiktoken.xz").read_bytes()
    plain = lzma.decompress(packed)
    assert hashlib.sha256(plain).hexdigest() == RANKS_SHA256, "the shipped tokenizer ranks are damaged"
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in plain.splitlines())}


def _byte_letters() -> dict[int, str]:
    """The byte-level alphabet of GPT-2: printable bytes stand for themselves, the others for letters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(256 + index) for index, byte in enumerate(others)}
