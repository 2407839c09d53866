"""The walk over a whole model: the paper's two passes in one, and what it must leave as it was."""

import copy
from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

from barber import (
    NM,
    Barber,
    BlockReport,
    Magnitude,
    NumericsError,
    SparseGPT,
    Swaps,
    Unstructured,
    UserError,
    Wanda,
    Weight,
    prune,
)
from barber.methods.patterns import Pattern
from barber.methods.pruners import Pruner
from barber.model.decoder import Decoder
from barber.walk.walk import BlockResult, Schedule
from tests import oracles, tiny
from tests.pruning import State, assert_the_same, linears, state_of, walked
from tests.pruning import prune as follow

ALPHA = 0.9  # as walked() has it
PRUNERS: dict[str, Pruner] = {"magnitude": Magnitude(), "wanda": Wanda(), "sparsegpt": SparseGPT()}
PATTERNS: dict[str, tuple[Pattern, oracles.Sparsity]] = {
    "unstructured": (Unstructured(0.5), oracles.Sparsity(0.5)),
    "2:4": (NM(2, 4), oracles.Sparsity(n=2, m=4)),
}

methods = pytest.mark.parametrize("method", PRUNERS)
both_patterns = pytest.mark.parametrize("pattern_name", PATTERNS)
schedules = pytest.mark.parametrize("schedule", ["paper", "interleaved"])


@cache
def tokens() -> torch.Tensor:
    return tiny.tokens(8)


def weight_names(model: PreTrainedModel) -> set[str]:
    return {f"{linear.name}.weight" for linear in Decoder(model).linears}


@cache
def rebuilt_llama(
    method: str, pattern_name: str, schedule: Schedule = "paper", **options: object
) -> tuple[list[BlockResult], State]:
    """What the walk gives for a tiny llama, and the model it leaves."""
    return walked(tiny.model(), PATTERNS[pattern_name][0], PRUNERS[method], schedule=schedule, **options)  # type: ignore[arg-type]


@cache
def slowly(method: str, pattern_name: str, schedule: Schedule) -> oracles.Walked:
    return oracles.walk(tiny.model(), tokens(), method, PATTERNS[pattern_name][1], schedule, alpha=ALPHA)


@pytest.mark.parametrize(("schedule", "keep_graphs"), [("paper", True), ("interleaved", True), ("interleaved", False)])
@both_patterns
@methods
def test_masks_weights_and_losses_are_those_of_the_loops(
    method: str, pattern_name: str, schedule: Schedule, keep_graphs: bool
) -> None:
    options = {} if keep_graphs else {"keep_graphs": False}
    results, model = rebuilt_llama(method, pattern_name, schedule, **options)
    expected = slowly(method, pattern_name, schedule)
    found = linears(results)
    assert found.keys() == expected.final.keys()
    for name, linear in found.items():
        assert torch.equal(linear.initial.mask_OI, expected.initial[name]), name
        assert torch.equal(linear.final.mask_OI, expected.final[name]), name
        assert torch.equal(model[f"{name}.weight"], expected.weight[name]), name
    assert [block.loss_before for block in results] == pytest.approx(expected.loss_before, rel=1e-4)
    assert [block.loss_after for block in results] == pytest.approx(expected.loss_after, rel=1e-4)
    assert all(sum(linear.num_exchanged for linear in block.linears) > 20 for block in results)


@pytest.mark.parametrize("granularity", ["input", "layer", "block"])
def test_so_it_is_with_every_granularity(granularity: str) -> None:
    sparsity = oracles.Sparsity(0.5)
    expected = oracles.walk(tiny.model(), tokens(), "wanda", sparsity, alpha=ALPHA, granularity=granularity)
    found = linears(walked(tiny.model(), rebuild=Barber(alpha=ALPHA, granularity=granularity))[0])
    for name, linear in found.items():
        assert torch.equal(linear.final.mask_OI, expected.final[name]), name


@schedules
def test_so_it_is_with_retained_reconstruction(schedule: Schedule) -> None:
    sparsity = oracles.Sparsity(0.5)
    expected = oracles.walk(tiny.model(), tokens(), "sparsegpt", sparsity, schedule, alpha=ALPHA, retain=True)
    rebuild = Barber(alpha=ALPHA, retain_reconstruction=True)
    results, model = walked(tiny.model(), pruner=SparseGPT(), rebuild=rebuild, schedule=schedule)
    for name, linear in linears(results).items():
        assert torch.equal(linear.final.mask_OI, expected.final[name]), name
        torch.testing.assert_close(model[f"{name}.weight"], expected.weight[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3])
@schedules
@both_patterns
@methods
def test_the_batch_size_changes_no_mask(method: str, pattern_name: str, schedule: Schedule, batch_size: int) -> None:
    expected = linears(rebuilt_llama(method, pattern_name, schedule)[0])
    for name, linear in linears(rebuilt_llama(method, pattern_name, schedule, batch_size=batch_size)[0]).items():
        assert torch.equal(linear.initial.mask_OI, expected[name].initial.mask_OI), name
        assert torch.equal(linear.final.mask_OI, expected[name].final.mask_OI), name


@schedules
@methods
def test_two_walks_leave_the_same_bits(method: str, schedule: Schedule) -> None:
    again = walked(tiny.model(), pruner=PRUNERS[method], schedule=schedule)
    assert_the_same(again, rebuilt_llama(method, "unstructured", schedule))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@both_patterns
@methods
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_kept_weights_keep_their_bits_and_all_else_its_own(
    family: str, method: str, pattern_name: str, dtype: torch.dtype
) -> None:
    """SparseGPT's update is dropped without retained reconstruction; embeddings, norms and head are never touched."""
    model = tiny.model(family).to(dtype)
    dense = state_of(model)
    found = linears(walked(model, PATTERNS[pattern_name][0], PRUNERS[method])[0])
    pruned = {f"{name}.weight": linear.final.mask_OI for name, linear in found.items()}
    assert pruned.keys() == weight_names(model)
    for name, tensor in model.state_dict().items():
        expected = dense[name]
        if name in pruned:
            mask = pruned[name].T if family == "gpt2" else pruned[name]
            expected = expected.masked_fill(mask, 0)
        assert tensor.dtype == dense[name].dtype
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("rebuild", [None, Barber(alpha=ALPHA)], ids=["pruned", "rebuilt"])
@methods
def test_parameters_stay_where_they_are_in_memory(method: str, rebuild: Barber | None) -> None:
    """An optimizer, or whoever else holds a parameter, sees the pruned one."""
    model = tiny.model()
    addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    walked(model, pruner=PRUNERS[method], rebuild=rebuild)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == addresses


def test_a_model_in_training_comes_back_in_training() -> None:
    model = tiny.model("llama", attention_dropout=0.5).train()
    frozen = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    prune(model, tokens(), pattern=Unstructured(0.5), pruner=Wanda(), rebuild=Barber(alpha=ALPHA))
    assert all(module.training for module in model.modules())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
    assert not frozen.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    model(input_ids=tokens()[:1], labels=tokens()[:1]).loss.backward()
    assert model.model.layers[1].mlp.up_proj.weight.grad is not None
    # Dropout was off while pruning: the masks are those of the model in evaluation.
    evaluated = tiny.model("llama", attention_dropout=0.5)
    prune(evaluated, tokens(), pattern=Unstructured(0.5), pruner=Wanda(), rebuild=Barber(alpha=ALPHA))
    assert all(torch.equal(tensor, evaluated.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_hessian_that_cannot_be_inverted_names_the_linear_and_leaves_its_layer() -> None:
    model = tiny.model()
    before = state_of(model)
    too_few = tiny.tokens(1, 4)  # 4 tokens for 32 inputs
    with pytest.raises(NumericsError, match=r"^model\.layers\.0\.self_attn\.q_proj: the Hessian .* larger pruner"):
        prune(model, too_few, pattern=Unstructured(0.5), pruner=SparseGPT(damping=0), rebuild=Barber())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_interruption_leaves_whole_layers() -> None:
    model = tiny.model().train()
    before = state_of(model)

    def interrupt(block: BlockReport, _: BlockResult) -> None:
        assert (block.layer, block.block) == (0, "attention")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        follow(
            model, tokens(), pattern=Unstructured(0.5), pruner=Wanda(), rebuild=Barber(alpha=ALPHA), on_block=interrupt
        )
    assert model.training
    _, finished = rebuilt_llama("wanda", "unstructured")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, (finished if "layers.0" in name else before)[name]), name


def test_without_rebuilding_there_is_no_loss_and_nothing_is_exchanged() -> None:
    report = prune(tiny.model(), tokens(), pattern=Unstructured(0.5), pruner=Wanda())
    assert [(block.layer, block.block) for block in report.blocks] == [
        (0, "attention"),
        (0, "mlp"),
        (1, "attention"),
        (1, "mlp"),
    ]
    assert all(block.loss_before is None and block.loss_after is None for block in report.blocks)
    assert report.exchanges == 0


@both_patterns
@methods
def test_the_initial_masks_are_those_of_a_walk_without_rebuilding(method: str, pattern_name: str) -> None:
    """Rebuilding one layer has no say in the initial masks of the next, and with a ratio of nothing they stay."""
    with_rebuilding = linears(rebuilt_llama(method, pattern_name)[0])
    without, with_nothing = (
        linears(walked(tiny.model(), PATTERNS[pattern_name][0], PRUNERS[method], rebuild)[0])
        for rebuild in (None, Barber(alpha=0))
    )
    for name, linear in without.items():
        assert torch.equal(linear.final.mask_OI, with_rebuilding[name].initial.mask_OI)
        assert torch.equal(linear.final.weight_OI, with_rebuilding[name].initial.weight_OI)
        assert torch.equal(linear.final.mask_OI, with_nothing[name].final.mask_OI)
        assert with_nothing[name].num_exchanged == 0


@pytest.mark.parametrize("rebuild", [None, Barber(alpha=ALPHA)], ids=["pruned", "rebuilt"])
@both_patterns
@methods
def test_the_report_counts_the_zeros_that_are_in_the_model(
    method: str, pattern_name: str, rebuild: Barber | None
) -> None:
    model, pattern = tiny.model(), PATTERNS[pattern_name][0]
    seen = []
    report = follow(
        model,
        tokens(),
        pattern=pattern,
        pruner=PRUNERS[method],
        rebuild=rebuild,
        on_block=lambda block, result: seen.append((block, result)),
    )
    zeros = {
        linear.name: sum(value == 0 for row in linear.weight_OI.tolist() for value in row)
        for linear in Decoder(model).linears
    }
    assert {name: counts["zeros"] for name, counts in report.linears.items()} == zeros
    assert report.zeros == sum(zeros.values())
    assert report.weights == sum(linear.weight_OI.numel() for linear in Decoder(model).linears)
    assert report.sparsity == pytest.approx(0.5, abs=1e-3 if pattern_name == "unstructured" else 0)
    assert report.exchanges == sum(linear.num_exchanged for _, result in seen for linear in result.linears)
    assert [block for block, _ in seen] == report.blocks
    for block, result in seen:
        assert block.linears.keys() == {linear.name for linear in result.linears}
        weights = sum(linear.final.mask_OI.numel() for linear in result.linears)
        assert block.sparsity == sum(zeros[name] for name in block.linears) / weights


def test_a_full_exchange_by_weight_is_magnitude_pruning_by_row() -> None:
    model = tiny.model()
    dense = copy.deepcopy(model)
    walked(model, rebuild=Barber(alpha=1.0, metric=Weight()))
    for linear, before in zip(Decoder(model).linears, Decoder(dense).linears, strict=True):
        expected = [oracles.lowest(row, len(row) // 2) for row in before.weight_OI.abs().tolist()]
        assert (linear.weight_OI == 0).tolist() == expected, linear.name


def test_zeros_that_the_dense_model_brought_along_are_counted() -> None:
    """The report says what is in the model, not what the masks say."""
    model = tiny.model()
    model.model.layers[0].mlp.up_proj.weight.data[3] = 0
    report = prune(model, tokens(), pattern=NM(2, 4), pruner=Wanda(), rebuild=[Barber(alpha=ALPHA, rounds=2), Swaps()])
    rows, inputs = model.model.layers[0].mlp.up_proj.weight.shape
    counts = report.linears["model.layers.0.mlp.up_proj"]
    assert counts["zeros"] == counts["pruned_zeros"] == (rows + 1) * inputs // 2
    assert counts["dense_zeros"] == inputs
    assert sum(counts["dense_zeros"] for counts in report.linears.values()) == inputs
    assert len(report.by_step) == 2 and all(report.by_step) and sum(report.by_step) == report.exchanges


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens_NL": torch.full((2, 8), tiny.VOCABULARY)}, r"^tokens_NL holds token id 96, but .* ids 0 to 95$"),
        ({"tokens_NL": torch.full((2, 8), -1)}, r"^tokens_NL holds token id -1"),
        ({"tokens_NL": torch.full((2, 65), 3)}, r"^tokens_NL .* 65 tokens, but the model has positions for 64\b"),
        ({"pattern": NM(3, 5)}, r"^pattern\.m must divide the inputs .* which 5 does not divide$"),
        (
            {"pattern": NM(2, 4), "rebuild": Barber(granularity="block")},
            r"^rebuild\.granularity must be output with an N:M pattern",
        ),
        (
            {"pattern": NM(2, 4), "pruner": SparseGPT(block_size=6)},
            r"^pruner\.block_size must be a multiple of pattern\.m \(4\), not 6$",
        ),
        ({"device": "gpu"}, r"^device must be auto, cpu, cuda or cuda:INDEX, not 'gpu'$"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_anything_is_changed(
    changes: dict[str, object], message: str
) -> None:
    model = tiny.model().train()
    before = state_of(model)
    arguments = {"tokens_NL": tokens(), "pattern": Unstructured(0.5), "pruner": Wanda(), "rebuild": Barber()}
    with pytest.raises(UserError, match=message):
        prune(model, **(arguments | changes))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
