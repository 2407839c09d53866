"""The interleaved schedule: a block gets its initial mask on the inputs that its rebuilding has.

`test_walk` holds its masks against loops.
"""

from typing import Any

import pytest
import torch

from barber import NM, Barber, Magnitude, SparseGPT, Unstructured, Wanda, Weight
from barber.methods.patterns import Pattern
from barber.methods.pruners import Pruner
from barber.runtime.precision import Precision
from barber.walk.walk import Schedule
from tests import oracles, tiny
from tests.pruning import assert_the_same, linears, state_of, walked

PRUNERS: list[Pruner] = [Magnitude(), Wanda(), SparseGPT()]
PATTERNS: list[Pattern] = [Unstructured(0.5), NM(2, 4)]
both_patterns = pytest.mark.parametrize("pattern", PATTERNS, ids=str)
# Parallel blocks, norms after them, several linears on one input or one for all of them, weights stored transposed,
# layers with masks of their own.
FAMILIES = ("exaone4", "gpt2", "gpt_neox", "gpt_neox/sequential", "olmo2", "opt/post-norm", "phi3", "stablelm/parallel")
MIXED = [Precision("bfloat16", "float32"), Precision("float32", "bfloat16")]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *(("llama", {"pruner": pruner, "pattern": pattern}) for pruner in PRUNERS for pattern in PATTERNS),
        *((family, {"pattern": NM(2, 4)}) for family in FAMILIES),
        *((family, {"precision": precision}) for family in ("llama", "gpt2", "opt") for precision in MIXED),
    ],
    ids=str,
)
def test_running_the_dense_pass_again_gives_the_same_bits_as_keeping_its_graph(
    family: str, options: dict[str, Any]
) -> None:
    walks = [
        walked(tiny.model(family), schedule="interleaved", keep_graphs=keep_graphs, **options)
        for keep_graphs in (True, False)
    ]
    assert_the_same(*walks)
    if options.get("pattern") == NM(2, 4):
        for linear in linears(walks[0][0]).values():
            assert (linear.final.mask_OI.reshape(-1, 4).sum(dim=1) == 2).all(), linear.name


@pytest.mark.parametrize(
    ("family", "pruner", "rebuild"),
    [
        ("llama", Magnitude(), Barber(alpha=0.9)),
        ("gpt2", Magnitude(), Barber(alpha=0.9)),
        *(("llama", pruner, None) for pruner in PRUNERS),
    ],
    ids=str,
)
@both_patterns
def test_without_inputs_for_the_initial_mask_or_without_rebuilding_it_is_the_papers(
    pattern: Pattern, family: str, pruner: Pruner, rebuild: Barber | None
) -> None:
    """Magnitude needs no inputs, and there are none of a rebuilding that there is not."""
    schedules: tuple[Schedule, Schedule] = ("paper", "interleaved")
    assert_the_same(*(walked(tiny.model(family), pattern, pruner, rebuild, schedule=each) for each in schedules))


@pytest.mark.parametrize("pruner", PRUNERS[1:], ids=lambda pruner: type(pruner).__name__)
def test_the_first_block_is_the_papers_and_the_others_are_not(pruner: Pruner) -> None:
    """Its inputs are the embedded tokens in both; what comes later has seen rebuilt weights instead of pruned ones."""
    paper, interleaved = (
        walked(tiny.model(), pruner=pruner, schedule=schedule)[0] for schedule in ("paper", "interleaved")
    )
    for block, other in zip(paper, interleaved, strict=True):
        equal = [
            torch.equal(linear.initial.mask_OI, too.initial.mask_OI)
            for linear, too in zip(block.linears, other.linears, strict=True)
        ]
        assert all(equal) == (block is paper[0]), (block.layer, block.block)


@pytest.mark.parametrize("keep_graphs", [True, False])
def test_a_metric_without_gradients_takes_none(keep_graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The masks are those of the loops where the scores are the weights."""
    monkeypatch.setattr(torch.autograd, "grad", lambda *_, **__: pytest.fail("a gradient was taken"))
    model = tiny.model()
    dense = state_of(model)
    rebuild = Barber(alpha=0.9, metric=Weight())
    results, _ = walked(model, rebuild=rebuild, schedule="interleaved", keep_graphs=keep_graphs)
    for name, linear in linears(results).items():
        score, pruned = dense[f"{name}.weight"].abs().tolist(), linear.initial.mask_OI.tolist()
        rows = [oracles.exchange(row, gone, 0.9)[0] for row, gone in zip(score, pruned, strict=True)]
        assert linear.final.mask_OI.tolist() == rows, name
    assert all(block.loss_before and block.loss_after for block in results)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gpt_neox"])
@pytest.mark.parametrize("keep_graphs", [True, False])
def test_gradients_are_taken_at_the_dense_weights(
    family: str, keep_graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As autograd has them for a layer whose only block in question is dense, whatever kind of linear it is made of.

    In the first block of the model both schedules have the same inputs and the same initial masks: so the gradients.
    """
    seen: dict[Schedule, list[dict[str, torch.Tensor]]] = {"paper": [], "interleaved": []}
    rebuild = Barber.rebuild
    for schedule, found in seen.items():

        def note(self: Barber, block: Any, found: list[Any] = found) -> Any:
            found.append(dict(block.gradient_OI))
            return rebuild(self, block)

        monkeypatch.setattr(Barber, "rebuild", note)
        walked(tiny.model(family), schedule=schedule, keep_graphs=keep_graphs)
    for name, gradient_OI in seen["paper"][0].items():
        torch.testing.assert_close(seen["interleaved"][0][name], gradient_OI, rtol=1e-4, atol=0, msg=name)
