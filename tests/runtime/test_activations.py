"""Where activations wait changes no bit of what is done with them, and the disk is left as it was."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from barber import Barber, BlockReport, Magnitude, NumericsError, SparseGPT, Unstructured, Wanda
from barber.evals.forward import Forward
from barber.evals.placement import placed
from barber.methods.pruners import Pruner
from barber.runtime.activations import SETS, ActivationStore, Place
from barber.runtime.precision import Precision
from barber.walk.walk import Schedule
from tests import tiny
from tests.pruning import prune

CPU = torch.device("cpu")
GIB = 2**30
OPEN_FILES = Path("/proc/self/fd")
PLACES: list[Place] = ["device", "host", "disk"]
every_place = pytest.mark.parametrize("place", PLACES)


def files_without_a_name(folder: Path) -> list[str]:
    """What this process has open in a folder although no name leads there any more; nothing where one cannot tell."""
    links = []
    for number in os.listdir(OPEN_FILES) if OPEN_FILES.is_dir() else ():
        with suppress(OSError):
            links.append(os.readlink(OPEN_FILES / number))
    return [link for link in links if link.startswith(f"{folder}/") and link.endswith(" (deleted)")]


@st.composite
def contents(draw: st.DrawFn) -> tuple[torch.Tensor, list[slice]]:
    """Numbers (N, L, D) of one of the dtypes, and slices of samples that cover them in any order, twice in part."""
    num_samples, seqlen, width = (draw(st.integers(1, most)) for most in (7, 4, 5))
    seed = draw(st.integers(0, 2**16))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    numbers_NLD = torch.randn(num_samples, seqlen, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    cuts = sorted({0, num_samples, *draw(st.lists(st.integers(0, num_samples), max_size=4))})
    slices = [slice(start, stop) for start, stop in pairwise(cuts)]
    return numbers_NLD, draw(st.permutations([*slices, draw(st.sampled_from(slices))]))


@every_place
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=contents(), odd=st.sampled_from(["as they are", "tokens in one row", "not contiguous"]))
def test_what_is_written_by_slices_is_read_back_bit_by_bit(
    place: Place, content: tuple[torch.Tensor, list[slice]], odd: str, tmp_path: Path
) -> None:
    numbers_NLD, slices = content
    activations = ActivationStore(place, CPU, numbers_NLD.dtype, tmp_path).empty(*numbers_NLD.shape)
    assert (activations.shape, activations.dtype) == (tuple(numbers_NLD.shape), numbers_NLD.dtype)
    for batch in slices:
        value = numbers_NLD[batch]
        if odd == "tokens in one row":
            value = value.flatten(0, 1)
        if odd == "not contiguous":
            value = value.transpose(1, 2).contiguous().transpose(1, 2)
        activations[batch] = value
    for batch in [*slices, slice(None), slice(1, None), slice(None, -1), slice(-2, None), slice(0, 10**6)]:
        read = activations[batch]
        assert read.dtype == numbers_NLD.dtype
        assert torch.equal(read, numbers_NLD[batch])


@every_place
def test_slices_are_rewritten_rounded_or_kept_with_their_bits(place: Place, tmp_path: Path) -> None:
    activations = ActivationStore(place, CPU, torch.float32, tmp_path).empty(5, 2, 3)
    activations[0:5] = torch.zeros(5, 2, 3)
    activations[1:3] = torch.ones(2, 2, 3)
    assert activations[0:5].sum(dim=(1, 2)).tolist() == [0, 6, 6, 0, 0]
    odd_NLD = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-42, 3e38]).reshape(1, 2, 3)
    activations[4:5] = odd_NLD
    assert torch.equal(activations[4:5].view(torch.int32), odd_NLD.view(torch.int32))
    numbers_NLD = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    rounded = ActivationStore(place, CPU, torch.bfloat16, tmp_path).empty(3, 2, 4)
    rounded[0:3] = numbers_NLD
    assert torch.equal(rounded[0:3], numbers_NLD.bfloat16())


def test_auto_takes_the_first_place_with_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def of(num_bytes: int) -> Any:
        store = ActivationStore("auto", CPU, torch.float32, tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr("barber.runtime.activations.physical_memory", lambda _: num_bytes)
            return store.empty(4, 8, 16)

    needed = SETS * 4 * 8 * 16 * 4
    assert type(of(GIB)) is type(ActivationStore("device", CPU, torch.float32).empty(4, 8, 16))
    assert type(of(needed * 5 // 2 + 8)) is type(of(GIB))
    assert type(of(needed * 5 // 2 - 8)) is type(ActivationStore("disk", CPU, torch.float32).empty(4, 8, 16))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not OPEN_FILES.is_dir(), reason="no list of open files here")
def test_the_file_has_no_name_from_the_beginning_and_goes_with_its_owner(tmp_path: Path) -> None:
    activations = ActivationStore("disk", CPU, torch.float32, tmp_path).empty(3, 2, 4)
    activations[0:3] = torch.ones(3, 2, 4)
    assert list(tmp_path.iterdir()) == []
    assert len(files_without_a_name(tmp_path)) == 1
    del activations
    assert files_without_a_name(tmp_path) == []


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise AssertionError(f"it takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_file_that_is_too_short_is_no_endless_loop(tmp_path: Path) -> None:
    activations = ActivationStore("disk", CPU, torch.float32, tmp_path).empty(3, 2, 4)
    with at_most(0.3), suppress(OSError):
        activations[0:1]


def pruned(place: Place, scratch: Path, pruner: Pruner, family: str = "llama", **options: Any) -> list[Any]:
    """A tiny model pruned with its activations in a place: its tensors and the figures of its blocks."""
    model, during = tiny.model(family), list[list[str]]()

    def look(block: BlockReport, _: object) -> None:
        during.append([path.name for path in scratch.iterdir()])

    report = prune(
        model,
        tiny.tokens(7),
        pattern=Unstructured(0.5),
        pruner=pruner,
        rebuild=Barber(alpha=0.9),
        batch_size=3,
        activations=place,
        scratch=scratch,
        on_block=look,
        **options,
    )
    assert during == [[]] * len(report.blocks)
    figures = [(block.loss_before, block.loss_after, block.linears) for block in report.blocks]
    return [figures, model.state_dict()]


@pytest.mark.parametrize("schedule", ["paper", "interleaved"])
@pytest.mark.parametrize("pruner", [Magnitude(), Wanda(), SparseGPT()], ids=["magnitude", "wanda", "sparsegpt"])
def test_pruning_gives_the_same_bits_wherever_activations_wait(
    pruner: Pruner, schedule: Schedule, tmp_path: Path
) -> None:
    figures, tensors = pruned("device", tmp_path, pruner, schedule=schedule)
    for place in ("host", "disk"):
        others, other_tensors = pruned(place, tmp_path, pruner, schedule=schedule)
        assert others == figures
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in other_tensors.items())
    assert list(tmp_path.iterdir()) == []
    assert files_without_a_name(tmp_path) == []


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt"])
def test_so_it_is_with_bfloat16_activations(family: str, tmp_path: Path) -> None:
    options = {"family": family, "precision": Precision("bfloat16", "bfloat16")}
    figures, tensors = pruned("device", tmp_path, Wanda(), **options)
    others, other_tensors = pruned("disk", tmp_path, Wanda(), **options)
    assert others == figures
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in other_tensors.items())


def test_a_walk_that_fails_leaves_no_file(tmp_path: Path) -> None:
    model = tiny.model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    options = {"pattern": Unstructured(0.5), "pruner": Wanda(), "rebuild": Barber()}
    with pytest.raises(NumericsError):
        prune(model, tiny.tokens(), activations="disk", scratch=tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_so_it_is_with_a_model_that_is_measured_layer_by_layer(name: str, tmp_path: Path) -> None:
    model, tokens_NL = tiny.model(name).bfloat16(), tiny.tokens(5)
    found = {}
    for place in PLACES:
        seen: list[list[Path]] = []

        def progress(_: int, seen: list[list[Path]] = seen) -> None:
            seen.append(list(tmp_path.iterdir()))

        forward = Forward(model, CPU, 3, by_layer=True, activations=place, scratch=tmp_path)
        with placed(model, CPU, by_layer=True), torch.no_grad():
            found[place] = list(forward(tokens_NL, None, progress))
        assert seen == [[]] * len(seen) != []
    for place in ("host", "disk"):
        for batch, other in zip(found["device"], found[place], strict=True):
            assert torch.equal(other.hidden_BLD, batch.hidden_BLD)
            assert torch.equal(other.logits_BLV, batch.logits_BLV)
