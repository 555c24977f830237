"""Tables that facts are made of: countries from countryinfo, names in several languages from Babel's CLDR data."""

from __future__ import annotations

import dataclasses
import json
import pickle
import unicodedata
from pathlib import Path
from typing import Any

from data.errors import DataError

LANGUAGES = ("en", "de", "hi")
_NEEDED = ("territories", "languages", "currency_names", "time_zones", "days", "months")


@dataclasses.dataclass(frozen=True)
class Country:
    """One country: ISO 3166 ``code``, English ``capital``, ``continent`` as UN M49 code, ISO 639 ``languages``.

    ``currencies`` are ISO 4217 codes; ``subregion`` is the part of the continent in English, empty where unknown.
    """

    code: str
    capital: str
    continent: str
    languages: tuple[str, ...]
    currencies: tuple[str, ...]
    population: int
    subregion: str = ""


@dataclasses.dataclass(frozen=True)
class Names:
    """Names in one language by code: territories and continents, languages, currencies, cities by English name.

    ``days`` go from Monday, ``months`` from January.
    """

    territories: dict[str, str]
    languages: dict[str, str]
    currencies: dict[str, str]
    cities: dict[str, str]
    days: tuple[str, ...] = ()
    months: tuple[str, ...] = ()


_CONTINENTS = {"Africa": "002", "Americas": "019", "Asia": "142", "Europe": "150", "Oceania": "009"}


def read_countries(package: Path) -> list[Country]:
    """Countries of an unpacked countryinfo with a capital and a population, the most populous first.

    Raises:
        DataError: when the folder is no countryinfo.
    """
    files = sorted((package / "countryinfo" / "data").glob("*.json"))
    if not files:
        raise DataError([("countries", f"must be the package countryinfo; got {package.name}; set its name and hash")])
    found: dict[str, Country] = {}
    for path in files:
        row = json.loads(path.read_text(encoding="utf-8"))
        code, continent = row.get("ISO", {}).get("alpha2"), _CONTINENTS.get(row.get("region", ""))
        if code and continent and isinstance(row.get("capital"), str) and row["capital"] and row.get("population"):
            lists = tuple(row.get("languages") or ()), tuple(row.get("currencies") or ())
            found.setdefault(code, Country(
                code, row["capital"], continent, *lists, int(row["population"]), str(row.get("subregion") or "")
            ))  # fmt: skip
    return sorted(found.values(), key=lambda country: (-country.population, country.code))


def read_names(package: Path) -> dict[str, Names]:
    """Names of an unpacked Babel by language of ``LANGUAGES``.

    Raises:
        DataError: when the folder is no Babel, or a table holds anything but plain data.
    """
    folder = package / "babel" / "locale-data"
    tables = {language: _read_table(folder / f"{language}.dat") for language in LANGUAGES}
    zones = sorted({zone for table in tables.values() for zone in table["time_zones"]})
    return {
        language: Names(
            _plain(table["territories"]), _plain(table["languages"]), _plain(table["currency_names"]),
            {_city(zone): table["time_zones"].get(zone, {}).get("city", _city(zone)) for zone in zones if "/" in zone},
            _in_order(table["days"]), _in_order(table["months"]),
        )
        for language, table in tables.items()
    }  # fmt: skip


def folded(name: str) -> str:
    """A name without accents, as time zones spell cities."""
    return "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))


def _in_order(table: Any) -> tuple[str, ...]:
    """Wide names by their number, the lowest first."""
    wide = table["format"]["wide"]
    return tuple(unicodedata.normalize("NFC", wide[number]) for number in sorted(wide))


def _city(zone: str) -> str:
    """``America/Mexico_City`` stands for ``Mexico City``; CLDR translates the city only where it differs."""
    return zone.rsplit("/", 1)[-1].replace("_", " ")


def _plain(table: Any) -> dict[str, str]:
    return {str(code): unicodedata.normalize("NFC", name) for code, name in table.items() if isinstance(name, str)}


class _Inert:
    """Stands in for the classes that a table mentions and that facts do not need; it keeps and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _PlainUnpickler(pickle.Unpickler):
    """Babel ships its tables pickled; nothing is imported or called for them, whatever they name (TRAPS O3)."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "babel":
            return _Inert
        raise DataError([("names", f"must be plain tables; got a pickle that names {module}.{name}; do not use it")])


def _read_table(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError([("names", f"must be the package Babel; {path.name} is missing; set its name and hash")])
    with path.open("rb") as file:
        table = _PlainUnpickler(file).load()
    if not isinstance(table, dict) or any(name not in table for name in _NEEDED):
        raise DataError([("names", f"must hold {', '.join(_NEEDED)}; {path.name} does not; set a version that does")])
    return table
