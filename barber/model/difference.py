"""Where the initially pruned weights of a linear differ from its final ones: all that it takes to show either."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from barber.runtime.tensors import Tensor


@dataclass(frozen=True)
class Difference:
    """Where the initially pruned weight of a linear differs from its final one, and what it is there.

    Args:
        places_K: indices into the flattened weight (O, I), int64.
        values_K: the initially pruned weight there, in the dtype in which the model is stored.
        initial, final: the pruned bits of the flattened weight, packed big-endian as numpy.packbits does.
    """

    places_K: Tensor
    values_K: Tensor
    initial: Tensor
    final: Tensor

    @classmethod
    def between(cls, initial: tuple[Tensor, Tensor], final: tuple[Tensor, Tensor], dtype: torch.dtype) -> "Difference":
        """From the masks and float32 weights (O, I) of a linear, initially pruned and final."""
        (initial_mask_OI, initial_OI), (final_mask_OI, final_OI) = initial, final
        # As integers of the same bits: 0.0 and -0.0 are equal as numbers.
        differ_OI = initial_OI.contiguous().view(torch.int32) != final_OI.contiguous().view(torch.int32)
        places_K = differ_OI.flatten().nonzero().squeeze(1)
        values_K = initial_OI.flatten()[places_K].to("cpu", dtype)
        return cls(places_K.cpu(), values_K, packed(initial_mask_OI), packed(final_mask_OI))

    def put_into(self, weight_OI: Tensor) -> "Difference":
        """Write the values into a weight; returns the difference that undoes it."""
        places_K = self.places_K.to(weight_OI.device)
        rows_K, columns_K = places_K // weight_OI.shape[1], places_K % weight_OI.shape[1]
        before_K = weight_OI[rows_K, columns_K].cpu()
        weight_OI[rows_K, columns_K] = self.values_K.to(weight_OI)
        return replace(self, values_K=before_K)


def packed(mask_OI: Tensor) -> Tensor:
    """The bits of a mask, eight a byte, big-endian: uint8."""
    return torch.from_numpy(np.packbits(mask_OI.cpu().numpy()))
