"""OWL: layers with more outliers among their scores keep more weights (Yin et al., arXiv 2310.05175)."""

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
        outliers: list[float] = []

        def look(surveyed: Surveyed) -> None:
            outliers.append(self._share_of_outliers(surveyed))
            if watch is not None:
                watch(len(outliers), len(layers))

        survey(setting, look)
        lowest, highest = min(outliers), max(outliers)
        scale = 2 * self.spread / (highest - lowest) if highest > lowest else 0.0
        kept_more = {
            linear.name: (share - lowest) * scale
            for layer, share in zip(layers, outliers, strict=True)
            for linear in layer.linears
        }
        mean = sum(kept_more[name] * size for name, size in sizes.items()) / sum(sizes.values())
        ideal = {name: size * (setting.sparsity - kept_more[name] + mean) for name, size in sizes.items()}
        return rounded(ideal, sizes, setting.total)

    def _share_of_outliers(self, surveyed: Surveyed) -> float:
        names = [linear.name for linear in surveyed.layer.linears]
        count = sum(surveyed.dense_OI[name].numel() for name in names)
        # One linear's scores at a time: twice computed they cost less than kept.
        total = torch.stack([surveyed.score_OI(name).sum(dtype=torch.float64) for name in names]).sum()
        above = [(surveyed.score_OI(name) > self.outlier * total / count).sum() for name in names]
        return torch.stack(above).sum().item() / count
