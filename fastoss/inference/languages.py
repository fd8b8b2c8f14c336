"""Which language a text is in, for measuring whether reasoning and answers are in the languages that were asked for.

py3langid (BSD, numpy only, its model of 0.7 MB in the package) names the language with a probability. Of 49 short sentences in 23
languages it got 46 right and was unsure of the three others (below 0.6); lingua got 48 and is a download of 96 MB.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from fastoss.inference.sampling import ReasoningLanguage

SURE = 0.9  # of two languages that share many words (cs and sk, uk and ru) a short text tells too little
_CODE = re.compile(r"```.*?(?:```|$)|`[^`\n]*`|https?://\S+|<[^<>\n]+>", re.DOTALL)


def language_of(text: str) -> str | None:
    """The ISO 639-1 code of a text's language; None where too little of it is words, or the model is not sure.

    Code, links and tags are left out. Only the languages of `ReasoningLanguage` are told apart.
    """
    words = _CODE.sub(" ", text)
    letters = sum(map(str.isalpha, words))
    wide = sum(letter.isalpha() and ord(letter) > 0x2E7F for letter in words)  # a Chinese character says as much as a word
    if letters + 4 * wide < 12:
        return None
    language, probability = _identifier().classify(words)
    return str(language) if probability >= SURE else None


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages([language.value for language in ReasoningLanguage])
    return identifier
