"""Edits of form: what is repaired, removed and hidden, nothing else, and nothing the second time."""

import ast
import json
import random
import sysconfig
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from clean_cases import ENGLISH, HINDI, clean, dropped, invented, report, source, texts, write_rows

from data.clean_config import PERSONAL, FormConfig
from data.clean_form import _SUSPECT, Form, _repaired
from data.clean_lines import CountLines, FindRepeated, repeated_lines
from data.clean_pii import is_card, is_iban, replace_personal

GERMAN = "Die Straße ist schön und groß; „für“ Ärzte – naïve Gäste mögen Öl…"
ENCODINGS = ("latin-1", "cp1252", "cp1250", "cp1251", "cp1253", "mac_roman", "cp437", "iso-8859-2")
WEB = Form("web", FormConfig())


def garbled(text: str, encoding: str) -> str:
    return text.encode().decode(encoding, errors="ignore")


def iban(country: str, account: str) -> str:
    """An account with check digits by ISO 7064's definition: 98 - (account, country as letters' numbers, 00) mod 97."""
    digits = "".join(str(ord(letter) - 55) for letter in country)
    return f"{country}{98 - int(account + digits + '00') % 97:02d}{account}"


def card(start: str) -> str:
    """The number with the only check digit that Luhn's sum allows, found by trying all ten."""

    def luhn(number: str) -> int:
        pairs = [int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(number))]
        return sum(sum(map(int, str(pair))) for pair in pairs) % 10

    (check,) = [digit for digit in "0123456789" if luhn(start + digit) == 0]
    return start + check


def test_text_that_was_read_in_another_encoding_is_repaired():
    for text in (GERMAN, "café — déjà vu", "Русский текст"):
        edited = Form("prose", FormConfig()).settle(garbled(text, "latin-1"))
        assert edited.text == unicodedata.normalize("NFC", text)
        assert edited.counts["mojibake"] == 1
        assert " -> " in edited.excerpts["mojibake"]


@pytest.mark.parametrize(
    "text",
    [GERMAN, HINDI, ENGLISH, "302 194 C2 Â LATIN CAPITAL", "Ελληνικά κείμενα", "中文文本", "à la carte, où ça", "é"],
)
def test_text_that_is_right_stays_as_it_is(text):
    edited = WEB.settle(text)
    assert (edited.text, dict(edited.counts)) == (text, {})


def test_the_quick_look_passes_over_no_text_that_the_repair_would_change():
    for text in (GERMAN, HINDI, "Ελληνικά κείμενα", "Русский текст", "naïve à côté"):
        for encoding in ENCODINGS:
            for broken in (garbled(text, encoding), garbled(text, encoding).replace("\xa0", " ")):
                assert _repaired(broken) == broken or _SUSPECT.search(broken), (encoding, broken)


def test_personal_data_give_way_to_placeholders_and_are_counted_by_kind():
    account, number = iban("DE", "370400440532013000"), card("453201511283036")
    text = (
        "Write to jane.doe+x@mail.org, call Tel.: 030/1234567 or +49 (0)30 1234567 or (555) 123-4567; pay to "
        f"{account} or {number[:4]} {number[4:8]} {number[8:12]} {number[12:]}; from 8.8.8.8 and 2001:4860:4860::8888. "
        "फ़ोन: 9876543210"
    )
    edited = WEB.settle(text)
    assert edited.text == (
        "Write to [EMAIL], call Tel.: [PHONE] or [PHONE] or [PHONE]; pay to [IBAN] or [CARD]; from [IP] and [IP]. "
        "फ़ोन: [PHONE]"
    )
    assert edited.counts == {
        "personal_email": 1, "personal_phone": 4, "personal_iban": 1, "personal_card": 1, "personal_ip": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "Mail me@example.com or root@localhost, clone git@github.com:a/b",
        "At 12:30:45 on 2024-01-02, version 8.8.4.4, host 192.168.0.1 and 127.0.0.1, std::vector::size",
        "See Section 9.2.1.3 (Abschnitt 8.4.2.1), networks 8.8.8.0/24, group 239.255.255.250, version 2.6.9.1",
        "10.3.1.2. Ein Hinweis",
        "ISBN 978-3-16-148410-0, order 1234567890123456, pi is 3.14159265358979323846, 2015 2016 2017",
        "mobile 2015 2016, the phone number of 1999, call 110, 1,234,567,890,123 people, +0100, C++11",
    ],
)
def test_what_only_looks_personal_stays(text):
    assert replace_personal(text, PERSONAL) == (text, {})


def test_an_account_or_card_is_personal_only_with_a_right_checksum():
    right, number = iban("DE", "500105175407324931"), card("37828224631000")
    assert not is_iban(iban("DE", "50010517540732493"))  # right digits, wrong length
    for place in range(2, len(right)):
        wrong = right[:place] + str((int(right[place]) + 1) % 10) + right[place + 1 :]
        assert is_iban(right)
        assert not is_iban(wrong)
    for place in range(2, len(number)):
        wrong = number[:place] + str((int(number[place]) + 1) % 10) + number[place + 1 :]
        assert is_card(number)
        assert not is_card(wrong)
    assert not is_card("9" * 16)


def test_no_excerpt_gives_away_what_was_hidden():
    edited = WEB.settle(f"{garbled('für Straße', 'latin-1')} e\u0301 jane.doe@mail.org and +49 30 1234567 end")
    assert edited.counts.keys() >= {"mojibake", "nfc", "personal_email", "personal_phone"}
    assert not any("jane" in excerpt or "1234567" in excerpt for excerpt in edited.excerpts.values())
    assert "[EMAIL]" in edited.excerpts["personal_email"]


BOILERPLATE = [
    "We use cookies to improve your experience.", "Diese Seite verwendet Cookies, um Inhalte zu zeigen.",
    "Please enable JavaScript to view this page.", "© 2024 Some Company", "All rights reserved.",
    "सर्वाधिकार सुरक्षित", "Skip to main content", "Weiterlesen", "Share on Facebook", "Log in or register",
    "Privacy Policy | Terms of Use | Contact", "Datenschutz | Impressum", "Home > News > Sports",
    "Subscribe to our newsletter", "Newsletter abonnieren", "Newsletter", "Copyright (c) 2020 The Authors",
    "Copyright 2019", "All cookies on our pages: please agree to them.",
]  # fmt: skip
PROSE = [
    "Cookies are baked at 180 degrees.", "JavaScript is a language that browsers run, and so do servers.",
    "He had to log in the forest to pay his debts before winter.", "The copyright-free works of the library are many.",
    "Wer JavaScript aktiviert hat, hat's leichter mit dem Klicken.", "Share your bread with the hungry, said the monk.",
    "Copyright law protects the expression of ideas, not the ideas themselves.",
    "Newsletter-Marketing ist ein wichtiger Teil der Werbung.", "Subscribe to channels was introduced by Queen Anne.",
    "Cookies are small files; sites agree to accept them.",
]  # fmt: skip


def test_lines_that_pages_carry_go_and_sentences_about_the_same_things_stay():
    text = "\n".join([BOILERPLATE[0], PROSE[0], *BOILERPLATE[1:], *PROSE[1:]])
    edited = WEB.settle(text)
    assert edited.text.split("\n") == PROSE
    assert edited.counts == {"boilerplate_line": len(BOILERPLATE)}
    assert Form("prose", FormConfig()).settle(text).text == text


def test_lines_that_many_documents_of_a_source_share_go_in_any_language(tmp_path):
    bodies = invented(30)
    menu = "मुख्य पृष्ठ समाचार खेल"
    write_rows(tmp_path / "in/a.jsonl", [f"{menu}\n{body}" for body in bodies[:20]] + bodies[20:])
    write_rows(tmp_path / "other/a.jsonl", [f"{body}\n{menu}" for body in invented(8, seed=3)])
    fields = {"rules": "web", "language": "de", "min_words": 1}
    sources = [source(tmp_path / "in", **fields), source(tmp_path / "other", "other", **fields)]
    corpus = clean(tmp_path / "run", *sources, form={"repeated_lines": 8}, heldout={"share": 1e-9})
    (first, other) = report(corpus)["funnel"]
    assert first["altered"]["repeated_line"] == {"documents": 20, "edits": 20}
    assert "repeated_line" not in other["altered"]  # eight documents are not more than eight


def test_counts_of_lines_add_up_over_shards_and_ranges(tmp_path):
    from datatrove.data import Document

    from stages.clean import Clean

    fields = source(tmp_path, rules="web")
    config = Clean.Config.model_validate({"kind": "clean", "sources": [fields]})
    for shard in range(3):
        rows = [Document(text=f"shared line\nonly {shard}\nshared line", id="1", metadata={"source": "tales"})] * 2
        list(CountLines(config.sources, config.form, tmp_path / "counts").run(rows, rank=shard))
    for limit, found in ((5, 1), (6, 0), (1, 4)):
        for rank in range(4):
            list(FindRepeated(tmp_path / "counts", tmp_path / str(limit), limit).run(rank=rank, world_size=4))
        assert len(repeated_lines(tmp_path / str(limit), "tales")) == found


def test_every_hash_is_in_one_range(tmp_path):
    edges = sorted({0, *(2**62 * part + shift for part in range(1, 4) for shift in (-1, 0)), 2**64 - 1})
    (tmp_path / "counts/tales").mkdir(parents=True)
    np.save(tmp_path / "counts/tales/00000.npy", np.array([[edge, 1] for edge in edges], np.uint64))
    for rank in range(4):
        list(FindRepeated(tmp_path / "counts", tmp_path / "found", 0).run(rank=rank, world_size=4))
    found = [np.load(path).tolist() for path in sorted((tmp_path / "found/tales").glob("*.npy"))]
    assert found == [edges[:2], edges[2:4], edges[4:6], edges[6:]]


def test_editing_an_edited_text_changes_nothing():  # trap T12
    draw = random.Random(5)
    pieces = [
        *BOILERPLATE, *PROSE, garbled(GERMAN, "latin-1"), garbled(HINDI, "cp1252"),
        garbled(garbled("für", "latin-1"), "latin-1"), "Tel.: 030 1234567", "a@b.de", "8.8.8.8", "+49 30 1234567",
        "\r\n", "\n", " ", "\ufeff", "e\u0301", "\u093c", "Ã", "©", "4532 0151 1283 0366",
        "[EMAIL]", "@", "Home >", "\u2028", "\xa0", "\t", ".",
    ]  # fmt: skip
    forms = [Form(rules, FormConfig()) for rules in ("web", "prose", "messages", "none", "code")]
    for _ in range(400):
        text = "".join(draw.choices(pieces, k=draw.randint(1, 12)))
        for form in forms:
            once = form.settle(text)
            assert once.settled, repr(text)
            again = form.settle(once.text)
            assert (again.text, dict(again.counts)) == (once.text, {}), repr(text)


def test_code_means_the_same_after_cleaning(tmp_path):  # trap T12
    form = Form("code", FormConfig(mojibake=["web"], boilerplate=["web"]))
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-e]*.py"))
    assert len(modules) > 20
    for path in modules:
        text = path.read_bytes().decode()
        edited = form.settle(text).text
        assert ast.dump(ast.parse(edited)) == ast.dump(ast.parse(text)), path.name
        assert edited.split("\n") == text.strip("\n").rstrip().split("\n")
    for damage in ('name = "e\u0301"', "# Copyright 2024, a@b.de, 8.8.8.8", 's = "Ã¼"\n\n# We use cookies'):
        assert form.settle(damage).text == damage


def test_altered_documents_are_counted_by_rule_and_source_with_samples(tmp_path):
    bodies = invented(20)
    write_rows(
        tmp_path / "in/a.jsonl", [*bodies[:10], *(f"{body} a{i}@b.de c@d.de" for i, body in enumerate(bodies[10:]))]
    )
    write_rows(tmp_path / "raw/a.jsonl", [f"{body} a@b.de" for body in invented(10, seed=8)])
    sources = [source(tmp_path / "in"), source(tmp_path / "raw", "raw", rules="none")]
    corpus = clean(tmp_path / "run", *sources)
    edited, untouched = report(corpus)["funnel"]
    assert edited["altered"] == {"personal_email": {"documents": 10, "edits": 20}}
    assert untouched["altered"] == {}
    samples = [one for one in report(corpus)["altered_samples"] if one["rule"] == "personal_email"]
    assert len(samples) == 3
    assert all("[EMAIL]" in one["text"] and "@" not in json.dumps(one) for one in samples)
    assert sum("@b.de" in text for text in texts(corpus)) == 10
    assert dropped(corpus) == {}
    page = (corpus / "funnel.html").read_text()
    assert "personal_email" in page
    assert "<script" not in page


def test_a_text_that_never_settles_is_dropped_by_name(tmp_path, monkeypatch):
    from data import clean_form

    monkeypatch.setattr(clean_form, "replace_personal", lambda text, kinds: (text + ".", {"personal_email": 1}))
    edited = Form("web", FormConfig()).settle(ENGLISH)
    assert not edited.settled
    write_rows(tmp_path / "in/a.jsonl", invented(5))
    write_rows(tmp_path / "code/a.jsonl", invented(5, seed=2))
    code = source(tmp_path / "code", "code", rules="none")
    with pytest.raises(ValueError, match="unsettled 5"):
        clean(tmp_path / "run", source(tmp_path / "in"), code)
