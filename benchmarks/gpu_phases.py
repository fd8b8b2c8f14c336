"""The phases of `gpu_checks.py` in their order: what must work first, then what is measured.

Nothing here has a result until `benchmarks/results/` holds a card's files; the dry run proves the script, not the card.
"""

from __future__ import annotations

import gpu_commands
import gpu_contest
import gpu_table
import gpu_training as training
from gpu_common import Phase
from gpu_profile import card, profile

PHASES = (
    Phase("tests", training.gpu_tests, 8),
    Phase("card", card, 2),
    Phase("tiny-unsloth", training.tiny_unsloth, 5, "unsloth"),
    Phase("tiny-transformers", training.tiny_transformers, 4, "trl"),
    Phase("make-mxfp4-20b", training.make_mxfp4, 6),
    Phase("mxfp4-20b-unsloth-2k", training.mxfp4_unsloth_2k, 8, "unsloth"),
    Phase("mxfp4-20b-unsloth-8k", training.mxfp4_unsloth_8k, 8, "unsloth", larger=True),
    Phase("bf16-20b-transformers", training.bf16_transformers, 8, "trl"),
    *gpu_contest.phases(),
    *gpu_commands.phases(),
    Phase("profile", profile, 6, "unsloth"),
    Phase("table", gpu_table.table, 1),
    # Last: it writes 42 GB for them.
    Phase("4bit-20b-unsloth-2k", training.four_bits_unsloth_2k, 8),
    Phase("4bit-20b-unsloth-8k", training.four_bits_unsloth_8k, 8, larger=True),
    Phase("4bit-20b-unsloth-32k", training.four_bits_unsloth_32k, 8, larger=True),
)
