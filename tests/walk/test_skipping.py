"""Leaving out: what is skipped stays dense bit by bit, whatever prunes, rebuilds, updates or allocates the rest."""

from typing import Any

import pytest
import torch

import barber
from barber import NM, Unstructured, UserError
from barber.model.decoder import Decoder
from barber.walk.arguments import named
from barber.walk.skipping import skipped
from tests import tiny

# A layer as a whole, a block of another, and a linear of all of them.
SKIP = [2, "model.layers.1.mlp.*", "re:.*[kv]_proj"]


def model() -> Any:
    return tiny.model(num_hidden_layers=3)


def names(pattern: str = "") -> list[str]:
    return [linear.name for linear in Decoder(model()).linears if pattern in linear.name]


def assert_only_the_rest_is_pruned(report: barber.Report, pruned: Any, skip: list[Any] = SKIP) -> None:
    dense, left_out = model(), skipped(skip, model())
    assert set(report.left_out) == left_out and not left_out & set(report.linears)
    weights = {linear.name: linear.weight_OI for linear in Decoder(dense).linears}
    for linear in Decoder(pruned).linears:
        if linear.name in left_out:
            assert torch.equal(linear.weight_OI, weights[linear.name]), linear.name
    zeros = {name: (pruned.get_submodule(name).weight == 0).sum().item() for name in names()}
    of_the_rest = [name for name in zeros if name not in left_out]
    rest = sum(weights[name].numel() for name in of_the_rest)
    assert report.zeros == sum(zeros[name] for name in of_the_rest) and report.weights == rest
    assert report.overall_sparsity == sum(zeros.values()) / sum(one.numel() for one in weights.values())


@pytest.mark.parametrize(
    ("pruner", "schedule"),
    # Wanda++ looks at whole layers, which the other schedule has none of.
    [(name, "paper") for name in named("pruner")] + [(n, "interleaved") for n in named("pruner") if n != "wanda_plus"],
)
def test_every_pruner(pruner: str, schedule: Any) -> None:
    pruned = model()
    report = barber.prune(
        pruned, tiny.tokens(), pattern="2:4", pruner=pruner, rebuild=barber.Barber(1.0), schedule=schedule, skip=SKIP
    )
    assert report.sparsity == 0.5
    assert_only_the_rest_is_pruned(report, pruned)


@pytest.mark.parametrize(
    "step",
    [
        *named("rebuild", "update"),
        barber.Barber(alpha="auto"),
        barber.Barber(0.5, "block"),
        barber.Barber(0.5, rounds=2),
        barber.Swaps(follow=0.5),
        barber.Reconstruct(learning_rate=1e-2, follow=0.5),
    ],
    ids=str,
)
def test_every_step_and_update(step: Any) -> None:
    pruned = model()
    steps = [step, "least_squares"]
    report = barber.prune(pruned, tiny.tokens(), pattern=0.5, pruner="wanda", rebuild=steps, skip=SKIP)
    assert report.sparsity == 0.5
    assert_only_the_rest_is_pruned(report, pruned)


@pytest.mark.parametrize(
    "allocation", [name for name in named("allocation") if name != "evopress"] + [barber.EvoPress(5, 4)]
)
def test_every_allocation_shares_out_among_the_rest(allocation: Any) -> None:
    dense = model()
    patterns = barber.allocate(dense, tiny.tokens(), allocation=allocation, pattern=0.6, skip=SKIP)
    left_out = skipped(SKIP, dense)
    assert set(patterns) == set(names()) - left_out
    total = sum(dense.get_submodule(name).weight.numel() for name in patterns)
    assert sum(one.num_pruned for one in patterns.values()) == int(total * 0.6)
    report = barber.prune(dense, tiny.tokens(), pattern=patterns, pruner="wanda", skip=SKIP)
    assert report.sparsity == pytest.approx(0.6, abs=1 / total)
    assert_only_the_rest_is_pruned(report, dense)


def test_the_rest_is_pruned_as_beside_linears_that_lose_nothing() -> None:
    """Which is a sparsity of 0 where a pruner and a step choose in every linear for itself."""
    skips, loses_nothing = model(), model()
    given: dict[str, Any] = {"pruner": "wanda", "rebuild": barber.Barber(0.9)}
    patterns = {name: 0.0 if name in skipped(SKIP, skips) else 0.5 for name in names()}
    barber.prune(skips, tiny.tokens(), pattern=0.5, skip=SKIP, **given)
    barber.prune(loses_nothing, tiny.tokens(), pattern=patterns, **given)
    for name, tensor in skips.state_dict().items():
        assert torch.equal(tensor, loses_nothing.state_dict()[name]), name


def test_the_pattern_need_not_fit_what_is_left_out() -> None:
    odd = tiny.model(intermediate_size=42)
    with pytest.raises(UserError, match=r"pattern.m must divide .*down_proj"):
        barber.prune(odd, tiny.tokens(), pattern=NM(2, 4), pruner="wanda")
    assert barber.prune(odd, tiny.tokens(), pattern=NM(2, 4), pruner="wanda", skip=["*.down_proj"]).sparsity == 0.5


def test_a_report_has_both_figures() -> None:
    report = barber.prune(model(), tiny.tokens(), pattern=Unstructured(0.5), pruner="wanda", skip=[0])
    assert report.sparsity == 0.5 and report.overall_sparsity == pytest.approx(0.5 * 2 / 3)
    assert "left out" in repr(report) and "7 linears; zeros of all together 33.33%" in repr(report)


@pytest.mark.parametrize(
    ("skip", "expected"),
    [
        ([1], names("layers.1.")),
        (["1"], names("layers.1.")),
        (["0-1"], names("layers.0.") + names("layers.1.")),
        (["*.down_proj"], names("down_proj")),
        ([r"re:model\.layers\.[02]\.mlp\..*"], names("layers.0.mlp") + names("layers.2.mlp")),
        (["model.layers.1.self_attn.q_proj", 1], names("layers.1.")),
        ([], []),
    ],
)
def test_what_entries_stand_for(skip: list[Any], expected: list[str]) -> None:
    assert skipped(skip, model()) == set(expected)


@pytest.mark.parametrize(
    ("skip", "words"),
    [
        ([3], "has 3, but the model has the layers 0 to 2"),
        (["1-3"], "has 1-3, but the model has the layers 0 to 2"),
        (["2-1"], "has 2-1, but"),
        ([-1], "has -1, but"),
        (["*.down_porj"], r"has '\*.down_porj', which matches no linear .*, did you mean \*.down_proj"),
        (["down_proj"], r", did you mean \*.down_proj\?"),
        (["*.mlp"], r", did you mean \*.mlp.\*\?"),
        (["mlp"], r", did you mean \*.mlp.\*\?"),
        (["re:down_proj"], r", did you mean re:\.\*down_proj\.\*\?"),
        (["model.layers.0.self_attn.q_porj"], ", did you mean model.layers.0.self_attn.q_proj"),
        (["lm_head"], "; they are called like model.layers.0.self_attn.q_proj"),
        (["re:("], r"has 're:\(', which is no regular expression"),
        ([True], "must have layers .* not True"),
        ([1.5], "must have layers .* not 1.5"),
        ("*.down_proj", r"must be a list of layers .*, not '\*.down_proj'"),
        (1, "must be a list of layers .*, not 1"),
        (["*"], "must leave something to prune"),
    ],
)
def test_what_means_nothing_is_refused(skip: Any, words: str) -> None:
    with pytest.raises(UserError, match=f"^skip .*{words}"):
        barber.prune(model(), tiny.tokens(), pattern=0.5, pruner="wanda", skip=skip)
