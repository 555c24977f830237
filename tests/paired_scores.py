"""A score of given items, as comparisons read it."""

from pipelines.scores import Score


def score(items, better="higher", **changes):
    """``value`` follows from the items; ``changes`` are other fields of the score."""
    value = sum(items.numerator) / sum(items.denominator)
    plain = {
        "name": "s/x", "suite": "s", "value": value, "unit": "share", "better": better, "n": len(items.ids),
        "n_unit": "items", "interval": None, "set_hash": "h", "suite_version": 1, "method": "", "decoding": None,
        "settings": {}, "items": items,
    }  # fmt: skip
    return Score(**(plain | changes))
