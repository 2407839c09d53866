"""The baseline of the benchmarks does what the package does, so that their times can be compared."""

import pytest
import torch
from transformers import PreTrainedModel

from barber import Barber, Unstructured, Wanda, prune
from barber.model.decoder import Decoder
from experiments.benchmarks.plain import embed, plain_wanda_barber
from tests import tiny

#: A near-tie decided by the order of float32 additions moves two bits.
BITS_OF_A_TIE = 2


def model(seed: int, **changes: object) -> PreTrainedModel:
    return tiny.model("llama", seed, hidden_size=64, intermediate_size=160, **changes)


def tokens(seed: int) -> torch.Tensor:
    return tiny.tokens(4, 32, seed)


# With alpha 0.1 a row of 64 inputs has seldom the ten pairs that make an exchange: 0.9 tells more.
@pytest.mark.parametrize(("sparsity", "alpha"), [(0.5, 0.1), (0.5, 0.9), (0.7, 0.9)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_masks_and_weights_are_those_of_the_package(seed: int, sparsity: float, alpha: float) -> None:
    dense, plain, ours = model(seed), model(seed), model(seed)
    outcome = plain_wanda_barber(plain, tokens(seed), sparsity, alpha)
    pattern = Unstructured(sparsity)
    report = prune(ours, tokens(seed), pattern=pattern, pruner=Wanda(), rebuild=Barber(alpha=alpha), batch_size=2)

    expected, originals = Decoder(ours).linears, Decoder(dense).linears
    assert list(outcome.pruned) == [linear.name for linear in expected]
    differing = 0
    for linear, original in zip(expected, originals, strict=True):
        pruned_OI = outcome.pruned[linear.name]
        differing += int((pruned_OI != (linear.weight_OI == 0)).sum())
        left_OI = plain.get_submodule(linear.name).weight
        assert torch.equal(left_OI, original.weight_OI.masked_fill(pruned_OI, 0)), linear.name
    assert differing <= BITS_OF_A_TIE
    assert report.exchanges > 100
    assert alpha < 0.5 or all(linear["exchanges"] > 100 for linear in report.linears.values())


def test_nothing_but_the_linears_changes() -> None:
    dense, plain = model(0), model(0)
    pruned = {f"{name}.weight" for name in plain_wanda_barber(plain, tokens(0), 0.5, 0.1).pruned}
    left = plain.state_dict()
    for name, tensor in dense.state_dict().items():
        assert torch.equal(left[name], tensor) == (name not in pruned), name
    assert all(parameter.grad is None for parameter in plain.parameters())


@torch.no_grad()
def test_its_layers_one_by_one_are_the_models_own_forward() -> None:
    llama = model(0)
    samples, arguments = embed(llama, tokens(0))
    for tokens_L, hidden_1LD in zip(tokens(0), samples, strict=True):
        for layer in llama.model.layers:
            hidden_1LD = layer(hidden_1LD, **arguments)
        assert torch.equal(llama.model.norm(hidden_1LD), llama.model(tokens_L[None]).last_hidden_state)


@pytest.mark.parametrize(
    "changes", [{"attn_implementation": "eager"}, {"dtype": torch.bfloat16}], ids=["not causal", "bfloat16"]
)
def test_a_model_that_it_would_get_wrong_is_refused(changes: dict[str, object]) -> None:
    llama = model(0, **changes).to(changes.get("dtype", torch.float32))
    with pytest.raises(ValueError, match="needs a llama in float32 with sdpa"):
        plain_wanda_barber(llama, tokens(0), 0.5, 0.1)
