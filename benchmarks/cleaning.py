"""Megabytes of text a second on one core: our form, rules and content pass, and datatrove's own filters, on one text.

    python benchmarks/cleaning.py --text a-de.txt b-en.txt --code FOLDER

Documents stand between blank lines; the language is the file's last part (``de``, ``en``, ``hi``). Both sides see the
same documents in this process, one after another, timed by the processor's clock; each part is timed by itself over all
documents, so that no part profits from what an earlier one dropped. datatrove's filters split words as they ship, by
spaCy's blank tokenizer (or the Indic library's) where that is installed; a second row gives them our splitter. Of a
folder of Python our code rules are measured alone, since datatrove has none.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from record import RESULTS, table, write_result

Check = Callable[[str], object]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--code", type=Path, help="a folder of Python, whose tests are left out")
    parser.add_argument("--megabytes", type=float, default=4, help="read at most so much of each file")
    parser.add_argument("--result", type=Path, default=RESULTS / "cleaning.json")
    arguments = parser.parse_args(argv)
    rows = [row for path in arguments.text for row in measure_text(path, arguments.megabytes)]
    if arguments.code:
        rows += measure("python", code_documents(arguments.code, arguments.megabytes), our_parts("code"))
    print(table(rows))
    settings = {"megabytes": arguments.megabytes, "files": [path.name for path in arguments.text]}
    write_result(arguments.result, rows, settings | {"libraries": libraries()})
    return 0


def measure_text(path: Path, megabytes: float) -> Iterable[dict[str, Any]]:
    """A row a part, ours and the library's, over one file of documents."""
    from data.clean_form import normalise

    language = path.stem.rpartition("-")[2] if "-" in path.stem else "en"
    text = path.read_bytes()[: int(megabytes * 1e6)].decode(errors="ignore")
    documents = [document for block in text.split("\n\n") if (document := normalise(block))]
    return measure(path.stem, documents, [*our_parts(language), *library_parts(language)])


def code_documents(folder: Path, megabytes: float) -> list[str]:
    """Python files of ``folder`` without its tests, in order of their paths, up to so much text."""
    documents, left = [], megabytes * 1e6
    for path in sorted(folder.rglob("*.py")):
        if left > 0 and not {"test", "tests", "site-packages"} & set(path.parts):
            documents.append(path.read_text(encoding="utf-8", errors="replace"))
            left -= len(documents[-1].encode())
    return documents


def measure(name: str, documents: list[str], parts: list[tuple[str, str, Check]]) -> Iterable[dict[str, Any]]:
    """A row a part over the same documents."""
    size = sum(len(document.encode()) for document in documents) / 1e6
    for side, part, check in parts:
        for document in documents[:200]:  # models and tables are loaded before the clock runs
            check(document)
        started = time.process_time()
        for document in documents:
            check(document)
        seconds = time.process_time() - started
        yield {
            "text": name, "documents": len(documents), "megabytes": round(size, 2), "side": side, "part": part,
            "seconds": round(seconds, 2), "megabytes_per_s": round(size / seconds, 2),
        }  # fmt: skip


def libraries() -> dict[str, str]:
    """Versions of what is measured beside ours; a splitter that is not installed is absent."""
    found = {}
    for name in ("datatrove", "spacy", "indic-nlp-library"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def our_parts(language: str) -> list[tuple[str, str, Check]]:
    """The steps of the ``filter`` pass for web text, or for code, each alone and all in one."""
    from datatrove.data import Document

    from data.clean_config import FormConfig
    from data.clean_form import Form
    from data.rules import rules_of
    from data.source_config import FilesSource, RuleSet

    fields = {"name": "a", "licence": "none", "include": ["*"], "path": ".", "language": language, "type": "files"}
    kind: RuleSet = "code" if language == "code" else "web"
    form = Form(kind, FormConfig())

    def judged(threshold: float) -> Check:
        source = FilesSource.model_validate({**fields, "rules": kind, "language_threshold": threshold})
        rules = rules_of(source)

        def check(text: str) -> object:
            document = Document(text=text, id="1")
            return next((found for rule in rules if (found := rule(document))), None)

        return check

    rules, with_language = judged(0), judged(0.05)
    whole: Check = lambda text: with_language(form.settle(text).text)  # noqa: E731
    if kind == "code":
        return [
            ("pedigree", "form (line ends)", form.settle),
            ("pedigree", "code rules", rules),
            ("pedigree", "all in one pass", whole),
        ]
    return [
        ("pedigree", "form (NFC, mojibake, boilerplate, personal data)", form.settle),
        ("pedigree", "web rules", rules),
        ("pedigree", "web rules, language", with_language),
        ("pedigree", "all in one pass", whole),
    ]


def library_parts(language: str) -> list[tuple[str, str, Check]]:
    """The same rules by datatrove's own filters, with its own splitter where that is installed, and with ours."""
    from datatrove.pipeline.formatters import PIIFormatter

    from data.rules import Words

    class Forgetful(Words):
        def word_tokenize(self, text: str) -> list[str]:
            from data.words import words_and_signs

            return words_and_signs(text)

    tags = {"en": "eng_Latn", "de": "deu_Latn", "hi": "hin_Deva"}
    parts = [("datatrove", "web rules, our splitter", filters(Forgetful()))]
    try:
        own = filters(tags[language])
        own("A sentence to load the splitter with.")
        parts.insert(0, ("datatrove", "web rules, its own splitter", own))
    except ImportError as error:
        print(f"datatrove's own splitter for {language} is not measured: {' '.join(str(error).split())[:120]}")
    return [*parts, ("datatrove", "e-mail and IP formatter", PIIFormatter().format)]


def filters(language: Any) -> Check:
    """FineWeb, Gopher quality and Gopher repetition, the first that objects ends it."""
    from datatrove.data import Document
    from datatrove.pipeline.filters import FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter

    blocks = [
        FineWebQualityFilter(language=language),
        GopherQualityFilter(language=language, min_doc_words=5, min_stop_words=0),
        GopherRepetitionFilter(language=language),
    ]

    def check(text: str) -> object:
        document = Document(text=text, id="1")
        return next((found for block in blocks if (found := block.filter(document)) is not True), None)

    return check


if __name__ == "__main__":
    raise SystemExit(main())
