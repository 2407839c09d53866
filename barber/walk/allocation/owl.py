"""OWL: layers with more outliers among their scores keep more weights (Yin et al., arXiv 2310.05175)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from barber.errors import UserError, require_positive
from barber.model.decoder import Decoder
from barber.walk.allocation.base import Allocation, Setting, Watch, rounded
from barber.walk.allocation.survey import Surveyed, survey


@dataclass(frozen=True)
class OWL(Allocation):
    """Outlier-weighed layerwise sparsity: one sparsity a decoder layer, the same for all of its linears.

    With D the share of a layer's Wanda scores that are above `outlier` times their mean, brought to a range of twice
    the `spread` over all layers, a layer keeps D - mean(D) more than the average (section 4.2).

    Args:
        outlier: how many times the mean of its layer's scores an outlier is (M of the paper).
        spread: half the difference between the highest and the lowest sparsity (lambda of the paper).
    """

    outlier: float = 5.0
    spread: float = 0.08

    def __post_init__(self) -> None:
        require_positive(self, "outlier")
        if not 0 <= self.spread < 0.5:
            raise UserError(f"must be at least 0 and below 0.5, not {self.spread}", field="spread")

    def allocate(self, setting: Setting, watch: Watch | None = None) -> dict[str, int]:
        """The number of weights that each linear loses; where layers differ in size, the mean is that over weights."""
        layers, sizes = Decoder(setting.model).layers, setting.sizes
        names = [[linear.name for linear in layer.linears if linear.name in sizes] for layer in layers]
        outliers: dict[int, float] = {}

        def look(surveyed: Surveyed) -> None:
            if names[surveyed.index]:  # a layer that is left out takes no part
                outliers[surveyed.index] = self._share_of_outliers(surveyed, names[surveyed.index])
            if watch is not None:
                watch(surveyed.index + 1, len(layers))

        survey(setting, look)
        lowest, highest = min(outliers.values()), max(outliers.values())
        scale = 2 * self.spread / (highest - lowest) if highest > lowest else 0.0
        kept_more = {name: (share - lowest) * scale for index, share in outliers.items() for name in names[index]}
        mean = sum(kept_more[name] * size for name, size in sizes.items()) / sum(sizes.values())
        ideal = {name: size * (setting.sparsity - kept_more[name] + mean) for name, size in sizes.items()}
        return rounded(ideal, sizes, setting.total)

    def _share_of_outliers(self, surveyed: Surveyed, names: Sequence[str]) -> float:
        count = sum(surveyed.dense_OI[name].numel() for name in names)
        # One linear's scores at a time: twice computed they cost less than kept.
        total = torch.stack([surveyed.score_OI(name).sum(dtype=torch.float64) for name in names]).sum()
        above = [(surveyed.score_OI(name) > self.outlier * total / count).sum() for name in names]
        return torch.stack(above).sum().item() / count
