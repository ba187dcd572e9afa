"""Numbers as people write them, with a unit or without: `1,200`, `3/4`, `50 %`, `two`, `12 cm`."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

from tasks.checkers.reading import plain

MAX_CHARS = 120
_MAX_WORDS = 16
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+"
_NUMBER = re.compile(
    rf"(?P<mantissa>{_DIGITS})"
    r"(?:[eE](?P<e>[+-]?\d{1,3})(?![\d.])|\s*(?:[x×*]|\*\*)\s*10\s*(?:\^|\*\*)\s*"
    r"(?:\{\s*(?P<braced>[+-]?\d{1,3})\s*\}|(?P<power>[+-]?\d{1,3})(?![\d.])))?"
)
_LATEX_FRACTION = re.compile(r"\\frac\s*(?:\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d)\s*(\d))")
_SLASH = re.compile(r"\s*/\s*")
_LEAD = re.compile(
    r"(?:(?:there\s+(?:are|is|were|was)|it\s+is|it's|they\s+are)\s+)?"
    r"(?:(?:about|around|approximately|roughly|exactly)\s+|[≈~]\s*)?"
    r"(?P<sign>[+-]?)\s*(?P<money>[$€£¥]?)\s*",
    re.I,
)
_WORD = r"[^\W\d_]+(?:\^?\{?[23]\}?)?"
_UNIT = re.compile(rf"{_WORD}(?:\s*/\s*{_WORD})?(?:\s+{_WORD}){{0,2}}|°\s*[CF]?|[$€£¥]")
_NOT_UNITS = frozenset((
    "or", "and", "to", "not", "nor", "but", "than", "versus", "vs", "minus", "plus", "times",
    "over", "maybe", "either", "both", "from", "between", "by", "at", "most", "least", "if", "is",
    "are", "no", "of", "with", "without", "half", "more", "less",
    "wrong", "false", "incorrect", "unknown",
))  # fmt: skip
_ALIASES = {
    "degree": "°", "deg": "°", "dollar": "$", "usd": "$", "euro": "€", "pound": "£",
    "centimeter": "cm", "centimetre": "cm", "meter": "m", "metre": "m", "millimeter": "mm",
    "millimetre": "mm", "kilometer": "km", "kilometre": "km", "inch": "in", "inche": "in",
    "foot": "ft", "feet": "ft", "yard": "yd", "mile": "mi", "gram": "g", "kilogram": "kg",
    "liter": "l", "litre": "l", "second": "s", "sec": "s", "minute": "min", "hour": "h", "hr": "h",
    "°c": "celsius", "°f": "fahrenheit", "unit": "", "kilometers per hour": "km/h", "kmh": "km/h",
    "kph": "km/h", "mph": "mi/h", "newton": "n", "joule": "j", "watt": "w", "volt": "v",
    "milliliter": "ml", "millilitre": "ml", "ohm": "ω",
}  # fmt: skip
KNOWN_UNITS = frozenset({*_ALIASES, *_ALIASES.values(), "mg", "kw", "pa", "hz"})
_COUNTING = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_SMALL = {word: value for value, word in enumerate(_COUNTING)}
_TENS = {
    word: 10 * value
    for value, word in enumerate(
        ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"), 2
    )
}
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}


@dataclass(frozen=True)
class Quantity:
    """A number as written, its unit in one spelling ("" where there is none), and whether `%`."""

    value: Fraction
    unit: str = ""
    percent: bool = False

    def equals(self, gold: Quantity, tolerance: Fraction = Fraction(0)) -> bool:
        """Within `tolerance` of the gold's value. A unit or `%` may be missing, not another one."""
        if self.unit and gold.unit and self.unit != gold.unit:
            return False
        values, gold_values = {self.value}, {gold.value}
        if self.percent != gold.percent:  # 50 % is 0.5, or 50 of what is asked for in per cent
            if self.percent:
                values.add(self.value / 100)
            else:
                gold_values.add(gold.value / 100)
        return any(
            abs(value - true) <= tolerance * abs(true) for value in values for true in gold_values
        )


def read_quantity(text: str, *, any_unit: bool = False) -> Quantity | None:
    """The one number that a text is; None where it is not just that.

    `any_unit` takes words that are no known unit for one ("12 apples"), but no single letter:
    that may be a variable.
    """
    if len(text) > MAX_CHARS:
        return None
    text = re.sub(r"(?<=\d)[\u2009\u202f\u00a0](?=\d{3})", "", text)
    text = unicodedata.normalize("NFKC", re.sub(r"\s*([²³])", r"^\1", plain(text)))
    text = text.replace("⁄", "/").replace("\u2212", "-").strip()
    if (spelled := _spelled(text, any_unit)) is not None:
        return spelled
    lead = _LEAD.match(text)
    assert lead is not None  # every part of it may be missing
    read = _value(text, lead.end())
    if read is None:
        return None
    value, end = read
    rest = text[end:].strip()
    if (scale := re.match(rf"({'|'.join(_SCALES)})\b\s*", rest, re.I)) is not None:
        value, rest = value * _SCALES[scale[1].lower()], rest[scale.end() :]
    if (sign := re.match(r"%|per\s?cent(?:age)?\b", rest, re.I)) is not None:
        percent, rest = True, rest[sign.end() :].strip()
    else:
        percent = False
    attached = end < len(text) and text[end].isalpha()
    unit = _unit(rest, any_unit and not attached) if rest else lead["money"]
    if unit is None or (lead["money"] and unit != lead["money"]) or (percent and unit):
        return None
    return Quantity(-value if lead["sign"] == "-" else value, unit, percent)


def _value(text: str, at: int) -> tuple[Fraction, int] | None:
    """A number, fraction or mixed number that begins here, and where it ends."""
    whole = Fraction(0)
    if (
        mixed := re.compile(r"(\d+)\s*(?=\\frac)|(\d+)\s+(?=\d+\s*/\s*\d)").match(text, at)
    ) is not None:
        whole, at = Fraction(int(mixed[1] or mixed[2])), mixed.end()
    if (latex := _LATEX_FRACTION.match(text, at)) is not None:
        over, under = latex[1] or latex[3], latex[2] or latex[4]
        return (whole + Fraction(int(over), int(under)), latex.end()) if int(under) else None
    if (first := _NUMBER.match(text, at)) is None:
        return None
    end = first.end()
    value = _decimal(first)
    if (slash := _SLASH.match(text, end)) is not None and (
        second := _NUMBER.match(text, slash.end())
    ) is not None:
        divisor = _decimal(second)
        if not divisor:
            return None
        value, end = value / divisor, second.end()
    return whole + value, end


def _decimal(number: re.Match[str]) -> Fraction:
    mantissa = number["mantissa"].replace(",", "")
    mantissa = f"0{mantissa}" if mantissa.startswith(".") else mantissa
    exponent = number["e"] or number["braced"] or number["power"] or "0"
    return Fraction(mantissa.rstrip(".") if "." in mantissa else mantissa) * Fraction(10) ** int(
        exponent
    )


def _unit(text: str, any_unit: bool) -> str | None:
    """A unit's one spelling; None where the text is no unit."""
    if _UNIT.fullmatch(text) is None:
        return None
    words = text.lower().replace("{", "").replace("}", "").split()
    power = ""
    if words[0] in ("square", "sq", "cubic", "cu") and len(words) > 1:
        power, words = "^2" if words[0].startswith("sq") else "^3", words[1:]
    spelled = " ".join(words)
    whole = _ALIASES.get(spelled) or _ALIASES.get(spelled.removesuffix("s"))
    if whole is not None:
        return whole + power
    if _NOT_UNITS & {*words} or any(word in _SMALL or word in _TENS for word in words):
        return None
    names = []
    for name in re.split(r"\s*/\s*", spelled):
        base, exponent = re.fullmatch(r"(.*?)(?:\^?([23]))?", name).groups()  # type: ignore[union-attr]
        short = base.removesuffix("s") if len(base) > 2 else base
        one = _ALIASES.get(base, _ALIASES.get(short, short))
        if (
            short not in KNOWN_UNITS
            and base not in KNOWN_UNITS
            and not (any_unit and len(base) > 1)
        ):
            return None
        names.append(one + (f"^{exponent}" if exponent else ""))
    return "/".join(names) + power


def _spelled(text: str, any_unit: bool) -> Quantity | None:
    """A number in English words, perhaps with a unit after it."""
    negative = re.match(r"(?:minus|negative)\s+", text, re.I)
    text = text[negative.end() :] if negative else text
    text = re.sub(r"\b(hundred|thousand|million)\s+and\b", r"\1", text.lower())
    text = re.sub(r"^an?\s+(?=hundred|thousand|million|billion)", "one ", text)
    words = re.sub(r"(?<=[a-z])-(?=[a-z])", " ", text).split()[:_MAX_WORDS]
    for count in range(len(words), 0, -1):
        if (value := _count(words[:count])) is not None:
            rest = " ".join(words[count:])
            unit = _unit(rest, any_unit) if rest else ""
            return None if unit is None else Quantity(-value if negative else value, unit)
    return None


def _count(words: list[str]) -> Fraction | None:
    """What words of a number say: "twenty", "five" is one, "five", "twenty" is none."""
    if words in (["half"], ["one", "half"]):
        return Fraction(1, 2)
    total, group, scale = 0, 0, 10**15
    room = 1000  # what the next word must be below
    for word in words:
        if word in _SMALL and _SMALL[word] < room and (_SMALL[word] or len(words) == 1):
            group, room = group + _SMALL[word], 1
        elif word in _TENS and room >= 100:
            group, room = group + _TENS[word], 10
        elif word == "hundred" and 0 < group < 10:
            group, room = 100 * group, 100
        elif word in _SCALES and group and _SCALES[word] < scale:
            scale = _SCALES[word]
            total, group, room = total + group * scale, 0, 1000
        else:
            return None
    return Fraction(total + group)
