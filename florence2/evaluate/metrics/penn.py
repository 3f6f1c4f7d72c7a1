"""Words of captions, as the COCO caption evaluation counts them: Penn Treebank tokens without punctuation.

The official code runs the PTBTokenizer of Stanford CoreNLP 3.4.1 in Java. `_RULES` describes its tokens: at each place
the rule with the longest match wins, the earlier one of two that are equally long. Every word of the lists was given to
the official code, which treats it as they say. `parity/golden/evaluate` has what it returned for recorded strings.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from html.entities import name2codepoint

PUNCTUATION = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split())
"""Tokens that do not count. The brackets' names never occur: tokens are lower-cased before they are compared."""
_Change = Callable[[str], str]
_SPLIT = {"cannot": 3, "gonna": 3, "gotta": 3, "wanna": 3, "lemme": 3, "gimme": 3}
"""Words that are two tokens, and the length of the first."""
_SYMBOLS = {
    **{"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"},
    **{
        '"': "''",
        "“": "``",
        "”": "''",
        "‘": "`",
        "’": "'",
        "«": "``",
        "»": "''",
        "‚": "`",
        "„": "``",
        "‹": "`",
        "›": "'",
    },
    **{"—": "--", "–": "--", "…": "...", "½": "1/2", "¼": "1/4", "¾": "3/4", "¢": "cents", "£": "#", "€": "$"},
}
_ENTITIES = {"amp": "&", "lt": "<", "gt": ">", "quot": "''", "apos": "'", "nbsp": "", "mdash": "--"}

_NUMERALS = "²³¹¼-¾⁰-⁹₀-₉⅐-⅟①-⒛⓪-⓿"  # Python takes them for letters
_LETTER, _WORD = rf"(?:(?![{_NUMERALS}])[^\W\d_])", rf"(?:(?![{_NUMERALS}])[^\W_]|\u00ad)"
_APOSTROPHE, _QUOTE, _HYPHEN, _NO_LETTER = "['’]", "['’`‘‛]", "[-_‐‑]", "(?![A-Za-z])"
_TITLES = """
    cf dr ft lt mr ms mt ph st vs wm adj adm adv ave cie col cpl det drs ens gen gov hon jos maj mme mrs pfc pvt rep
    rev sen sfc sgt spc ste alex asst atty brig capt cmdr dept elec govs insp invt mlle msgr natl pres prof reps sens
    supt assoc attys comdr lieut messrs treas supts
""".split()
_ABBREVIATIONS = """
    al co ct ga jr ky md mo rd rt sq sr va vt ala apr aug bhd cos dak dec esq est etc ext feb fla fri inc ind jan jul
    jun kan ltd mar mon neb nev nov oct plc sep seq sys tel thu tue wed wis wyo ariz assn bldg blvd bros colo conn
    corp intl kans mich minn mont okla penn sept tenn tues univ wisc calif bancorp thurs
""".split()
_NEVER_UPPER = "mfg mtg pte pty ppte ppty ptes ptys".split()
_NEVER_LOWER = "az la pa ark del ill ore tex mass miss wash".split()
_BEFORE_NUMBERS = "ca no op pp art fig nos figs prop".split()


def _any(*forms: Sequence[str]) -> str:
    """Return the pattern of any of the words."""
    return "|".join(sorted((word for words in forms for word in words), key=len, reverse=True))


def _cases(words: Sequence[str], *cases: _Change) -> list[str]:
    return [case(word) for word in words for case in cases]


_TITLE = _any(_cases(_TITLES, str.lower, str.capitalize, str.upper))
_ABBREVIATION = _any(
    _cases(_ABBREVIATIONS, str.lower, str.capitalize, str.upper),
    _cases(_NEVER_UPPER, str.lower, str.capitalize),
    _cases(_NEVER_LOWER, str.capitalize, str.upper),
)
_NUMBERED = _any(_cases(_BEFORE_NUMBERS, str.lower, str.capitalize, str.upper))
_OPENERS = """
    A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Now Once One
    Other Our She Since So Some Such That The Their Then There These They This We What When While Yet You
""".split()
"""Words that begin a sentence: a full stop before one of them, after a single letter, ends the sentence before."""
_FILE_ENDINGS = _any(
    """
        bat bmp c cgi class cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov mp3 pdf php pl png ppt ps py
        sql tar txt wav x xml zip
    """.split()
)
_ELISIONS = _any("c'mon e'er ev'ry li'l nat'l nor'easter s'mores".split())
_ELISIONS_OR_CURLY = _any("'cause 'em 'n' 'til 'till c'est cap'n".split()).replace("'", _APOSTROPHE)
"""Words that keep their apostrophe: only a straight one, or a curly one too."""
_PLAIN, _SLASH = "[A-Za-z0-9]+", r"\\?/"  # the official code lets a backslash escape a slash or a star
_SIDE = rf"{_PLAIN}(?:-[A-Za-z]+){{0,2}}"  # of a slash
_ACCENTED = _any([name for name in name2codepoint if re.fullmatch("[A-Za-z](?:acute|grave|uml|circ|tilde)", name)])
_IN_ADDRESS, _IN_HOST = r"[^\s\"<>|(){}]", r"[^\s\"<>|(){}.]"
_TAG = r"[A-Za-z][A-Za-z0-9._:-]*"
_ATTRIBUTE = rf"{_TAG}(?: *= *(?:\"[^\"\n]*\"|'[^'\n]*'))?"
_FEW, _AREA, _GAP = "[0-9]{1,4}", "[0-9]{2,4}", r"[- \u00a0]"  # of fractions and telephone numbers
# faces: ":-)", ">=D", and "^_^", "(-_-)"
_EYES, _NOSE, _MOUTH = "[:;=]", "['*o-]", r"[@DOP\[\\\]dp{|()]"
_CLOSED_EYE = "['<=>^x~-]"


def _keep_spaces(token: str) -> str:
    """Return a token with spaces inside as the official code does, with spaces that do not break."""
    return token.replace(" ", "\u00a0")


def _name_symbols(token: str) -> str:
    """Return a token with brackets and quotes written out."""
    return "".join(_SYMBOLS.get(letter, letter) for letter in token)


def _straighten(token: str) -> str:
    return token.replace("’", "'")


def _name_brackets(token: str) -> str:
    return _keep_spaces(token.replace("(", "-lrb-").replace(")", "-rrb-").replace("}", "-rcb-"))


_PATTERNS: list[tuple[str, _Change | None]] = [
    (rf"((?:{_ABBREVIATION})\.)(?:[A-Za-z][^A-Za-z0-9]|-[0-9])", None),  # "Inc.w/", where a title would be "Mr.w"
    # words: "dog", "state-of-the-art", "yes.no", "and/or", "AT&T", "U.S.-based", "1,000-year", "dog." before a comma
    (rf"{_WORD}+(?:{_HYPHEN}{_WORD}+)*", None),
    (rf"{_LETTER}{_WORD}*(?:[.!?]{_LETTER}{_WORD}*)*", None),
    (rf"{_PLAIN}(?:[.,]{_PLAIN})*\.?(?:-{_PLAIN})+", None),
    (rf"({_WORD}+(?:[-_‐‑.!?]{_WORD}+)*\.)[,;:、]", None),
    (rf"{_SIDE}(?:{_SLASH}{_SIDE}){{1,2}}", None),
    (rf"{_WORD}+(?:\.{_WORD}+)*\.(?i:{_FILE_ENDINGS})(?=[\s,.!?])", None),
    (r"(?:[A-Z]+[&+])+[A-Z]+", None),
    (r"[A-Z]+\$|[CcFf]#|[CcJj]\+\+", None),
    # abbreviations: "Mr.", "U.S.", "Ph.D.", "no. 5"
    (rf"(?:{_TITLE}|{_ABBREVIATION}|[A-Za-z])\.", None),
    (rf"([A-Za-z])\.[ \n]+(?:{_any(_cases(_OPENERS, str, str.upper))}|M[rs]\.)[ \n]", None),
    (rf"(?:{_WORD}+-)?[A-Za-z](?:\.[A-Za-z])+\.?", None),
    (r"[Pp][Hh]\.[Dd]\.", None),
    (rf"((?:{_NUMBERED})\.)[ \n]?[0-9]", None),
    # contractions: do n't, man 's, t is, y' all, o'clock
    (rf"([A-Za-z]+?)(?i:n{_APOSTROPHE}t)", None),
    (rf"(?i:n{_APOSTROPHE}t)", _straighten),
    (rf"({_WORD}+(?:{_HYPHEN}{_WORD}+)*)(?i:{_APOSTROPHE}(?:s|d|m|ll|ve|re)){_NO_LETTER}", None),
    (rf"(?i:'(?:s|d|m|ll|ve|re)){_NO_LETTER}|(?i:’(?:s|d|m|ll|ve|re))", _straighten),
    (r"((?i:'t))(?i:is|was)", None),
    (rf"([yY]{_APOSTROPHE}){_LETTER}", None),
    (rf"(?i:[dlo]){_QUOTE}{_LETTER}{_WORD}+(?:{_HYPHEN}{_WORD}+)*", None),
    (rf"(?i:[djl]){_APOSTROPHE}|(?:n|(?![IY])[A-Z]){_QUOTE}{_LETTER}{{2,}}", None),
    (rf"{_LETTER}+[AEIOUYaeiouy]{_QUOTE}(?:[aeiou]|[A-Z]){_LETTER}*", None),
    (rf"(?i:{_ELISIONS}|{_ELISIONS_OR_CURLY}|(?:dunkin|ol|somethin){_APOSTROPHE}(?![dms]))", None),
    (rf"{_APOSTROPHE}(?:[2-9]0[sS]|(?:[nN]|[0-9]{{2}})(?=[ \n]))|’[nN]", None),
    # numbers: "1,000", "-5", "10:30", "3 1/2", "5/12/2010", "(555) 555-1234"
    (r"[-+]?(?:[0-9]*(?:[.:,][0-9]+)+|[0-9]+)", None),
    (rf"(?:{_FEW}{_GAP})?{_FEW}{_SLASH}{_FEW}", _keep_spaces),
    (rf"[0-9]{{1,2}}(?:[-/]{_FEW}){{2}}", None),
    (
        rf"(?:\([0-9]{{2,3}}\)[ \u00a0]?|\+{{0,2}}(?:{_AREA}{_GAP}){{1,2}})[0-9]{{3,4}}{_GAP}?[0-9]{{3,5}}",
        _name_brackets,
    ),
    (rf"(?:\+{{0,2}}{_AREA}\.)?{_AREA}\.[0-9]{{3,4}}\.[0-9]{{3,5}}", None),
    # addresses, markup and names of the net
    (rf"(?i:https?://){_IN_ADDRESS}+?\.{_IN_ADDRESS}*(?<![.!?,-])", None),
    (rf"(?:(?:[#%&*+~’]|(?![A-Z]){_LETTER})+\.)+(?:com|edu|net|org)(?![A-Za-z0-9])", None),
    (rf"<?[A-Za-z0-9]{_IN_ADDRESS}*@{_IN_HOST}+(?:\.{_IN_HOST}+)*>?", None),
    (rf"@[A-Za-z_][A-Za-z0-9_]*|#{_LETTER}+", None),
    (rf"</?{_TAG}(?: +{_ATTRIBUTE})* */?>|<[!?][A-Za-z-][^>\n]*>", _keep_spaces),
    (rf"&(?i:{'|'.join(_ENTITIES)});", lambda token: _ENTITIES[token[1:-1].lower()]),
    (rf"&(?:{_ACCENTED}|#[0-9]+);", None),
    # signs
    (r"-(?i:[lr][rcs]b)-", None),
    (rf"([<>]?{_EYES}{_NOSE}?{_MOUTH})[^A-Za-z0-9]", _name_brackets),
    (rf"{_CLOSED_EYE}_{_CLOSED_EYE}|\({_CLOSED_EYE}[._]?{_CLOSED_EYE}\)", _name_brackets),
    (r"[`‘-‟\u0091-\u0094‹›«»]{1,2}", _name_symbols),
    (r"\.{3,}|--+", lambda _: "--"),
    (r"[?!]+|\*+|_+|@+|#+|<<|>>|(?:\\\*)+", None),
    (r"''", None),
]
_RULES = [(re.compile(pattern), change) for pattern, change in _PATTERNS]
_PLAIN_WORD = re.compile(r"[A-Za-z]+(?=[ \n])")


def split_captions(captions: Sequence[str]) -> list[list[str]]:
    """Return the tokens of each caption, in lower case and without punctuation.

    Captions are read one after the other, as the official code does: the end of one can depend on the beginning of the
    next, as in "no." before "5 dogs".
    """
    lines: list[list[str]] = [[]]
    text = "\n".join(" ".join(re.split(r"[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]", caption)) for caption in captions)
    for token in _tokens(text):
        if token == "\n":
            lines.append([])
        elif (word := token.lower()) and word not in PUNCTUATION:
            lines[-1].append(word)
    return lines[: len(captions)]


def _tokens(text: str) -> Iterator[str]:
    """Yield the tokens of a text, and a line break for each that it has."""
    text += "\n"  # so that rules with a context match at the end too
    place = 0
    while place < len(text) - 1:
        if text[place] == "\n" or text[place].isspace():
            if text[place] == "\n":
                yield "\n"
            place += 1
            continue
        token, place = _token_at(text, place)
        yield from _divide(token)


def _token_at(text: str, place: int) -> tuple[str, int]:
    """Return the token that begins at a place, and the place after it."""
    if plain := _PLAIN_WORD.match(text, place):  # most words, and no rule matches more of them
        return plain[0], plain.end()
    longest, length, change = None, place, None
    for rule, each in _RULES:
        match = rule.match(text, place)
        if match and match.end() > length:
            longest, length, change = match, match.end(), each
    if longest is None:
        return _SYMBOLS.get(text[place], text[place]), place + 1
    group = 1 if longest.re.groups else 0
    token = longest[group]
    return (change(token) if change else token.replace("\u00ad", "")), longest.end(group)


def _divide(token: str) -> tuple[str, ...]:
    cut = _SPLIT.get(token.lower())
    return (token,) if cut is None else (token[:cut], token[cut:])
