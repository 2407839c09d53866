"""The offline text is clean prose, and its evaluation part was never seen in calibration."""

import re
import sys

import pytest

pytest.importorskip("gensim")

from barber.data import wikipedia
from barber.errors import UserError

LEFTOVERS = {
    "bold or italics": r"''",
    "heading or attribute": r"=",
    "link, template or table": r"[\[\]{}|]",
    "tag": r"[<>]",
    "entity": r"&#?\w+;",
    "address": r"https?:|www\.|\bISBN\b",
    "magic word or list mark": r"__|(?m:^[*#:;!| ])",
    "file or caption": r"(?i)\b(file|image|category|wikt):\w|\bthumb\||\d+px\b",
    "empty or torn parenthesis": r"\(\s|\s\)|\(\s*[,;:]|\(\)",
    "blank before a point or a comma": r" [,;:!?)]| \.(?!\.)",
    "doubled blank": r"[^\S\n]{2}|[^\S\n ]|\n{3}",
    "doubled comma": r",\s*,",
    "invisible mark": r"[\x00-\x09\x0b-\x1f\x7f-\x9f\xad\u200b-\u200f\ue000-\uf8ff\ufff0-\uffff]",
}

WELL_KNOWN = {
    "Anarchism": "Anarchism is a political philosophy that advocates self-governed societies based on",
    "Abraham Lincoln": "Abraham Lincoln was the 16th President of the United States, serving from March 1861",
    "Animal Farm": "Animal Farm is an allegorical and dystopian novella by George Orwell, first published in",
    "Autism": "Autism is a neurodevelopmental disorder characterized by impaired social interaction",
}


def paragraphs(texts: list[str]) -> list[str]:
    return [paragraph for text in texts for paragraph in text.split("\n\n")]


def runs(text: str) -> set[tuple[str, ...]]:
    """Every 13 words in a row, lower-cased and without punctuation."""
    kept = "".join(c if c.isalnum() or c.isspace() else "" for c in text.lower())
    words = kept.split()
    return set(zip(*(words[i:] for i in range(13)), strict=False))


@pytest.mark.parametrize("pattern", LEFTOVERS.values(), ids=LEFTOVERS.keys())
def test_no_markup_is_left(pattern: str) -> None:
    found = {
        title: text[max(0, match.start() - 40) : match.end() + 40]
        for title, text in wikipedia.articles().items()
        if (match := re.search(pattern, text))
    }
    assert not found


def test_paragraphs_are_whole_sentences_and_none_is_repeated() -> None:
    every = paragraphs(list(wikipedia.articles().values()))
    assert len(set(every)) == len(every)
    for paragraph in every:
        assert re.search(r"""[.!?]["'”’)]*$""", paragraph), paragraph
        assert re.match(r"""["'“‘(]?[A-Z0-9]""", paragraph), paragraph
        assert len(paragraph) >= 120, paragraph


def test_only_articles_of_prose_remain() -> None:
    for title, text in wikipedia.articles().items():
        assert not title.startswith(("List of ", "Wikipedia:"))
        assert "disambiguation" not in title
        assert len(text) >= 2000, title


@pytest.mark.parametrize(("title", "sentence"), WELL_KNOWN.items(), ids=WELL_KNOWN.keys())
def test_a_known_article_begins_as_everybody_knows_it(title: str, sentence: str) -> None:
    assert wikipedia.articles()[title].startswith(sentence)


def test_markup_that_carries_text_is_rendered() -> None:
    """A foreign word comes from a template, a genitive stands after italics, and neither leaves a hole."""
    articles = wikipedia.articles()
    assert "respectively from the Greek ἀναρχία, i.e. anarchy" in articles["Anarchism"]
    assert "inspired many details in the Iliad's description of" in articles["Achilles"]


def test_the_parts_have_a_useful_size() -> None:
    calibration = sum(map(len, wikipedia.part("calibration")))
    evaluation = sum(map(len, wikipedia.part("evaluation")))
    assert calibration >= 1_400_000
    assert evaluation >= 500_000
    assert 0.2 < evaluation / (calibration + evaluation) < 0.3


def test_the_parts_share_no_run_of_13_words() -> None:
    seen = runs("\n\n".join(wikipedia.part("calibration")))
    assert len(seen) > 200_000
    assert not [p for p in paragraphs(wikipedia.part("evaluation")) if seen & runs(p)]


def test_a_shared_passage_is_left_out_of_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    def prose(subject: str) -> str:
        return " ".join(f"The {subject} of number {i} is unlike any other." for i in range(80))

    copied = "These thirteen words were written once and then copied by hand into another"
    twelve = "It was said: fourteen words were written once and then copied by hand into another, and so on."
    made = {"A": f"{prose('apple')}\n\n{copied} article.", "B": prose("bee"), "C": prose("cat")}
    made["D"] = f"{prose('dog')}\n\nIt was said: {copied.upper()}!\n\n{twelve}"
    monkeypatch.setattr(wikipedia, "articles", lambda: made)
    wikipedia.part.cache_clear()
    try:
        assert wikipedia.part("calibration") == [made["A"], made["B"], made["C"]]
        assert wikipedia.part("evaluation") == [f"{prose('dog')}\n\n{twelve}"]
    finally:
        wikipedia.part.cache_clear()


def test_a_second_reading_gives_the_same_text() -> None:
    first = wikipedia.articles(), wikipedia.part("calibration"), wikipedia.part("evaluation")
    wikipedia.articles.cache_clear()
    wikipedia.part.cache_clear()
    assert (wikipedia.articles(), wikipedia.part("calibration"), wikipedia.part("evaluation")) == first
    assert list(first[0]) == sorted(first[0])


@pytest.mark.parametrize("gone", ["package", "file"])
def test_missing_gensim_is_told_in_one_sentence(gone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if gone == "package":
        monkeypatch.setitem(sys.modules, "gensim", None)
    else:
        monkeypatch.setattr(wikipedia, "DUMP", "test/test_data/no_such_file.bz2")
    wikipedia.articles.cache_clear()
    wikipedia.part.cache_clear()
    with pytest.raises(UserError) as caught:
        wikipedia.part("evaluation")
    message = str(caught.value)
    assert message == 'the offline text needs gensim 4.4.0, install it with: pip install "llm-barber[demo]"'
