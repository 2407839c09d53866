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
    Unstructured,
    UserError,
    Wanda,
    Weight,
    prune,
)
from barber.methods.patterns import Pattern
from barber.methods.pruners import Pruner
from barber.model.decoder import Decoder
from barber.walk.walk import BlockResult, LinearResult, Walk
from tests import oracles, tiny
from tests.pruning import prune as follow

NUM_SAMPLES = 8
# Large enough that linears of 32 inputs exchange something in most rows.
ALPHA = 0.9
PRUNERS: dict[str, Pruner] = {"magnitude": Magnitude(), "wanda": Wanda(), "sparsegpt": SparseGPT()}
PATTERNS = {
    "unstructured": (Unstructured(0.5), oracles.Sparsity(0.5)),
    "2:4": (NM(2, 4), oracles.Sparsity(n=2, m=4)),
}

State = dict[str, torch.Tensor]
methods = pytest.mark.parametrize("method", PRUNERS)
both_patterns = pytest.mark.parametrize("pattern_name", PATTERNS)


@cache
def tokens() -> torch.Tensor:
    return tiny.tokens(NUM_SAMPLES)


def walk(
    model: PreTrainedModel, pattern: Pattern, pruner: Pruner, rebuild: Barber | None, batch_size: int = 4
) -> list[BlockResult]:
    return list(Walk(model, tokens(), pattern, pruner, [rebuild] if rebuild else [], torch.device("cpu"), batch_size))


def linears(results: list[BlockResult]) -> dict[str, LinearResult]:
    return {linear.name: linear for block in results for linear in block.linears}


def state(model: PreTrainedModel) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def weight_names(model: PreTrainedModel) -> set[str]:
    return {f"{linear.name}.weight" for linear in Decoder(model).linears}


@cache
def rebuilt_llama(method: str, pattern_name: str, batch_size: int = 4) -> tuple[list[BlockResult], State]:
    """What the walk gives for a tiny llama, and the model it leaves."""
    model = tiny.model("llama")
    results = walk(model, PATTERNS[pattern_name][0], PRUNERS[method], Barber(alpha=ALPHA), batch_size)
    return results, state(model)


@cache
def two_passes(method: str, pattern_name: str) -> oracles.TwoPasses:
    return oracles.two_passes(tiny.model("llama"), tokens(), method, PATTERNS[pattern_name][1], alpha=ALPHA)


@both_patterns
@methods
def test_one_walk_leaves_the_masks_of_the_two_passes(method: str, pattern_name: str) -> None:
    results, model = rebuilt_llama(method, pattern_name)
    expected = two_passes(method, pattern_name)
    found = linears(results)
    assert found.keys() == expected.final.keys()
    for name, linear in found.items():
        assert torch.equal(linear.initial.mask_OI, expected.initial[name]), name
        assert torch.equal(linear.final.mask_OI, expected.final[name]), name
        assert torch.equal(model[f"{name}.weight"], expected.weight[name]), name
    assert all(sum(linear.num_exchanged for linear in block.linears) > 20 for block in results)


@both_patterns
@methods
def test_the_losses_are_those_of_the_initial_and_of_the_rebuilt_masks(method: str, pattern_name: str) -> None:
    results, _ = rebuilt_llama(method, pattern_name)
    expected = two_passes(method, pattern_name)
    assert [block.loss_before for block in results] == pytest.approx(expected.loss_before, rel=1e-4)
    assert [block.loss_after for block in results] == pytest.approx(expected.loss_after, rel=1e-4)


@pytest.mark.parametrize("granularity", ["input", "layer", "block"])
def test_so_it_is_with_every_granularity(granularity: str) -> None:
    model = tiny.model("llama")
    expected = oracles.two_passes(model, tokens(), "wanda", oracles.Sparsity(0.5), alpha=ALPHA, granularity=granularity)
    found = linears(walk(model, Unstructured(0.5), Wanda(), Barber(alpha=ALPHA, granularity=granularity)))
    for name, linear in found.items():
        assert torch.equal(linear.final.mask_OI, expected.final[name]), name


def test_so_it_is_with_retained_reconstruction() -> None:
    model = tiny.model("llama")
    expected = oracles.two_passes(model, tokens(), "sparsegpt", oracles.Sparsity(0.5), alpha=ALPHA, retain=True)
    rebuild = Barber(alpha=ALPHA, retain_reconstruction=True)
    found = linears(walk(model, Unstructured(0.5), SparseGPT(), rebuild))
    for name, linear in found.items():
        assert torch.equal(linear.final.mask_OI, expected.final[name]), name
        torch.testing.assert_close(linear.final.weight_OI, expected.weight[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@both_patterns
@methods
def test_the_batch_size_changes_no_mask(method: str, pattern_name: str, batch_size: int) -> None:
    expected = linears(rebuilt_llama(method, pattern_name)[0])
    for name, linear in linears(rebuilt_llama(method, pattern_name, batch_size)[0]).items():
        assert torch.equal(linear.initial.mask_OI, expected[name].initial.mask_OI), name
        assert torch.equal(linear.final.mask_OI, expected[name].final.mask_OI), name


@methods
def test_two_walks_leave_the_same_bits(method: str) -> None:
    _, first = rebuilt_llama(method, "unstructured")
    model = tiny.model("llama")
    walk(model, Unstructured(0.5), PRUNERS[method], Barber(alpha=ALPHA))
    assert all(torch.equal(tensor, first[name]) for name, tensor in state(model).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@both_patterns
@methods
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_kept_weights_keep_their_bits_and_all_else_its_own(
    family: str, method: str, pattern_name: str, dtype: torch.dtype
) -> None:
    """SparseGPT's update is dropped without retained reconstruction; embeddings, norms and head are never touched."""
    model = tiny.model(family).to(dtype)
    dense = state(model)
    found = linears(walk(model, PATTERNS[pattern_name][0], PRUNERS[method], Barber(alpha=ALPHA)))
    pruned = {f"{name}.weight": linear.final.mask_OI for name, linear in found.items()}
    assert pruned.keys() == weight_names(model)
    for name, tensor in model.state_dict().items():
        expected = dense[name]
        if name in pruned:
            mask = pruned[name].T if family == "gpt2" else pruned[name]
            expected = expected.masked_fill(mask, 0)
        assert tensor.dtype == dense[name].dtype
        assert torch.equal(tensor, expected), name


def test_the_updated_weights_of_sparsegpt_are_rounded_to_the_models_dtype() -> None:
    model = tiny.model("llama").to(torch.bfloat16)
    found = linears(walk(model, Unstructured(0.5), SparseGPT(), None))
    for linear in Decoder(model).linears:
        assert torch.equal(linear.weight_OI, found[linear.name].final.weight_OI.bfloat16())


@pytest.mark.parametrize("rebuild", [None, Barber(alpha=ALPHA)], ids=["pruned", "rebuilt"])
@methods
def test_parameters_stay_where_they_are_in_memory(method: str, rebuild: Barber | None) -> None:
    """An optimizer, or whoever else holds a parameter, sees the pruned one."""
    model = tiny.model("llama")
    addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    walk(model, Unstructured(0.5), PRUNERS[method], rebuild)
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


@pytest.mark.parametrize("rebuild", [None, Barber()], ids=["pruned", "rebuilt"])
@methods
def test_a_weight_that_is_no_number_stops_the_walk_before_its_layer(method: str, rebuild: Barber | None) -> None:
    model = tiny.model("llama").train()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    before = state(model)
    with pytest.raises(NumericsError, match=r"^model\.layers\.1\.mlp\.up_proj: the weight is NaN or infinite$"):
        prune(model, tokens(), pattern=Unstructured(0.5), pruner=PRUNERS[method], rebuild=rebuild)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    pruned = {name for name in weight_names(model) if "layers.0" in name}
    for name, tensor in model.state_dict().items():
        if name in pruned:
            assert (tensor == 0).any()
        else:
            assert torch.equal(tensor.nan_to_num(-1), before[name].nan_to_num(-1)), name


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("wanda", r"^model\.layers\.1\.self_attn\.q_proj: its input is NaN or infinite$"),
        ("sparsegpt", r"^model\.layers\.1\.self_attn\.q_proj: its input is NaN or infinite$"),
        ("magnitude", r"^model\.layers\.1\.self_attn\.o_proj: its input or output is NaN or infinite$"),
    ],
)
def test_activations_that_overflow_stop_the_walk_before_their_layer(method: str, message: str) -> None:
    model = tiny.model("llama")
    model.model.layers[1].input_layernorm.weight.data.fill_(1e30)
    before = state(model)
    with pytest.raises(NumericsError, match=message):
        walk(model, Unstructured(0.5), PRUNERS[method], Barber())
    for name, tensor in model.state_dict().items():
        if "layers.0" not in name:
            assert torch.equal(tensor, before[name]), name


def test_a_hessian_that_cannot_be_inverted_names_the_linear_and_leaves_its_layer() -> None:
    model = tiny.model("llama")
    before = state(model)
    too_few = tiny.tokens(1, 4)  # 4 tokens for 32 inputs
    with pytest.raises(NumericsError, match=r"^model\.layers\.0\.self_attn\.q_proj: the Hessian .* larger pruner"):
        prune(model, too_few, pattern=Unstructured(0.5), pruner=SparseGPT(damping=0), rebuild=Barber())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_interruption_leaves_whole_layers() -> None:
    model = tiny.model("llama").train()
    before = state(model)

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
    report = prune(tiny.model("llama"), tokens(), pattern=Unstructured(0.5), pruner=Wanda())
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
    """Rebuilding one layer has no say in the initial masks of the next."""
    with_rebuilding = linears(rebuilt_llama(method, pattern_name)[0])
    without = linears(walk(tiny.model("llama"), PATTERNS[pattern_name][0], PRUNERS[method], None))
    for name, linear in without.items():
        assert torch.equal(linear.final.mask_OI, with_rebuilding[name].initial.mask_OI)
        assert torch.equal(linear.final.weight_OI, with_rebuilding[name].initial.weight_OI)


@both_patterns
@methods
def test_a_ratio_of_nothing_leaves_the_initial_masks(method: str, pattern_name: str) -> None:
    found = linears(walk(tiny.model("llama"), PATTERNS[pattern_name][0], PRUNERS[method], Barber(alpha=0)))
    for linear in found.values():
        assert linear.num_exchanged == 0
        assert torch.equal(linear.final.mask_OI, linear.initial.mask_OI)


@pytest.mark.parametrize("rebuild", [None, Barber(alpha=ALPHA)], ids=["pruned", "rebuilt"])
@both_patterns
@methods
def test_the_report_counts_the_zeros_that_are_in_the_model(
    method: str, pattern_name: str, rebuild: Barber | None
) -> None:
    model, pattern = tiny.model("llama"), PATTERNS[pattern_name][0]
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
    model = tiny.model("llama")
    dense = copy.deepcopy(model)
    walk(model, Unstructured(0.5), Wanda(), Barber(alpha=1.0, metric=Weight()))
    for linear, before in zip(Decoder(model).linears, Decoder(dense).linears, strict=True):
        expected = [oracles.lowest(row, len(row) // 2) for row in before.weight_OI.abs().tolist()]
        assert (linear.weight_OI == 0).tolist() == expected, linear.name


def test_zeros_that_the_dense_model_brought_along_are_counted() -> None:
    """The report says what is in the model, not what the masks say."""
    model = tiny.model("llama")
    model.model.layers[0].mlp.up_proj.weight.data[3] = 0
    report = prune(model, tokens(), pattern=NM(2, 4), pruner=Wanda(), rebuild=Barber(alpha=ALPHA))
    rows, inputs = model.model.layers[0].mlp.up_proj.weight.shape
    assert report.linears["model.layers.0.mlp.up_proj"]["zeros"] == (rows + 1) * inputs // 2


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
    model = tiny.model("llama").train()
    before = state(model)
    arguments = {"tokens_NL": tokens(), "pattern": Unstructured(0.5), "pruner": Wanda(), "rebuild": Barber()}
    with pytest.raises(UserError, match=message):
        prune(model, **(arguments | changes))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
