"""Data sets that a recipe can name: ``{entry: fineweb-edu}`` stands for a whole source, and any field may be set anew.

Each is pinned to a commit of the Hugging Face hub. With ``path``, the same rows are read from one's own copy of its
files. What an entry gives is written into the stage's config as if the recipe had said it, so that changing an entry
changes the key, and an artifact tells what it was made from without this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_WEB_LICENCE = "ODC-By 1.0, Common Crawl terms of use"
_WIKIPEDIA_LICENCE = "CC BY-SA 3.0 and GFDL (Wikipedia contributors)"
_FINEWEB_EDU = {"repository": "HuggingFaceFW/fineweb-edu", "revision": "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"}
_FINEWEB_2 = {"repository": "HuggingFaceFW/fineweb-2", "revision": "af9c13333eb981300149d5ca60a8e9d659b276b9"}
_WIKIPEDIA = {"repository": "wikimedia/wikipedia", "revision": "b04c8d1ceb2f5cd4588862100d08de323dccfbaa"}
_MEDQA = {"repository": "GBaker/MedQA-USMLE-4-options", "revision": "0fb93dd23a7339b6dcd27e241cb9b5eca62d4d18"}

PARQUET = ["**/*.parquet"]


def _fineweb_2(language: str, subset: str) -> dict[str, Any]:
    # Filtered and deduplicated by those who made it, so no rules of ours; the test split is left to its readers.
    return {
        **_FINEWEB_2, "subset": subset, "language": language, "domain": "web", "licence": _WEB_LICENCE,
        "rules": "none", "include": PARQUET, "exclude": ["**/test"],
    }  # fmt: skip


def _wikipedia(language: str) -> dict[str, Any]:
    return {
        **_WIKIPEDIA, "subset": f"20231101.{language}", "language": language, "domain": "encyclopedia",
        "licence": _WIKIPEDIA_LICENCE, "rules": "prose", "template": "{title}\n\n{text}", "title": "title",
        "include": PARQUET,
    }  # fmt: skip


ENTRIES: dict[str, dict[str, Any]] = {
    # Rows: text, id, dump, url, file_path, language, language_score, token_count, score, int_score (3 and more).
    "fineweb-edu": {
        **_FINEWEB_EDU, "subset": "sample-100BT", "language": "en", "domain": "web", "licence": _WEB_LICENCE,
        "rules": "none", "include": PARQUET,
    },
    # Rows: text, id, dump, url, date, file_path, language, language_score, language_script, minhash_cluster_size, ...
    "fineweb2-de": _fineweb_2("de", "deu_Latn"),
    "fineweb2-hi": _fineweb_2("hi", "hin_Deva"),
    # Rows: question, answer, options (a mapping of letters), meta_info, answer_idx, metamap_phrases.
    "medqa": {
        **_MEDQA, "language": "en", "domain": "medicine", "licence": "CC BY 4.0", "rules": "none",
        "template": "{question}\n{options}\nAnswer: {answer_idx}. {answer}", "include": ["**/*train*.jsonl*"],
    },
    # Rows: id, url, title, text.
    "wikipedia-en": _wikipedia("en"),
    "wikipedia-de": _wikipedia("de"),
    "wikipedia-hi": _wikipedia("hi"),
}  # fmt: skip
"""What each entry stands for; ``include`` and ``exclude`` are for copies on disk, the hub's fields for the hub."""

_HUB_ONLY = {"repository", "revision", "subset", "hub_split", "max_documents", "streaming"}
_FILES_ONLY = {"include", "exclude"}


def resolve_entry(raw: Any) -> Any:
    """``raw`` with ``entry`` replaced by what it stands for; anything else comes back as it is.

    A source with ``path`` becomes a ``files`` source, any other a ``hub`` source; the name is the entry's unless one is
    given. Raises ``ValueError`` for an unknown entry, or a ``type`` that does not fit.
    """
    if not isinstance(raw, Mapping) or "entry" not in raw:
        return raw
    given = {key: value for key, value in raw.items() if key != "entry"}
    name = raw["entry"]
    if name not in ENTRIES:
        raise ValueError(f"entry must be one of {', '.join(ENTRIES)}; got {name!r}; set one of them")
    kind = "files" if "path" in given else "hub"
    if given.get("type", kind) != kind:
        raise ValueError(f"type must be left out beside entry; got {given['type']!r}; set path to read one's own copy")
    unfit = _HUB_ONLY if kind == "files" else _FILES_ONLY
    return {"name": name, **{key: value for key, value in ENTRIES[name].items() if key not in unfit}, **given,
            "type": kind}  # fmt: skip


class EntrySchema:
    """Tells editors that a source may be written with ``entry`` in place of its other fields."""

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        """The source's own schema, or an object with an entry."""
        entry = {
            "type": "object",
            "required": ["entry"],
            "properties": {
                "entry": {
                    "enum": list(ENTRIES),
                    "description": "A data set of data/catalogue.py; any field may be set anew beside it.",
                }
            },
        }
        return {"anyOf": [handler(core_schema), entry]}
