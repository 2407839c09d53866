"""A text cut into windows: which tokens they hold, which of them are scored, and what the record says of it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from barber.data.datasets import DataSet
from barber.data.texts import Corpus, OfflineText, Text, Tokens
from barber.errors import UserError
from barber.evals.windows import WindowProtocol, Windows
from barber.runtime.plain import plain
from tests import tiny

QUICK = settings(deadline=None, derandomize=True, max_examples=200)
PLAIN = OfflineText("evaluation")  # no more than a text without limits of its own: it is never read
BOS = 256
bos = pytest.mark.parametrize("bos", [False, True], ids=["without BOS", "with BOS"])


def tokenizer(bos: bool = True) -> PreTrainedTokenizerBase:
    """One that maps every byte to an id, and has a BOS token or none."""
    made = tiny.tokenizer()
    if bos:
        made.add_special_tokens({"bos_token": "<s>"})
    return made


def counted(count: int) -> Tokens:
    """The ids 1000, 1001, ...: every id tells where in the text it stands."""
    return Tokens(torch.arange(1000, 1000 + count), f"{count} ids")


def corpus(max_windows: int | None = None) -> Corpus:
    return Corpus(DataSet("nobody/nothing"), separator="\n\n", max_windows=max_windows)


def cut(count: int, text: Text = PLAIN, bos: bool = False, **protocol: int | None) -> Windows:
    return WindowProtocol(bos=bos, **protocol).cut(text, counted(count), tokenizer() if bos else None)


@pytest.mark.parametrize(("count", "windows"), [(12, 1), (23, 1), (24, 2), (41, 3)])
def test_windows_follow_one_another_and_what_does_not_fill_one_is_dropped(count: int, windows: int) -> None:
    expected = [list(range(1000 + 12 * i, 1012 + 12 * i)) for i in range(windows)]
    found = cut(count, seqlen=12)
    assert found.tokens_NL.tolist() == expected
    assert [found.scored(i) for i in range(windows)] == [slice(0, 11)] * windows  # all but the first


@bos
@pytest.mark.parametrize(
    ("own", "of_the_text", "kept"), [(None, None, 5), (2, None, 2), (None, 3, 3), (2, 3, 2), (4, 3, 3), (9, 9, 5)]
)
def test_the_smaller_of_the_limits_takes_the_first_windows(
    own: int | None, of_the_text: int | None, kept: int, bos: bool
) -> None:
    windows = cut(50, corpus(of_the_text), bos, seqlen=10, max_windows=own)
    assert torch.equal(windows.tokens_NL, cut(50, bos=bos, seqlen=10).tokens_NL[:kept])
    limits = [limit for limit in (own, of_the_text) if limit is not None]
    assert windows.protocol.max_windows == min(limits, default=None)


@st.composite
def protocols(draw: st.DrawFn) -> tuple[int, int, int | None, bool]:
    """Tokens of a text, seqlen, stride, bos."""
    seqlen = draw(st.integers(2, 20))
    stride = draw(st.none() | st.integers(1, seqlen))
    return draw(st.integers(seqlen, 120)), seqlen, stride, draw(st.booleans())


def scored_places(windows: Windows) -> list[int]:
    """Where in the text the scored tokens stand, in the order in which they are scored."""
    places = []
    for number, window_L in enumerate(windows.tokens_NL.tolist()):
        scored = windows.scored(number)
        places += [token - 1000 for token in window_L[scored.start + 1 : scored.stop + 1]]
    return places


@QUICK
@given(protocols())
def test_every_token_is_scored_at_most_once_and_in_order(protocol: tuple[int, int, int | None, bool]) -> None:
    count, seqlen, stride, bos = protocol
    places = scored_places(cut(count, bos=bos, seqlen=seqlen, stride=stride))
    assert places == sorted(set(places))
    assert places[-1] < count


@QUICK
@given(protocols())
def test_no_token_is_left_out_where_windows_overlap_or_begin_with_bos(
    protocol: tuple[int, int, int | None, bool],
) -> None:
    count, seqlen, stride, bos = protocol
    windows = cut(count, bos=bos, seqlen=seqlen, stride=stride)
    places = scored_places(windows)
    if bos or windows.stride < seqlen:
        # without a BOS nothing stands before the text's first token
        assert places == list(range(0 if bos else 1, places[-1] + 1))
        assert places[-1] >= count - windows.stride
    else:  # the papers' protocol: a window's first token has nothing before it
        assert places == [place for place in range(places[-1] + 1) if place % seqlen]


@QUICK
@given(protocols())
def test_a_token_is_scored_with_all_the_context_that_its_window_has(
    protocol: tuple[int, int, int | None, bool],
) -> None:
    """Every window but the first scores its last `stride` tokens: none of them has less before it than the others."""
    count, seqlen, stride, bos = protocol
    windows = cut(count, bos=bos, seqlen=seqlen, stride=stride)
    for number in range(1, len(windows.tokens_NL)):
        scored = windows.scored(number)
        assert scored.stop == seqlen - 1
        assert scored.stop - scored.start == min(windows.stride, seqlen - 1)


@pytest.mark.parametrize("stride", [None, 3, 9, 10])
def test_each_window_begins_with_bos_which_counts_as_one_of_its_tokens(stride: int | None) -> None:
    windows = cut(50, bos=True, seqlen=10, stride=stride)
    step = min(stride or 9, 9)
    assert windows.tokens_NL.shape[1] == 10
    assert windows.tokens_NL.tolist() == [
        [BOS, *range(1000 + start, 1009 + start)] for start in range(0, 50 - 9 + 1, step)
    ]


@pytest.mark.parametrize("stride", [None, 3])
def test_a_bos_at_the_start_of_the_text_is_not_doubled(stride: int | None) -> None:
    protocol = WindowProtocol(seqlen=10, stride=stride, bos=True)
    plain = counted(50)
    begun = Tokens(torch.cat([torch.tensor([BOS]), plain.tokens_T]), plain.source)
    windows = [protocol.cut(PLAIN, tokens, tokenizer()) for tokens in (begun, plain)]
    assert torch.equal(windows[0].tokens_NL, windows[1].tokens_NL)
    assert torch.equal(plain.tokens_T, counted(50).tokens_T)  # the text's own ids are left alone


def test_without_the_option_the_text_begins_as_the_tokenizer_has_it() -> None:
    begun = Tokens(torch.cat([torch.tensor([BOS]), torch.arange(1000, 1019)]), "ids")
    windows = WindowProtocol(seqlen=10).cut(PLAIN, begun, tokenizer())
    assert windows.tokens_NL[:, 0].tolist() == [BOS, 1009]


@pytest.mark.parametrize("own", [tokenizer(bos=False), None], ids=["no BOS token", "no tokenizer"])
def test_bos_needs_a_tokenizer_that_has_one(own: PreTrainedTokenizerBase | None) -> None:
    with pytest.raises(
        UserError, match=r"^bos must be false, the model's tokenizer has no beginning-of-sequence token"
    ):
        WindowProtocol(seqlen=10, bos=True).cut(PLAIN, counted(50), own)


@pytest.mark.parametrize(("count", "bos", "most"), [(9, False, 9), (8, True, 9), (0, False, 0)])
def test_a_text_shorter_than_a_window_is_refused(count: int, bos: bool, most: int) -> None:
    message = rf"^seqlen must be at most {most}, the tokens of the text \({count} ids\), not 10$"
    with pytest.raises(UserError, match=message) as caught:
        cut(count, bos=bos, seqlen=10)
    assert caught.value.field == "seqlen"
    assert most < 2 or len(cut(count, bos=bos, seqlen=most).tokens_NL) == 1


def test_the_record_says_how_the_windows_were_made() -> None:
    windows = cut(50, corpus(4), bos=True, seqlen=10, stride=7)
    assert plain(windows.protocol) == {
        "text": "50 ids",
        "text_tokens": 50,
        "seqlen": 10,
        "stride": 7,
        "bos": True,
        "max_windows": 4,
        "separator": "\n\n",
    }
    assert windows.source == "50 ids"
    assert "separator" not in plain(cut(50, seqlen=10).protocol)  # only joined rows have one


def test_the_digest_is_that_of_the_ids_and_of_what_of_them_is_scored() -> None:
    tokens_NL, protocol = torch.arange(24).reshape(2, 12), cut(24, seqlen=12).protocol
    changed_NL = tokens_NL.clone()
    changed_NL[1, 11] = 0
    made = [
        Windows(tokens_NL, 12, "a text", protocol),
        Windows(changed_NL, 12, "a text", protocol),
        Windows(tokens_NL, 6, "a text", protocol),
        Windows(tokens_NL.reshape(3, 8), 12, "a text", protocol),
        Windows(tokens_NL.reshape(1, 24), 12, "a text", protocol),
    ]
    assert len({windows.digest for windows in made}) == len(made)
    elsewhere = Windows(tokens_NL.clone(), 12, "the same text in another place", replace(protocol, text="another"))
    assert elsewhere.digest == made[0].digest
    by_columns = Windows(tokens_NL.T.contiguous().T, 12, "a text", protocol)
    assert by_columns.digest == made[0].digest
