"""Keys and values of earlier turns: the engine takes the cache that a prompt begins with, so that a chat's history is not computed again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class _Kept:
    tuned: bool
    ids: list[int]  # the tokens whose keys and values the cache holds
    cache: Any


class PrefixCaches:
    """A few chats' caches, the latest last. Kept for a whole reply, cut back to what a new prompt shares with it.

    gpt-oss's sliding layers usually throw keys away that have left their window; a cache cut back would lack them. So every
    layer keeps all keys (the mask still hides them), at 49 kB a token for gpt-oss-20b in bf16, and cutting is exact.
    """

    def __init__(self, chats: int = 4, tokens: int = 32_768):
        self.chats, self.tokens = chats, tokens
        self._kept: list[_Kept] = []

    def take(self, prompt: Sequence[int], tuned: bool) -> tuple[Any, int]:
        """A cache that holds the beginning of `prompt`, and how many of its tokens; it belongs to the caller until `keep`."""
        from transformers import DynamicCache

        best, shared = None, 0
        for kept in reversed(self._kept):
            length = _shared(kept.ids, prompt)
            # Another chat that begins alike (the same system text) keeps its own: it would be cut back to that.
            if kept.tuned == tuned and length > shared and 2 * length >= len(kept.ids):
                best, shared = kept, length
        shared = min(shared, len(prompt) - 1)  # the last token is computed: its logits are wanted
        if best is None or shared < 1:
            return DynamicCache(), 0
        self._kept.remove(best)
        if shared < len(best.ids):
            best.cache.crop(shared - len(best.ids))
        return best.cache, shared

    def keep(self, ids: Sequence[int], cache: Any, tuned: bool) -> None:
        """Keep a cache after a reply; `ids` are the prompt and what was sampled. The oldest go where there are too many."""
        held = cache.get_seq_length()
        if not 0 < held <= len(ids):
            return
        self._kept.append(_Kept(tuned, list(ids[:held]), cache))
        while len(self._kept) > self.chats or (self._kept and sum(len(kept.ids) for kept in self._kept) > self.tokens):
            del self._kept[0]

    def clear(self) -> None:
        self._kept.clear()


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))
