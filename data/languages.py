"""Which codes are languages: ISO 639-1's two letters are checked, three letters (ISO 639-3) are taken at their word."""

from __future__ import annotations

import difflib
from typing import Annotated

from pydantic import AfterValidator, Field

ISO_639_1 = frozenset(
    """
    aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en
    eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv
    ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne
    ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg sh si sk sl sm sn so sq sr ss
    st su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu
    """.split()
)
"""The two-letter codes of ISO 639-1, withdrawn ``bh`` and ``sh`` among them."""
CODE = "code"
"""What stands in a language's place where the text is a program."""
_USUAL_MISTAKES = {"cn": "zh", "jp": "ja", "kr": "ko", "gr": "el", "cz": "cs", "dk": "da", "gb": "en", "us": "en",
                   "in": "hi", "ua": "uk", "il": "he", "vn": "vi"}  # fmt: skip


def checked(language: str) -> str:
    """``language``, when it may be one.

    Raises:
        ValueError: for two letters that are no code of ISO 639-1, naming the nearest that is.
    """
    if len(language) != 2 or language in ISO_639_1:
        return language
    near = _USUAL_MISTAKES.get(language)
    # Of two letters nearly any code shares one, which says nothing; swapped ones do.
    near = near or next(iter(difflib.get_close_matches(language, ISO_639_1 & {language[::-1]}, n=1, cutoff=0)), None)
    way = f"did you mean {near!r}?" if near else "set for example en, de or hi"
    raise ValueError(f"must be a language of ISO 639-1, or three letters of ISO 639-3; got {language!r}; {way}")


Language = Annotated[str, Field(pattern=r"^[a-z]{2,3}$"), AfterValidator(checked)]
"""A language's code."""
LanguageOrCode = Annotated[str, Field(pattern=r"^([a-z]{2,3}|code)$"), AfterValidator(checked)]
"""A language's code, or ``code``."""
