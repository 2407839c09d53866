"""Values that mean nothing are refused where they are given, in a sentence that begins with the field's name."""

from collections.abc import Callable
from typing import Any

import pytest

from barber import NM, Barber, DSnoT, Swaps, Unstructured, UserError
from barber.data.calibration import DocumentWindows, TextWindows, TokenSamples
from barber.data.datasets import DataSet
from barber.data.texts import Corpus, OfflineText
from barber.evals.agreement import Agreement
from barber.evals.windows import WindowProtocol
from barber.evals.zero_shot import ZeroShot
from barber.methods.patterns import Exactly
from barber.methods.pruners import GBLM, RIA, SparseGPT, WandaPlus
from barber.methods.updates import ADMM, ALPS, LeastSquares, Reconstruct, SparseGPTUpdate
from barber.runtime.cache import Cache
from barber.walk.allocation import OWL, ErrorCurves, EvoPress

NAN = float("nan")
Build = Callable[..., Any]


def data_set(**settings: Any) -> DataSet:
    return DataSet("org/name", **settings)


def corpus(**settings: Any) -> Corpus:
    return Corpus(data_set(), " ", **settings)


def by_document(**settings: Any) -> DocumentWindows:
    return DocumentWindows(data_set(), **settings)


def by_text(**settings: Any) -> TextWindows:
    return TextWindows(OfflineText("calibration"), **settings)


def from_file(**settings: Any) -> TokenSamples:
    return TokenSamples("ids.safetensors", **settings)


AT_LEAST_1 = "must be at least 1, not"
AT_LEAST_0 = "must be at least 0 and finite, not"
ABOVE_0 = "must be above 0 and finite, not"
#: What is made, the one setting that is out of range, and what the sentence says between its name and its value.
OUT_OF_RANGE: list[tuple[Build, str, Any, str]] = [
    *((Unstructured, "sparsity", value, "must be at least 0 and below 1, not") for value in (-0.1, 1, 1.5, NAN)),
    (Exactly, "num_pruned", -1, "must be at least 0, not"),
    *((Barber, "alpha", value, "must be from 0 to 1, not") for value in (-0.1, 1.1, NAN)),
    *((Barber, "rounds", value, AT_LEAST_1) for value in (0, -1)),
    (Barber, "rounds", 10**12, "must be at most 1000000, not"),
    (RIA, "exponent", float("inf"), AT_LEAST_0),
    (ADMM, "rho", float("inf"), ABOVE_0),
    (DSnoT, "cycles", 0, AT_LEAST_1),
    *((DSnoT, "threshold", value, AT_LEAST_0) for value in (-1.0, NAN)),
    *((Swaps, field, 0, AT_LEAST_1) for field in ("candidates", "rounds")),
    *((Swaps, "follow", value, "must be from 0 to 1, not") for value in (-0.1, 1.1, NAN)),
    (RIA, "exponent", -1, AT_LEAST_0),
    *((SparseGPT, "damping", value, AT_LEAST_0) for value in (-0.01, NAN)),
    (SparseGPT, "block_size", 0, AT_LEAST_1),
    *((made, "gradient_scale", value, AT_LEAST_0) for made in (WandaPlus, GBLM) for value in (-1.0, NAN)),
    (LeastSquares, "steps", 0, AT_LEAST_1),
    (LeastSquares, "damping", -1, AT_LEAST_0),
    (LeastSquares, "follow", 1.5, "must be from 0 to 1, not"),
    (SparseGPTUpdate, "damping", NAN, AT_LEAST_0),
    (SparseGPTUpdate, "block_size", 0, AT_LEAST_1),
    (ADMM, "iterations", 0, AT_LEAST_1),
    (ADMM, "rho", 0, ABOVE_0),
    (ADMM, "damping", -1, AT_LEAST_0),
    (ALPS, "iterations", 0, AT_LEAST_1),
    (ALPS, "steps", 0, AT_LEAST_1),
    (ALPS, "rho", -1, ABOVE_0),
    (ALPS, "damping", -1, AT_LEAST_0),
    (Reconstruct, "learning_rate", 0, ABOVE_0),
    (Reconstruct, "batch_size", 0, AT_LEAST_1),
    (Reconstruct, "epochs", 0, AT_LEAST_1),
    (OWL, "outlier", 0, ABOVE_0),
    (OWL, "spread", 0.5, "must be at least 0 and below 0.5, not"),
    (ErrorCurves, "spread", 0, "must be above 0 and below 1, not"),
    (ErrorCurves, "levels", 1, "must be at least 2, not"),
    (EvoPress, "generations", 0, AT_LEAST_1),
    (EvoPress, "offspring", 0, AT_LEAST_1),
    (EvoPress, "survivors", [4, 2], "must be whole numbers that end with 1, not"),
    (EvoPress, "step", 1, "must be above 0 and below 1, not"),
    *((made, "nsamples", 0, AT_LEAST_1) for made in (by_text, by_document, from_file)),
    *((made, "seqlen", 1, "must be at least 2, not") for made in (by_text, by_document, from_file)),
    *((data_set, "first", value, AT_LEAST_1) for value in (0, -1)),
    *((corpus, "max_windows", value, AT_LEAST_1) for value in (0, -1)),
    (WindowProtocol, "seqlen", 1, "must be at least 2, not"),
    (WindowProtocol, "max_windows", 0, AT_LEAST_1),
    (Agreement, "block_positions", 0, AT_LEAST_1),
    (ZeroShot, "num_fewshot", -1, "must be at least 0, not"),
    (ZeroShot, "batch_size", 0, AT_LEAST_1),
    (ZeroShot, "limit", 0, AT_LEAST_1),
]


@pytest.mark.parametrize(("made", "field", "value", "words"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused(made: Build, field: str, value: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        made(**{field: value})
    assert str(caught.value) == f"{field} {words} {value}"


TOGETHER: list[tuple[Build, dict[str, Any], str]] = [
    (NM, {"n": 0, "m": 4}, "n must be at least 1, not 0"),
    (NM, {"n": 4, "m": 4}, "n must be below m (4), not 4"),
    (NM, {"n": 8, "m": 4}, "n must be below m (4), not 8"),
    (NM, {"n": 1, "m": 0}, "m must be at least 1, not 0"),
    (
        EvoPress,
        {"survivors": [2, 1], "tokens": [64]},
        "tokens must be as many numbers above 0 as survivors has (2), not [64]",
    ),
    (WindowProtocol, {"stride": 0, "seqlen": 8}, "stride must be between 1 and seqlen (8), not 0"),
    (WindowProtocol, {"stride": 9, "seqlen": 8}, "stride must be between 1 and seqlen (8), not 9"),
    (ZeroShot, {"tasks": []}, "tasks must name a task at least"),
    (Cache, {"max_gib": 0}, "max_gib must be above 0, not 0; cache=off does without"),
]


@pytest.mark.parametrize(("made", "settings", "sentence"), TOGETHER)
def test_settings_that_do_not_go_together_are_refused(made: Build, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        made(**settings)
    assert str(caught.value) == sentence
