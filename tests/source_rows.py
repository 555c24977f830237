"""Rows of the schemas that the catalogue's data sets have, in made-up words, laid out in files as on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def write_parquet(path: Path, rows: list[Row]) -> Path:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def write_jsonl(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def fineweb_edu(number: int, score: float, language_score: float = 0.97) -> Row:
    return {
        "text": f"Page {number} about rivers.", "id": f"<urn:uuid:{number}>", "dump": "CC-MAIN-2024-10",
        "url": f"https://example.org/{number}", "file_path": "s3://bucket/a.warc.gz", "language": "en",
        "language_score": language_score, "token_count": 5, "score": score, "int_score": round(score),
    }  # fmt: skip


def fineweb_2(number: int, text: str, language: str, script: str) -> Row:
    return {
        "text": text, "id": f"<urn:uuid:{number}>", "dump": "CC-MAIN-2023-14", "url": f"https://example.org/{number}",
        "date": "2023-03-20T00:00:00Z", "file_path": "s3://bucket/b.warc.gz", "language": language,
        "language_score": 0.99, "language_script": script, "minhash_cluster_size": 1, "top_langs": "{}",
    }  # fmt: skip


def medqa(number: int, options: dict[str, str]) -> Row:
    answer = sorted(options)[-1]
    return {
        "question": f"Question {number}?", "answer": options[answer], "options": options, "meta_info": "step1",
        "answer_idx": answer, "metamap_phrases": ["fever", "cough"],
    }  # fmt: skip


def wikipedia(number: int) -> Row:
    return {"id": str(number), "url": f"https://example.org/w/{number}", "title": f"Place {number}", "text": "A town."}


def card(configs: dict[str, str]) -> str:
    """A data set card that says which files each configuration has: ``{name: glob}``."""
    lines = [
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {path}" for name, path in configs.items()
    ]
    return "---\nconfigs:\n" + "\n".join(lines) + "\n---\n# Card\n"


def fineweb_edu_repository(folder: Path) -> Path:
    """Two files of four rows each under ``sample/100BT``, and one of the whole set."""
    for file in range(2):
        rows = [fineweb_edu(4 * file + n, 2.6 + n / 2, 0.5 + n / 10) for n in range(4)]
        write_parquet(folder / f"sample/100BT/00{file}_00000.parquet", rows)
    write_parquet(folder / "data/CC-MAIN-2024-10/000.parquet", [fineweb_edu(99, 3.0)])
    (folder / "README.md").write_text(card({"default": "data/*/*", "sample-100BT": "sample/100BT/*"}))
    return folder


def fineweb_2_repository(folder: Path) -> Path:
    texts = {"deu_Latn": ("deu", "Latn", "Ein Fluss im Süden."), "hin_Deva": ("hin", "Deva", "एक छोटी नदी।")}
    for subset, (language, script, text) in texts.items():
        write_parquet(
            folder / f"data/{subset}/train/000.parquet", [fineweb_2(n, text, language, script) for n in (1, 2)]
        )
        write_parquet(folder / f"data/{subset}/test/000.parquet", [fineweb_2(9, "test rows", language, script)])
    (folder / "README.md").write_text(card({subset: f"data/{subset}/train/*" for subset in texts}))
    return folder


def medqa_repository(folder: Path) -> Path:
    rows = [medqa(1, {"A": "Iron", "B": "Zinc"}), medqa(2, {"A": "Rest", "B": "Heat", "C": "Ice"})]
    write_jsonl(folder / "phrases_no_exclude_train.jsonl", rows)
    write_jsonl(folder / "phrases_no_exclude_test.jsonl", [medqa(9, {"A": "No", "B": "Never"})])
    return folder


def wikipedia_repository(folder: Path) -> Path:
    for language in ("en", "de", "hi"):
        write_parquet(folder / f"20231101.{language}/train-00000-of-00001.parquet", [wikipedia(n) for n in (1, 2)])
    (folder / "README.md").write_text(card({f"20231101.{name}": f"20231101.{name}/*" for name in ("en", "de", "hi")}))
    return folder
