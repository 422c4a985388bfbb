# ruff: noqa: RUF001, RUF002, RUF003 (the signs of an encoding)
"""Bytes of a table -> its text: which encoding it has, which rows had another, and what is refused rather than guessed.

Called by `annotations`; what cannot be told from the bytes, ``data.encoding`` says.
"""

import codecs
import html
import re
import unicodedata
from html.entities import html5
from pathlib import Path

from msenc.types import MsencError

SCRIPTS = {
    "euc_kr": ("HANGUL",),
    "shift_jis": ("HIRAGANA", "KATAKANA", "CJK"),
    "euc_jp": ("HIRAGANA", "KATAKANA", "CJK"),
    "gb18030": ("CJK",),
    "big5": ("CJK",),
    "cp1251": ("CYRILLIC",),
    "koi8_r": ("CYRILLIC",),
    "cp1253": ("GREEK",),
    "cp1255": ("HEBREW",),
    "cp1256": ("ARABIC",),
    "cp874": ("THAI",),
    "mac_roman": ("LATIN",),
    "cp850": ("LATIN",),
    "cp1250": ("LATIN",),
    "iso8859_2": ("LATIN",),
    "cp1254": ("LATIN",),
    "cp1257": ("LATIN",),
}
"""Encodings that are proposed, and the first words of their letters' names in Unicode."""

TYPOGRAPHIC = frozenset("€‚„…†‡‰‹›‘’“”•–—™¡¢£¥§©ª«®°±²³´µ¶·¹º»¼½¾¿×÷\u00a0")
"""Signs that stand in texts in cp1252, beside its letters."""
_QUOTES = frozenset("„…‹›‘’“”•–—«»¡¿°´·€™©®\u00a0")
# What cp1252 makes of letters in words of Mac Roman ("It’s" is "ItÕs", "ç" is "‡"), of DOS, and of Central Europe.
_SCRAMBLED = re.compile(
    r"[ˆ˜ƒ]"
    r"|[^\W\d_][‚„†‡‰‹›•¡¢£¥§ª«®±¶º»¼½¾¿×÷¹][^\W\d_]"
    r"|[^\W\d_][‚†‡‰¢¥¼½¾]"
    r"|(?<!\w)[†‡™€§ª¶º¹¼½¾][a-zß-öø-ÿ]"
    r"|[a-zß-öø-ÿ][À-ÖØ-ÞŠŒŽŸ]"
    r"|[^\W\d_][À-ÖØ-ÞŠŒŽŸ][a-zß-öø-ÿ]"
)
LONGEST_RUN = 3
"""Characters beyond ASCII in a row, as in ``é…”``; other encodings' texts have whole words of them."""

_WEST = (
    *("àâæçéèêëîïôœùûüÿ", "äöüßé", "áéíóúñüç", "áâãàçéêíóôõú", "áéíóúýðþæö", "áíóúýæøð", "æøåéäöü", "åäöéüš"),
    *("àèéìòùíîóú", "àçèéíïòóú", "ëïéèöüêçó", "áéíóú", "çëéê", "äöõüšž"),
)
_CENTRAL = ("áčďéěíňóřšťúůýž", "áäčďéíĺľňóôŕšťúýž", "áéíóöőúüű", "ąćęłńóśźż", "čćđšž", "ăâîşţ")
ALPHABETS = {
    "cp1252": _WEST,
    "cp1254": ("çğıöşüâîûi̇",),
    "cp1250": _CENTRAL,
    "iso8859_2": _CENTRAL,
    "cp1257": ("ąčęėįšųūž", "āčēģīķļņšūž", "äöõüšž"),
    "mac_roman": _WEST,
    "cp850": _WEST,
}
"""Encodings of Latin letters -> the letters beyond ASCII of languages that are written in them."""
# Where another encoding makes nearly all of a table's letters those of one language, and cp1252 far fewer, it is that.
# Of 10 to 60 lines of program messages in each of 15 languages of cp1252, none was taken for another (docs/log.md).
MIN_LETTERS, MIN_SHARE, MIN_LEAD = 16, 0.97, 0.15

MOST_TIMES = 3
"""How often over a text may have been saved wrongly. Without a bound, one made for it takes its length squared."""

MOST_PROPOSED = 5
"""Encodings that a refusal names."""

# UTF-8 that was read as cp1252 (or Latin-1) and saved again: curly quotes and dashes start with "â€", Latin letters
# with "Ã", "Ä", "Å", signs with "Â", emoji with "ðŸ"; of other scripts each letter is two or three such characters.
# Nothing in a text that was never mangled looks like these: "CAFÉ”" has one pair, "cliché\xa0»" one of three, and a
# quote or dash behind "Ã" ends a word.
_LATER = "\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
_DOUBLE_ENCODED = re.compile(
    f"(?:[Â-ß][{_LATER}]|[à-ï][{_LATER}]{{2}}|ðŸ[{_LATER}]{{2}}){{2,}}|ðŸ[{_LATER}]{{2}}"
    "|â[€\x80][^\x00-\x7f]"
    "|[ÂÃ][\x80-\xbf]"
    "|[ÃÄÅ](?:[\x80-\x9f\xa1-\xa7\xaa-\xba\xbc-\xbf€‚ƒ„†‡ˆ‰Š‹ŒŽ˜š›œžŸ]|[…‘’“”•–—™](?=[^\\W\\d_]))"
)
_ENTITY = re.compile(r"&(?:[A-Za-z][A-Za-z0-9]*|#\d+|#[xX][0-9A-Fa-f]+);")
_C1 = re.compile("[\x80-\x9f]")
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_LINE_ENDS = re.compile("\\s*[\t\n\r\u2028\u2029]\\s*")
# Marks of the encoding, or what cp1252 makes of them: one before each of the files that were put together.
_MARKS_READ = re.compile("(?:\\A|(?<=[\r\n]))(?:\ufeff|ï»¿)+")
_END_OF_FILE = "\x1a\0"
"""DOS ends a file in the first; a crash may leave the others."""
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16's, with which it begins
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_NO_TABLES = {
    b"PK\x03\x04": "a spreadsheet or an archive",
    b"\xd0\xcf\x11\xe0": "a spreadsheet",
    b"%PDF": "a PDF",
    b"PAR1": "a Parquet file",
    b"ARROW1": "a file of Arrow's",
    b"\x93NUMPY": "an array of NumPy's",
    b"\x89HDF": "an HDF5 file",
    b"SQLite format 3": "a database",
    b"\x1f\x8b": "a compressed file",
    b"BZh": "a compressed file",
    b"\xfd7zXZ": "a compressed file",
    b"(\xb5/\xfd": "a compressed file",
    b"7z\xbc\xaf": "an archive",
    b"Rar!": "an archive",
    b"<": "a web page or another file of tags",
    b"version https://git-lfs": "what git leaves in a file's place (git lfs pull fetches it)",
    b"{\\rtf": "a text document",
    b"{": "JSON",
    b"[": "JSON",
    b"RIFF": "a media file",
    b"ID3": "a media file",
    b"OggS": "a media file",
    b"\x1aE\xdf\xa3": "a media file",
}
"""First bytes -> what a file is that is no table."""
# Letters that show nothing by themselves: fillers, a joiner, selectors of a sign's variant.
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)


def decode_table(data: bytes, path: Path, encoding: str | None = None) -> tuple[str, set[int]]:
    """The text of a table, and the numbers of the lines whose encoding was repaired (the first is 1).

    Lines of valid UTF-8 stay as they are. A line with other bytes is repaired alone, as cp1252, if what comes out looks
    like a text in it.

    Args:
        data: the file.
        path: of the file, for messages.
        encoding: what the file is in, by its user's word.

    Raises:
        MsencError: an unknown or wrong `encoding`, or lines that cannot be cp1252; it names what would fit. And a file
            that is no text.
    """
    begin = data.removeprefix(codecs.BOM_UTF8).lstrip()
    if kind := next((kind for start, kind in _NO_TABLES.items() if begin.startswith(start)), None):
        raise MsencError(f"{path}: this is {kind}, whatever its name says. Save the table as CSV, in UTF-8.")
    mark = next((name for start, name in _MARKS.items() if data.startswith(start)), None)
    if encoding is None and mark is None and (wide := _wide(data)):
        mark = wide
    if encoding or mark:
        try:
            return _without_marks(data.decode(encoding or mark)), set()
        except LookupError as error:
            raise MsencError(f"data.encoding={encoding}: Python knows no such encoding.") from error
        except UnicodeDecodeError as error:
            if mark != "utf-8-sig":
                line = data[: error.start].count(b"\n") + 1
                raise MsencError(
                    f"{path}, row {line}: not in the encoding {encoding or mark}. Correct data.encoding, or save the "
                    "file as UTF-8."
                ) from error
            data = data.removeprefix(codecs.BOM_UTF8)
    parts = re.split(rb"(\r\n|\r|\n)", data)
    lines, repaired, wrong = [], set(), []
    for number, part in enumerate(parts[::2], start=1):
        try:
            lines.append(part.decode())
        except UnicodeDecodeError:
            lines.append(_as_cp1252(part))
            repaired.add(number)
            if not is_plausible(lines[-1]):
                wrong.append((number, part))
    others = [(number, parts[2 * (number - 1)]) for number in sorted(repaired)]
    likelier = likelier_encoding([part for _, part in others])
    if wrong or likelier:
        wrong = wrong or others
        fitting = fitting_encodings([part for _, part in wrong])
        fitting = list(dict.fromkeys([likelier, *fitting])) if likelier else fitting
        fits = f"The bytes fit {', '.join(fitting[:MOST_PROPOSED])}. " if fitting else ""
        proposed = f"{fits}Say it: data.encoding={fitting[0] if fitting else 'NAME'}"
        proposed += ", or cp1252 if it is that all the same" if likelier else ""
        raise MsencError(
            f"{path}, row {wrong[0][0]}: neither UTF-8 nor text in cp1252 ({len(wrong)} such rows). {proposed}, or "
            "save the file as UTF-8."
        )
    ends = [end.decode() for end in parts[1::2]] + [""]
    return _without_marks("".join(line + end for line, end in zip(lines, ends, strict=True))), repaired


def _without_marks(text: str) -> str:
    return _MARKS_READ.sub("", text).rstrip(_END_OF_FILE)


def _wide(data: bytes) -> str | None:
    """UTF-16 and UTF-32 without a mark show by the zeros in the columns' names, which are ASCII."""
    for width, name in ((4, "utf-32"), (2, "utf-16")):
        if match := re.search(rb"(?:[ -~]\0{%d}){4}" % (width - 1), data[:4096]):
            return f"{name}-le" if match.start() % width == 0 else f"{name}-be"
    return None


def _as_cp1252(line: bytes) -> str:
    """The line's valid UTF-8 as it is, other bytes by cp1252; those that cp1252 lacks as C1 controls."""
    text = line.decode("utf-8", errors="surrogateescape")
    return re.sub("[\udc80-\udcff]", lambda m: _one(ord(m[0]) - 0xDC00), text)


def _one(byte: int) -> str:
    try:
        return bytes([byte]).decode("cp1252")
    except UnicodeDecodeError:
        return chr(byte)


def is_plausible(text: str) -> bool:
    """Whether what cp1252 made of a line looks like a text in it.

    Example:
        >>> is_plausible("“L’été à Zoé…”"), is_plausible("Ïðèâåò, êàê äåëà?"), is_plausible("ÄãºÃ")
        (True, False, False)
        >>> is_plausible("ItÕs a cafŽ")
        False
    """
    if _SCRAMBLED.search(text):
        return False
    if any(not c.isalpha() and c not in TYPOGRAPHIC for c in text if not c.isascii() and ord(c) < 256):
        return False
    if re.search(rf"[^\x00-\x7f]{{{LONGEST_RUN + 1},}}", text):
        return False
    words = re.findall(r"[^\W\d_]+", text)
    return not any(
        len(word) > 1 and not re.search("[A-Za-z]", word) and not word.isascii() and word.lower() != "þú"  # Icelandic
        for word in words
    )


def likelier_encoding(lines: list[bytes]) -> str | None:
    """An encoding in which lines are of one language, where in cp1252 they are not; None: they may be in cp1252.

    Example:
        >>> turkish = "Bunu yanlış yaptın, değil mi? Kapıyı açtığını gördüm."
        >>> icelandic = "Það er ný sýn, býst ég við. Ertu með nýjar fréttir?"
        >>> likelier_encoding([turkish.encode("cp1254")] * 2), likelier_encoding([icelandic.encode("cp1252")] * 2)
        ('cp1254', None)
    """
    shares = {name: _share_of_letters(b"\n".join(lines), name) for name in ALPHABETS}
    own, num = shares.pop("cp1252")
    best = max(shares, key=lambda name: shares[name])
    is_it = num >= MIN_LETTERS and shares[best][0] >= max(MIN_SHARE, own + MIN_LEAD)
    return best if is_it else None


def _share_of_letters(data: bytes, encoding: str) -> tuple[float, int]:
    """Of the characters beyond ASCII that are no quotes and dashes: which share one language has, and how many."""
    text = data.decode(encoding, errors="replace")
    beyond = [c.lower() for c in text if not c.isascii() and c not in _QUOTES]
    most = max(sum(c in letters for c in beyond) for letters in ALPHABETS[encoding])
    return most / max(len(beyond), 1), len(beyond)


def fitting_encodings(lines: list[bytes]) -> list[str]:
    """Encodings in which lines are words of a script, the likeliest first.

    Example:
        >>> fitting_encodings(["Привет, как дела? Всё хорошо.".encode("cp1251")])[0]
        'cp1251'
    """
    found = []
    for name, scripts in SCRIPTS.items():
        try:
            text = b"\n".join(lines).decode(name)
        except UnicodeDecodeError:
            continue
        beyond = [c for c in text if not c.isascii() and not unicodedata.category(c).startswith("P")]
        own = [c for c in beyond if unicodedata.name(c, "").partition(" ")[0] in scripts]
        # Of letters without case and of a byte each, nothing tells whether they are common.
        words = [word for word in re.findall(r"[^\W\d_]+", text) if not word.isascii()]
        num_mixed = sum(re.search("[A-Za-z]", word) is not None for word in words)
        is_latin = scripts[0] == "LATIN"
        if words and is_latin != (2 * num_mixed > len(words)):
            continue  # Latin letters stand in words with ASCII's, and no others do
        if is_latin and not beyond:  # curly quotes and dashes alone
            found.append((1.0, name))
        common = len(own) / 2 if scripts[0] in ("HEBREW", "ARABIC", "THAI") else sum(map(_is_common, own))
        if beyond and len(own) > 0.8 * len(beyond):
            found.append((len(own) / len(beyond) + common / len(own), name))
    return [name for _, name in sorted(found, key=lambda pair: -pair[0])][:MOST_PROPOSED]


def _is_common(letter: str) -> bool:
    """A wrong encoding of the same script turns small letters into capitals, and common signs into rare ones."""
    if not "\u4e00" <= letter <= "\u9fff":
        return letter.islower() or letter.lower() == letter.upper()
    for name, last in (("gb2312", 0xD7), ("big5", 0xC6)):  # the more frequent half of each
        try:
            if letter.encode(name)[0] <= last:
                return True
        except UnicodeEncodeError:
            continue
    return False


def repair_encoding(text: str) -> str:
    r"""Undo double encoding and HTML's names of signs, map C1 controls through cp1252, make no-break spaces plain.

    Other control characters, which end a text in C's libraries or move a terminal's cursor, are left out, but for tabs
    and line ends. A text of nothing but controls and characters that show nothing is empty.

    Example:
        >>> repair_encoding("a cafÃ©\x97at\xa0noon\x85"), repair_encoding("\u200b\ufeff"), repair_encoding("n\0o\x1b\n")
        ('a café—at noon…', '', 'no\n')
        >>> repair_encoding("Tom &amp; Ann don&amp;#39;t; R&D; &so on;")
        "Tom & Ann don't; R&D; &so on;"
        >>> repair_encoding("&" + "amp;" * 1000 + "lt;").count("amp;")
        997
    """
    for _ in range(MOST_TIMES):  # some were saved so more than once
        text = _ENTITY.sub(_unescape, text)
    for _ in range(MOST_TIMES):
        text = _DOUBLE_ENCODED.sub(lambda match: _decode_again(match[0]), text)
    text = _C1.sub(lambda match: match[0].encode("latin-1").decode("cp1252", errors="ignore"), text)
    if all(unicodedata.category(c)[0] in "CZ" for c in _UNSEEN.sub("", text)):
        return ""
    return _CONTROLS.sub("", text).replace("\u00a0", " ")


def clean_name(name: str) -> str:
    r"""A name of one line, of composed letters, without marks that show nothing: it is the same name with them.

    Joiners, which change the shape of letters, stay.

    Example:
        >>> clean_name("Zoe\u0308\u200b"), clean_name("Ana\nand Bo")
        ('Zoë', 'Ana and Bo')
    """
    name = "".join(c for c in name if unicodedata.category(c) != "Cf" or c in "\u200c\u200d")
    return unicodedata.normalize("NFC", _LINE_ENDS.sub(" ", name).strip())


def _unescape(match: re.Match[str]) -> str:
    return html.unescape(match[0]) if match[0][1] == "#" or match[0][1:] in html5 else match[0]


def _decode_again(text: str) -> str:
    try:
        return b"".join(c.encode("latin-1" if ord(c) < 256 else "cp1252") for c in text).decode("utf-8")
    except UnicodeError:
        return text  # looked like it, and was not
