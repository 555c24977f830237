"""Personal data in text: found by form and, where there is one, by checksum; replaced by a placeholder.

E-mail addresses (not those of RFC 2606's example domains), telephone numbers (international, North American, or any
after a word such as ``Tel.``), public IP addresses, IBANs (ISO 13616: length by country, modulo 97) and payment cards
(ISO/IEC 7812: issuer, length, Luhn). A name or a postal address is not looked for: no pattern finds those.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable

from data.clean_config import PersonalKind

Found = Callable[["re.Match[str]"], bool]

PLACEHOLDERS: dict[PersonalKind, str] = {
    "email": "[EMAIL]",
    "phone": "[PHONE]",
    "ip": "[IP]",
    "iban": "[IBAN]",
    "card": "[CARD]",
}
ORDER: tuple[PersonalKind, ...] = ("iban", "card", "email", "ip", "phone")
"""The longest and surest first, so that no part of an account number is taken for a telephone's."""

IBAN_LENGTHS = {
    **{"AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "BY": 28},
    **{"CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18},
    **{"FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22},
    **{"IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20},
    **{"LU": 20, "LV": 21, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18, "NO": 15},
    **{"PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SC": 31, "SE": 24, "SI": 19},
    **{"SK": 24, "SM": 27, "ST": 25, "SV": 28, "TL": 23, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24, "XK": 20},
}
"""Characters of an IBAN by country (SWIFT's registry)."""

_EMAIL = re.compile(r"[\w.+%-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?![\w@-])")
_EXAMPLE = re.compile(
    r"(?:^|[@.])(?:example\.(?:com|net|org|edu)|example|invalid|test|localhost|local)$", re.IGNORECASE
)
_IP = re.compile(
    r"(?<![\w.:/-])(?:\d{1,3}(?:\.\d{1,3}){3}(?![\w-]|\.\d)|(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:]))"
)
_NUMBERED = re.compile(r"(?:versions?|release|v|section|sections|chapter|abschnitt|abschnitte|kapitel|§)\W*$", re.I)
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
_CARD = re.compile(r"(?<![\w.,/-])\d(?:[ -]?\d){11,18}(?![\w/-]|[.,]\d)")
_CARD_ISSUERS = (
    (r"4", (13, 16, 19)),
    (r"5[1-5]|2(?:22[1-9]|2[3-9]|[3-6]|7[01]|720)", (16,)),
    (r"3[47]", (15,)),
    (r"3(?:0[0-5]|[68])", (14,)),
    (r"6(?:011|4[4-9]|5)", (16, 19)),
    (r"35(?:2[89]|[3-8])", (16, 19)),
    (r"62|81", (16, 17, 18, 19)),
    (r"60|65|508", (16,)),
)
_ISSUED = [(re.compile(prefix), lengths) for prefix, lengths in _CARD_ISSUERS]
_LABEL = r"(?:tele(?:ph|f)on|telephone|phone|tel|fax|mobil(?:e|telefon)?|handy|fernruf|फ़?ोन|टेलीफ़?ोन|मोबाइल|दूरभाष)"
_PHONE = re.compile(
    r"(?<![\w+])\+[1-9](?:[\s./-]?\(?\d\)?){7,14}(?![\w@])"
    r"|(?<![\w(-])\(\d{3}\) ?\d{3}[ -]\d{4}(?![\w-])"
    r"|(?<![\w.-])\d{3}-\d{3}-\d{4}(?![\w-])"
    rf"|(?<!\w){_LABEL}(?:\s?(?:nr|no|number|nummer)\W{{0,3}}|[.:]{{1,2}}\s{{0,2}})"
    r"(?P<labelled>[\d(](?:[ ./-]?[\d()]){5,16})(?!\w)",
    re.IGNORECASE,
)
_LONG_NUMBER = re.compile(r"\d(?:[ -]?\d){11}")
_ACCOUNT = re.compile(r"[A-Z]{2}\d\d ?[A-Z0-9]{4}")
_PHONE_HINT = re.compile(r"\+[1-9]|\d{3}\)? ?[\d-]|\d[\d ()./-]{5}")


def replace_personal(text: str, kinds: Iterable[PersonalKind]) -> tuple[str, dict[str, int]]:
    """``text`` with placeholders, and how many by kind (``personal_email``); kinds without a hit are absent."""
    counts: dict[str, int] = {}
    wanted = set(kinds)
    for kind in ORDER:
        if kind not in wanted or not _HINTS[kind](text):
            continue
        text, found = _FINDERS[kind](text)
        if found:
            counts[f"personal_{kind}"] = found
    return text, counts


def _replacer(kind: PersonalKind, pattern: re.Pattern[str], fits: Found) -> Callable[[str], tuple[str, int]]:
    def replace(text: str) -> tuple[str, int]:
        found = 0

        def one(match: re.Match[str]) -> str:
            nonlocal found
            if not fits(match):
                return match[0]
            found += 1
            group = "labelled" if match.re.groupindex.get("labelled") and match["labelled"] else 0
            start, end = (edge - match.start() for edge in match.span(group))
            return match[0][:start] + PLACEHOLDERS[kind] + match[0][end:]

        return pattern.sub(one, text), found

    return replace


def _is_email(match: re.Match[str]) -> bool:
    user, _, domain = match[0].partition("@")
    return user != "git" and not _EXAMPLE.search(f"@{domain}")


def _is_public_ip(match: re.Match[str]) -> bool:
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:
        return False
    written = match[0].count(":") >= 3 if address.version == 6 else True
    return written and address.is_global and not address.is_multicast and not _is_numbering(match)


def _is_numbering(match: re.Match[str]) -> bool:
    """Whether it is a network, a version, or the number of a section or heading, and no machine's address."""
    before, after = match.string[max(0, match.start() - 16) : match.start()], match.string[match.end() :][:2]
    heading = not before.rpartition("\n")[2].strip() and after[:1] == "."
    return bool(_NUMBERED.search(before)) or (after[:1] == "/" and after[1:].isdecimal()) or heading


def is_iban(text: str) -> bool:
    """Whether length and check digits are right; spaces do not count."""
    plain = text.replace(" ", "")
    if len(plain) != IBAN_LENGTHS.get(plain[:2]):
        return False
    return int("".join(str(int(character, 36)) for character in plain[4:] + plain[:4])) % 97 == 1


def is_card(text: str) -> bool:
    """Whether issuer, length and check digit are right; spaces and hyphens do not count."""
    digits = [int(character) for character in text if character.isdecimal()]
    plain = "".join(map(str, digits))
    if len(set(digits)) == 1 or not any(len(plain) in lengths and prefix.match(plain) for prefix, lengths in _ISSUED):
        return False
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _is_phone(match: re.Match[str]) -> bool:
    digits = sum(character.isdecimal() for character in match["labelled"] or match[0])
    return 6 <= digits <= 15 if match["labelled"] else 8 <= digits <= 15


_FINDERS: dict[PersonalKind, Callable[[str], tuple[str, int]]] = {
    "email": _replacer("email", _EMAIL, _is_email),
    "ip": _replacer("ip", _IP, _is_public_ip),
    "iban": _replacer("iban", _IBAN, lambda match: is_iban(match[0])),
    "card": _replacer("card", _CARD, lambda match: is_card(match[0])),
    "phone": _replacer("phone", _PHONE, _is_phone),
}
_HINTS: dict[PersonalKind, Callable[[str], object]] = {
    "email": lambda text: "@" in text,
    "ip": lambda text: text.count(".") > 2 or text.count(":") > 2,
    "iban": _ACCOUNT.search,
    "card": _LONG_NUMBER.search,
    "phone": _PHONE_HINT.search,
}
"""Cheap looks that most texts do not pass."""
