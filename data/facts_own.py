"""General facts written for this repository (Apache-2.0) in English, German and Hindi: no text of others.

A row is ``(kin, english, german, hindi)``, each a ``(subject, answer)`` as the prompt of ``data.facts`` takes it, or
none where the language has no fair one. Rows of one ``kin`` are close to each other: their answers are hard to tell
apart.
"""

from __future__ import annotations

from typing import NamedTuple

Pair = tuple[str, str] | None


class Row(NamedTuple):
    """One fact in up to three languages."""

    kin: str
    en: Pair
    de: Pair
    hi: Pair


NAME, VERSION, LICENCE = "own facts", "1", "Apache-2.0"

OPPOSITES = (
    Row("measure", ("big", "small"), ("groß", "klein"), ("बड़ा", "छोटा")),
    Row("measure", ("high", "low"), ("hoch", "niedrig"), ("ऊँचा", "नीचा")),
    Row("measure", ("long", "short"), ("lang", "kurz"), None),
    Row("measure", ("thick", "thin"), ("dick", "dünn"), ("मोटा", "पतला")),
    Row("measure", ("wide", "narrow"), ("breit", "schmal"), ("चौड़ा", "संकरा")),
    Row("measure", ("deep", "shallow"), ("tief", "flach"), ("गहरा", "उथला")),
    Row("measure", ("heavy", "light"), ("schwer", "leicht"), ("भारी", "हल्का")),
    Row("measure", ("full", "empty"), ("voll", "leer"), ("भरा", "खाली")),
    Row("measure", ("near", "far"), ("nah", "fern"), ("पास", "दूर")),
    Row("touch", ("hot", "cold"), ("heiß", "kalt"), ("गरम", "ठंडा")),
    Row("touch", ("wet", "dry"), ("nass", "trocken"), ("गीला", "सूखा")),
    Row("touch", ("hard", "soft"), ("hart", "weich"), ("कठोर", "कोमल")),
    Row("touch", ("clean", "dirty"), ("sauber", "schmutzig"), ("साफ़", "गंदा")),
    Row("touch", ("sweet", "sour"), ("süß", "sauer"), ("मीठा", "कड़वा")),
    Row("touch", ("bright", "dark"), ("hell", "dunkel"), ("प्रकाश", "अंधकार")),
    Row("touch", ("loud", "quiet"), ("laut", "leise"), None),
    Row("state", ("fast", "slow"), ("schnell", "langsam"), ("तेज़", "धीमा")),
    Row("state", ("old", "new"), ("alt", "neu"), ("पुराना", "नया")),
    Row("state", ("rich", "poor"), ("reich", "arm"), ("अमीर", "गरीब")),
    Row("state", ("strong", "weak"), ("stark", "schwach"), ("मज़बूत", "कमज़ोर")),
    Row("state", ("open", "closed"), ("offen", "geschlossen"), ("खुला", "बंद")),
    Row("state", ("good", "bad"), ("gut", "schlecht"), ("अच्छा", "बुरा")),
    Row("state", ("true", "false"), ("wahr", "falsch"), ("सच", "झूठ")),
    Row("state", ("cheap", "expensive"), ("billig", "teuer"), ("सस्ता", "महँगा")),
    Row("state", ("early", "late"), ("früh", "spät"), None),
    Row("thing", ("day", "night"), ("Tag", "Nacht"), ("दिन", "रात")),
    Row("thing", ("love", "hate"), ("Liebe", "Hass"), ("प्रेम", "घृणा")),
    Row("thing", ("war", "peace"), ("Krieg", "Frieden"), ("युद्ध", "शांति")),
    Row("thing", ("beginning", "end"), ("Anfang", "Ende"), ("आरंभ", "अंत")),
    Row("thing", ("question", "answer"), ("Frage", "Antwort"), ("प्रश्न", "उत्तर")),
    Row("thing", ("friend", "enemy"), ("Freund", "Feind"), ("मित्र", "शत्रु")),
    Row("thing", ("birth", "death"), ("Geburt", "Tod"), ("जन्म", "मृत्यु")),
    Row("thing", ("victory", "defeat"), ("Sieg", "Niederlage"), ("जीत", "हार")),
    Row("thing", ("summer", "winter"), ("Sommer", "Winter"), ("गर्मी", "सर्दी")),
    Row("place", ("left", "right"), ("links", "rechts"), ("बायाँ", "दायाँ")),
    Row("place", ("north", "south"), ("Norden", "Süden"), None),
    Row("place", ("east", "west"), ("Osten", "Westen"), ("पूर्व", "पश्चिम")),
    Row("place", ("above", "below"), ("oben", "unten"), ("ऊपर", "नीचे")),
    Row("place", ("inside", "outside"), ("innen", "außen"), ("अंदर", "बाहर")),
)

COLOURS = (
    Row("food", ("tomatoes", "red"), ("Tomaten", "rot"), ("टमाटर", "लाल")),
    Row("food", ("spinach", "green"), ("Spinat", "grün"), ("पालक", "हरा")),
    Row("food", ("lemons", "yellow"), ("Zitronen", "gelb"), ("नींबू", "पीला")),
    Row("food", ("milk", "white"), ("Milch", "weiß"), ("दूध", "सफ़ेद")),
    Row("food", ("chocolate", "brown"), ("Schokolade", "braun"), ("चॉकलेट", "भूरा")),
    Row("food", ("bananas", "yellow"), ("Bananen", "gelb"), ("केले", "पीला")),
    Row("nature", ("blood", "red"), ("Blut", "rot"), ("ख़ून", "लाल")),
    Row("nature", ("grass", "green"), ("Gras", "grün"), ("घास", "हरा")),
    Row("nature", ("snow", "white"), ("Schnee", "weiß"), ("बर्फ़", "सफ़ेद")),
    Row("nature", ("coal", "black"), ("Kohle", "schwarz"), ("कोयले", "काला")),
    Row("nature", ("ravens", "black"), ("Raben", "schwarz"), ("कौए", "काला")),
    Row("nature", ("the clear sky", "blue"), None, ("आसमान", "नीला")),
    Row("nature", ("ashes", "grey"), ("Asche", "grau"), None),
)

SYMBOLS = (
    Row("metal", ("gold", "Au"), ("Gold", "Au"), ("सोने", "Au")),
    Row("metal", ("silver", "Ag"), ("Silber", "Ag"), ("चाँदी", "Ag")),
    Row("metal", ("iron", "Fe"), ("Eisen", "Fe"), ("लोहे", "Fe")),
    Row("metal", ("copper", "Cu"), ("Kupfer", "Cu"), ("ताँबे", "Cu")),
    Row("metal", ("lead", "Pb"), ("Blei", "Pb"), ("सीसे", "Pb")),
    Row("metal", ("tin", "Sn"), ("Zinn", "Sn"), ("टिन", "Sn")),
    Row("metal", ("zinc", "Zn"), ("Zink", "Zn"), ("जस्ते", "Zn")),
    Row("metal", ("mercury", "Hg"), ("Quecksilber", "Hg"), ("पारे", "Hg")),
    Row("metal", ("sodium", "Na"), ("Natrium", "Na"), ("सोडियम", "Na")),
    Row("metal", ("tungsten", "W"), ("Wolfram", "W"), None),
    Row("gas", None, ("Wasserstoff", "H"), ("हाइड्रोजन", "H")),
    Row("gas", None, ("Stickstoff", "N"), ("नाइट्रोजन", "N")),
    Row("gas", None, None, ("ऑक्सीजन", "O")),
    Row("gas", None, None, ("हीलियम", "He")),
)

YOUNG = (
    Row("farm", ("cow", "calf"), ("der Kuh", "Kalb"), ("गाय", "बछड़ा")),
    Row("farm", ("sheep", "lamb"), ("des Schafs", "Lamm"), ("भेड़", "मेमना")),
    Row("farm", ("horse", "foal"), ("des Pferdes", "Fohlen"), ("घोड़े", "बछेड़ा")),
    Row("farm", ("hen", "chick"), ("der Henne", "Küken"), ("मुर्गी", "चूज़ा")),
    Row("farm", ("goat", "kid"), None, None),
    Row("farm", None, ("des Schweins", "Ferkel"), None),
    Row("farm", ("dog", "puppy"), ("des Hundes", "Welpe"), ("कुत्ते", "पिल्ला")),
    Row("farm", ("cat", "kitten"), None, None),
    Row("wild", ("deer", "fawn"), ("des Rehs", "Kitz"), None),
    Row("wild", ("bear", "cub"), None, None),
    Row("wild", ("kangaroo", "joey"), None, None),
    Row("wild", ("swan", "cygnet"), None, None),
    Row("wild", ("frog", "tadpole"), ("des Frosches", "Kaulquappe"), None),
)

NUMBERS = {
    "en": "one two three four five six seven eight nine ten eleven twelve".split(),
    "de": "eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf".split(),
    "hi": "एक दो तीन चार पाँच छह सात आठ नौ दस ग्यारह बारह".split(),
}
"""Numbers from one to twelve; a sum is put in words, so that it is a fact of the language and no calculation."""
PLUS = {"en": "{} plus {}", "de": "{} plus {}", "hi": "{} और {}"}
SUMS = ((1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (4, 3), (4, 4), (5, 4), (5, 5), (6, 5), (6, 6), (5, 2), (6, 2), (7, 3),
        (8, 4), (9, 2))  # fmt: skip

TABLES: dict[str, tuple[Row, ...]] = {
    "opposite": OPPOSITES,
    "colour": COLOURS,
    "symbol": SYMBOLS,
    "young_animal": YOUNG,
}
"""Rows by domain; sums are made from ``NUMBERS``."""
