"""The dense model's results are kept for the same measurement, and for no other."""

import copy
import json
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from barber.data.texts import Text
from barber.evals.agreement import Agreement
from barber.evals.evaluation import Evaluation, Prepared
from barber.evals.placement import Placement
from barber.evals.results import PerplexityResult, StageResults
from barber.evals.windows import WindowProtocol
from barber.model.decoder import Decoder
from barber.runtime.cache import Cache
from tests import tiny
from tests.evals.measuring import Ids, quiet

CPU = torch.device("cpu")
LENGTH = 12
COUNT = 5 * LENGTH

both = pytest.mark.parametrize("placement", ["whole", "layers"])
kinds = pytest.mark.parametrize("agreement", [None, Agreement(10)], ids=["perplexity", "perplexity and agreement"])


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the dense models' results, empty at first."""
    monkeypatch.setenv("BARBER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kept" / "results"


def prepared(
    texts: dict[str, Text] | None = None,
    seqlen: int = LENGTH,
    stride: int | None = None,
    bos: bool = False,
    max_windows: int | None = None,
    perplexity: bool = True,
    agreement: Agreement | None = None,
    batch_size: int | None = 2,
    placement: Placement = "whole",
    cache: bool = True,
) -> Prepared:
    spec = Evaluation(
        stages=["dense", "pruned", "rebuilt"],
        texts=texts or {"text": Ids(COUNT)},
        windows=[WindowProtocol(seqlen, stride, bos, max_windows)],
        perplexity=perplexity,
        agreement=agreement,
        batch_size=batch_size,
        placement=placement,
    )
    return spec.prepare(None, Path("nowhere"), Cache() if cache else None)


def measure(model: PreTrainedModel, evaluation: Prepared, stage: Any = "dense") -> StageResults:
    results = evaluation.measure(stage, model, CPU, quiet)
    return results or StageResults()


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("the model runs")


def at_rest(model: PreTrainedModel) -> PreTrainedModel:
    """A model that cannot be run."""
    model.forward = never
    for layer in Decoder(model).layers:
        layer.module.register_forward_pre_hook(never)
    return model


def plain(results: StageResults) -> dict[str, PerplexityResult]:
    """The results of the perplexities without the note that they were kept."""
    return {text: replace(result, cached=None) for text, result in results.perplexity.items()}


def hits(results: StageResults) -> list[str]:
    """The texts whose perplexity was kept."""
    return [text for text, result in results.perplexity.items() if result.cached is not None]


def entries(kept: Path) -> list[Path]:
    return sorted(kept.iterdir()) if kept.exists() else []


@both
@kinds
def test_the_second_time_the_results_are_the_same_and_the_model_does_not_run(
    kept: Path, agreement: Agreement | None, placement: Placement
) -> None:
    first = measure(tiny.model(), prepared(agreement=agreement, placement=placement))
    again = measure(at_rest(tiny.model()), prepared(agreement=agreement, placement=placement))
    assert hits(first) == []
    assert hits(again) == ["text"]
    assert plain(again) == plain(first)
    assert len(entries(kept)) == 1


def test_kept_results_say_when_they_were_measured(kept: Path) -> None:
    measure(tiny.model(), prepared())
    (entry,) = entries(kept)
    measured = json.loads((entry / "results.json").read_text())["measured"]
    assert measure(tiny.model(), prepared()).perplexity["text"].cached == measured
    assert measured.endswith("+00:00")


def test_every_text_has_an_entry_of_its_own(kept: Path) -> None:
    one, two = Ids(COUNT, 5), Ids(COUNT, 6)
    measure(tiny.model(), prepared({"one": one}))
    results = measure(tiny.model(), prepared({"one": one, "two": two}))
    assert hits(results) == ["one"]
    assert hits(measure(at_rest(tiny.model()), prepared({"two": two, "one": one}))) == ["two", "one"]
    assert len(entries(kept)) == 2


def test_the_same_ids_found_elsewhere_are_the_same_text(kept: Path) -> None:
    measure(tiny.model(), prepared({"text": Ids(COUNT, source="the hub")}))
    results = measure(at_rest(tiny.model()), prepared({"other": Ids(COUNT, source="a folder")}))
    assert hits(results) == ["other"]
    assert results.perplexity["other"].protocol.text == "a folder"


def changed_weight(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] += 2**-10


def changed_norm(model: PreTrainedModel) -> None:
    model.model.norm.weight.data[0] *= 1 + 2**-20


def swapped_weights(model: PreTrainedModel) -> None:
    q, o = (getattr(model.model.layers[0].self_attn, name).weight for name in ("q_proj", "o_proj"))
    q.data, o.data = o.data, q.data


def changed_config(model: PreTrainedModel) -> None:
    model.config.rms_norm_eps *= 2


def changed_dtype(model: PreTrainedModel) -> None:
    model.bfloat16()


@pytest.mark.parametrize(
    "change", [changed_weight, changed_norm, swapped_weights, changed_config, changed_dtype], ids=lambda f: f.__name__
)
@kinds
def test_another_model_is_measured_anew(
    kept: Path, change: Callable[[PreTrainedModel], None], agreement: Agreement | None
) -> None:
    measure(tiny.model(), prepared(agreement=agreement))
    model = tiny.model()
    change(model)
    assert hits(measure(model, prepared(agreement=agreement))) == []
    assert len(entries(kept)) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"seqlen": LENGTH - 1},
        {"stride": 5},
        {"max_windows": 2},
        {"batch_size": 1},
        {"placement": "layers"},
        {"texts": {"text": Ids(COUNT, 6)}},
        {"agreement": Agreement(10)},
    ],
    ids=str,
)
def test_another_measurement_is_made_anew(kept: Path, change: dict[str, Any]) -> None:
    measure(tiny.model(), prepared())
    assert hits(measure(tiny.model(), prepared(**change))) == []
    assert hits(measure(tiny.model(), prepared(**change))) == ["text"]


def test_other_positions_of_the_blocks_are_taken_down_anew(kept: Path) -> None:
    measure(tiny.model(), prepared(agreement=Agreement(10)))
    assert hits(measure(tiny.model(), prepared(agreement=Agreement(11)))) == []


def test_the_number_of_threads_counts(kept: Path) -> None:
    """It changes the last bits of sums."""
    measure(tiny.model(), prepared())
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert hits(measure(tiny.model(), prepared())) == []
    finally:
        torch.set_num_threads(before)
    assert hits(measure(tiny.model(), prepared())) == ["text"]


def test_so_is_an_initially_pruned_model(kept: Path) -> None:
    """Every rebuilding in a sweep begins with the same one."""
    evaluation = prepared(agreement=Agreement(10))
    measure(tiny.model(), evaluation)
    first = measure(tiny.model(seed=1), evaluation, "pruned")
    again = measure(at_rest(tiny.model(seed=1)), evaluation, "pruned")
    assert hits(again) == ["text"] and plain(again) == plain(first)
    assert again.agreement["text"].kl_divergence == first.agreement["text"].kl_divergence > 0


def test_its_agreement_is_that_with_the_same_dense_model(kept: Path) -> None:
    for dense in (tiny.model(), tiny.model(seed=2)):
        evaluation = prepared(agreement=Agreement(10))
        measure(dense, evaluation)
        assert hits(measure(tiny.model(seed=1), evaluation, "pruned")) == []


def test_the_rebuilt_model_is_always_measured(kept: Path) -> None:
    measure(tiny.model(), prepared(), "rebuilt")
    assert entries(kept) == []
    measure(tiny.model(), prepared())
    assert hits(measure(tiny.model(), prepared(), "rebuilt")) == []


def test_without_a_cache_nothing_is_written_or_used(kept: Path) -> None:
    measure(tiny.model(), prepared(cache=False))
    assert not kept.parents[1].exists()
    measure(tiny.model(), prepared())
    assert hits(measure(tiny.model(), prepared(cache=False))) == []


BROKEN = {
    "empty": b"",
    "cut off": b'{"measured": "2026',
    "no object": b"[1, 2]",
    "null": b"null",
    "without results": b'{"measured": "2026"}',
    "no text": b"\xff\xfe\x00",
}


@kinds
@pytest.mark.parametrize("content", list(BROKEN.values()), ids=list(BROKEN))
def test_broken_results_are_measured_anew(kept: Path, content: bytes, agreement: Agreement | None) -> None:
    first = measure(tiny.model(), prepared(agreement=agreement))
    (entry,) = entries(kept)
    (entry / "results.json").write_bytes(content)
    again = measure(tiny.model(), prepared(agreement=agreement))
    assert hits(again) == []
    assert plain(again) == plain(first)


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [Path.unlink, emptied, cut_off], ids=lambda damage: damage.__name__)
def test_a_broken_reference_is_measured_anew(kept: Path, damage: Callable[[Path], None]) -> None:
    first = measure(tiny.model(), prepared(agreement=Agreement(10)))
    (entry,) = entries(kept)
    damage(entry / "reference.safetensors")
    evaluation = prepared(agreement=Agreement(10))
    again = measure(tiny.model(), evaluation)
    assert hits(again) == []
    assert plain(again) == plain(first)
    assert measure(tiny.model(), evaluation, "pruned").agreement["text"].kl_divergence == 0


@pytest.mark.parametrize("file", ["results.json", "reference.safetensors"])
def test_what_was_broken_is_whole_again_afterwards(kept: Path, file: str) -> None:
    measure(tiny.model(), prepared(agreement=Agreement(10)))
    (entry,) = entries(kept)
    (entry / file).write_bytes(b"")
    measure(tiny.model(), prepared(agreement=Agreement(10)))
    assert hits(measure(tiny.model(), prepared(agreement=Agreement(10)))) == ["text"]
    assert entries(kept) == [entry]


@kinds
def test_a_folder_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, agreement: Agreement | None
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BARBER_CACHE", str(tmp_path / "file" / "cache"))
    evaluation = prepared(agreement=agreement)
    with caplog.at_level(logging.WARNING, logger="barber"):
        results = measure(tiny.model(), evaluation)
    (warning,) = caplog.records
    assert warning.getMessage().startswith("The results are not kept for other runs: ")
    assert plain(results) == plain(measure(tiny.model(), prepared(cache=False)))
    if agreement is not None:
        assert measure(tiny.model(), evaluation, "pruned").agreement["text"].kl_divergence == 0


def test_a_full_disk_costs_a_warning_and_leaves_nothing(
    kept: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("barber.evals.cache.save_file", full)
    with caplog.at_level(logging.WARNING, logger="barber"):
        measure(tiny.model(), prepared(agreement=Agreement(10)))
    (warning,) = caplog.records
    assert "No space left on device" in warning.getMessage()
    monkeypatch.undo()
    assert hits(measure(tiny.model(), prepared(agreement=Agreement(10)))) == []


def test_another_run_waits_for_the_results_instead_of_computing_them(
    kept: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slow, waiting = tiny.model(), threading.Event()
    results: list[StageResults] = []
    other = threading.Thread(target=lambda: results.append(measure(at_rest(tiny.model()), prepared())))

    def begin_the_other(*_: Any) -> None:
        if not other.ident:
            other.start()
            assert not waiting.wait(0.2)  # it gets nowhere

    slow.lm_head.register_forward_hook(begin_the_other)
    with caplog.at_level(logging.INFO, logger="barber"):
        first = measure(slow, prepared())
        other.join(10)
    assert hits(results[0]) == ["text"] and plain(results[0]) == plain(first)
    assert [record.getMessage() for record in caplog.records] == [
        "Waiting for the dense model's results on text, which another run computes."
    ]


@both
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_kept_model_is_compared_with_exactly_like_a_fresh_one(
    kept: Path, family: str, dtype: torch.dtype, placement: Placement
) -> None:
    sparse = tiny.model(family).to(dtype)
    for linear in Decoder(sparse).linears:
        linear.module.weight.data[::2] = 0
    results = []
    for model in (tiny.model(family).to(dtype), at_rest(tiny.model(family).to(dtype))):
        evaluation = prepared({"one": Ids(COUNT), "two": Ids(40, 6)}, agreement=Agreement(10), placement=placement)
        measure(model, evaluation)
        results.append(measure(copy.deepcopy(sparse), evaluation, "rebuilt"))
    assert results[1] == results[0]
    assert results[0].agreement["one"].kl_divergence > 0
    assert len(entries(kept)) == 2


def test_agreement_alone_is_kept_too(kept: Path) -> None:
    results = []
    for model in (tiny.model(), at_rest(tiny.model())):
        evaluation = prepared(perplexity=False, agreement=Agreement(10))
        assert measure(model, evaluation) == StageResults()
        results.append(measure(tiny.model(seed=1), evaluation, "rebuilt"))
    assert results[1] == results[0]
