"""Real English prose with no download: the Wikipedia articles that gensim 4.4.0 installs with its tests.

Calibration and perplexity need text that people wrote, and a machine that runs experiments may be offline.
The test data of gensim hold an excerpt of the English Wikipedia dump of 2016: about a hundred whole articles
whose titles begin with A (text under CC BY-SA 3.0).  This file turns their wikitext into clean paragraphs.

gensim's own `filter_wiki` is not used.  It deletes templates and formulas without a trace, and afterwards a
sentence like "from the Greek , i.e. anarchy" cannot be told from a good one.  Here what cannot be rendered
becomes a `HOLE`, and a paragraph that still has one at the end is dropped.  Most of the prose survives and
there is text to spare, so every rule drops a paragraph when in doubt.
"""

import bz2
import functools
import html
import importlib
import io
import re
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Literal

from barber.errors import UserError

DUMP = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
MISSING = 'the offline text needs gensim 4.4.0, install it with: pip install "llm-barber[demo]"'

# Characters of prose: a shorter article is a stub or a disambiguation page, a shorter line is a caption.
MIN_ARTICLE = 2000
MIN_PARAGRAPH = 120

# Words in a row that make a shared passage: the length at which the GPT-3 paper looks for its tests in
# its training text.
RUN = 13

# How a line begins that is code, a heading, a list item or a row of a table.
NO_PARAGRAPH = (" ", "=", "*", "#", ":", ";", "|", "!", "{")

HOLE = "\ufffc"  # Unicode's own mark for an object that the text cannot show

# Templates that a reader sees as a footnote mark, as an editor's raised remark, or not at all.
SILENT = re.compile(
    r"sfnp?|rp|efn|refn|#tag:ref|cn|clarify|when|who|which|where|(by|according to) whom|vague|dubious|full"
    r"|update( after| inline)?|better source|failed verification|verify source|unreliable source\?"
    r"|(disputed|relevance) inline|weasel-inline|anchor|pp-.*|use .*|.* needed"
)
# Templates that style or label their last argument.
STYLE = re.compile(r"lang|transl|nowrap|small(er)?|big|nobold|sc|script|linktext|angbr")
SYMBOL = {"'s": "'s", "'": "'", "nbsp": " ", "snd": " – ", "spaced ndash": " – ", "ndash": "–", "mdashb": "—"}

# A hole, markup that did not parse, an address, or the blanks and doubled points around words that are gone.
BROKEN = re.compile(
    HOLE + r"|[<>{}\[\]|=_*~^`\\]|https?:|www\.|\bISBN\b"
    r"| [,.;:!?)](?!\.)|\( |\(\s*[,;]|,,|(?<!\.)\.\.(?!\.)"
)


@functools.cache
def articles() -> dict[str, str]:
    """Title to prose, paragraphs joined by a blank line, in title order; no lists and no stubs."""
    seen: set[str] = set()
    found: dict[str, str] = {}
    for title, source in sorted(_pages()):
        if title.startswith("List of "):
            continue
        paragraphs = [p for p in dict.fromkeys(_paragraphs(source)) if p not in seen]
        seen.update(paragraphs)
        text = "\n\n".join(paragraphs)
        if len(text) >= MIN_ARTICLE:
            found[title] = text
    return found


@functools.cache
def part(name: Literal["calibration", "evaluation"]) -> list[str]:
    """The articles of one part, in title order: every fourth is for evaluation, the others for calibration.

    Articles on one subject copy from one another, and a perplexity on text seen in calibration flatters the
    method.  So an evaluation paragraph with `RUN` words in a row from the calibration part is left out.
    """
    texts = list(articles().values())
    calibration = [text for i, text in enumerate(texts) if i % 4 != 3]
    if name == "calibration":
        return calibration
    taken = {run for text in calibration for run in _runs(text)}
    kept = ["\n\n".join(p for p in text.split("\n\n") if taken.isdisjoint(_runs(p))) for text in texts[3::4]]
    return [text for text in kept if len(text) >= MIN_ARTICLE]


def _runs(text: str) -> Iterator[str]:
    words = re.findall(r"\w+", text.lower())
    return (" ".join(words[i : i + RUN]) for i in range(len(words) - RUN + 1))


def _pages() -> list[tuple[str, str]]:
    """Title and wikitext of every page of the excerpt."""
    try:
        packed = files("gensim").joinpath(DUMP).read_bytes()
        wikicorpus = importlib.import_module("gensim.corpora.wikicorpus")
    except (ImportError, FileNotFoundError) as error:
        raise UserError(MISSING) from error
    dump = io.BytesIO(bz2.decompress(packed))
    return [(title, text) for title, text, _ in wikicorpus.extract_pages(dump, filter_namespaces=("0",))]


def _paragraphs(source: str) -> Iterator[str]:
    """The lines of a page that are flowing prose; in wikitext a paragraph is one line."""
    for line in _plain(source).split("\n"):
        if line.startswith(NO_PARAGRAPH):
            continue
        line = _tidy(line)
        if _is_prose(line):
            yield line


def _plain(text: str) -> str:
    """Wikitext without its markup, with a `HOLE` wherever something that a reader would see is gone."""
    text = re.sub(r"(?s)<!--.*?-->", "", text)
    text = re.sub(r"(?is)<ref\b[^>]*/>|<ref\b.*?</ref>", "", text)
    text = re.sub(r"(?is)<(math|gallery|source|timeline|code|pre|s)\b.*?</\1>", HOLE, text)
    text = re.sub(r"\[(?:https?:|ftp:)?//[^\s\]]+ ?([^\]\n]*)\]", r"\1", text)
    text = _inside_out(r"\[\[([^\[\]]*)\]\]", _link, text)
    text = _inside_out(r"\{\{((?:(?!\{\{|\}\}).)*)\}\}", _template, text)
    text = _inside_out(r"\{\|(?:(?!\{\||\|\}).)*\|\}", lambda _: "\n", text)
    text = re.sub(r"(?i)<sub>(\d+)</sub>|<sup>(st|nd|rd|th)</sup>", r"\1\2", text)
    text = re.sub(r"(?is)<(su[bp])\b.*?</\1>", HOLE, text)  # 10<sup>6</sup> is not 106
    text = re.sub(r"(?i)</?(br|p|div|center|blockquote|poem|hr|li|ol|ul)\b[^>]*>", "\n", text)
    text = re.sub(r"(?i)</?(small|big|span|i|b|u|em|strong|tt|cite|nowiki|onlyinclude)\b[^>]*>", "", text)
    text = re.sub(r"(?<!')''(?!')([^'\n]+)'''s\b", r"\1's", text)  # ''Iliad'''s: italics, then a genitive
    text = re.sub(r"'{2,}", "", text)
    return html.unescape(html.unescape(text))  # the dump escapes once more what the editors escaped


def _inside_out(pattern: str, replace: Callable[[re.Match[str]], str], text: str) -> str:
    """Replace the innermost matches until none is left, because wiki markup nests."""
    count = 1
    while count:
        text, count = re.subn(pattern, replace, text, flags=re.DOTALL)
    return text


def _link(match: re.Match[str]) -> str:
    target, _, label = match[1].partition("|")
    if re.match(r"(?i)\s*(file|image|category)\s*:", target):
        return ""  # with its caption, which would break into the paragraph around it
    return label or target


def _template(match: re.Match[str]) -> str:
    name, *arguments = (piece.strip() for piece in match[1].split("|"))
    name = name.lower()
    if name in SYMBOL:
        return SYMBOL[name]
    if SILENT.fullmatch(name):
        return ""
    if STYLE.fullmatch(name) and arguments:
        return arguments[-1]
    return HOLE + "\n" if "\n" in match[1] else HOLE  # a box of several lines stands before its paragraph


def _tidy(line: str) -> str:
    """Take out what a sentence can stand without: parentheses with a hole, invisible marks, blanks."""
    line = re.sub(r"[\u00ad\u200b-\u200f\u202a-\u202e\ufeff]", "", line)
    line = re.sub(r"\s*\((?:[^()]|\([^()]*\))*\)", lambda m: "" if HOLE in m[0] else m[0], line)
    line = re.sub(r"\s*\(\s*[,;]?\s*\)", "", line)
    return re.sub(r"\s+", " ", line).strip()


def _is_prose(line: str) -> bool:
    return (
        len(line) >= MIN_PARAGRAPH
        and re.match(r"[\"'“‘(]?[A-Z0-9]", line) is not None
        and re.search(r"[.!?][\"'”’)]*$", line) is not None
        and BROKEN.search(line) is None
        and line.count("(") == line.count(")")
        and line.count('"') % 2 == 0
    )
