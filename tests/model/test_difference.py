"""Where the initially pruned weights of a linear differ from the final ones is exact, in both directions."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from barber.model.difference import Difference


@st.composite
def weights(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A dense weight (O, I) and two masks of it."""
    shape = draw(st.integers(1, 9)), draw(st.integers(1, 11))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    masks = [torch.rand(shape, generator=generator) < draw(st.floats(0, 1)) for _ in range(2)]
    return torch.randn(shape, generator=generator), masks[0], masks[1]


@settings(max_examples=80, deadline=None)
@given(
    drawn=weights(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    transposed=st.booleans(),
    reconstructs=st.booleans(),
)
def test_a_difference_leads_from_the_final_weight_to_the_initial_one_and_back(
    drawn: tuple[torch.Tensor, torch.Tensor, torch.Tensor], dtype: torch.dtype, transposed: bool, reconstructs: bool
) -> None:
    weight_OI, initial_mask_OI, final_mask_OI = drawn
    weight_OI = weight_OI.to(dtype).float()
    initial_OI = weight_OI.masked_fill(initial_mask_OI, 0) * (1.5 if reconstructs else 1)
    final_OI = weight_OI.masked_fill(final_mask_OI, 0)
    difference = Difference.between((initial_mask_OI, initial_OI), (final_mask_OI, final_OI), dtype)
    assert difference.values_K.dtype == dtype
    if not reconstructs:
        assert len(difference.places_K) == int((initial_OI.view(torch.int32) != final_OI.view(torch.int32)).sum())

    stored = final_OI.to(dtype).T.contiguous() if transposed else final_OI.to(dtype)
    stored_OI = stored.T if transposed else stored  # as GPT-2 has it, a view of the module's own
    back = difference.put_into(stored_OI)
    assert torch.equal(stored_OI, initial_OI.to(dtype))
    back.put_into(stored_OI)
    assert torch.equal(stored_OI, final_OI.to(dtype))
    for bits, mask_OI in ((difference.initial, initial_mask_OI), (difference.final, final_mask_OI)):
        unpacked = np.unpackbits(bits.numpy(), count=mask_OI.numel()).reshape(mask_OI.shape)
        assert np.array_equal(unpacked == 1, mask_OI.numpy())
