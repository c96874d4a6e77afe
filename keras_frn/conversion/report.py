"""What a conversion replaced and what it kept."""

import dataclasses

from ..errors import format_count

__all__ = ["FRN", "THRESHOLD", "ConversionReport", "Replacement"]

FRN, THRESHOLD = "FRN", "TLU with a threshold of 0"


@dataclasses.dataclass(frozen=True)
class Replacement:
    """What became of one layer.

    Attributes:
        layer: Name of the layer.
        kind: Name of its class.
        action: `"replaced"` or `"kept"`.
        reason: What it became, or why it was kept.
        positions: Number of spatial positions of a BatchNormalization layer, if it is fixed.
        epsilon_ratio: The median over its channels of epsilon / mean square. Near 0 is FRN as in
            the paper, 3 normalizes mildly, and a large value is close to a fixed scale.
        left: Number of BatchNormalization layers that it is or has inside, and that were kept.
    """

    layer: str
    kind: str
    action: str
    reason: str
    positions: int | None = None
    epsilon_ratio: float | None = None
    left: int = 0


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What `replace_batch_normalization` replaced and what it kept. `print(report)` shows it.

    Attributes:
        entries: A `Replacement` for each BatchNormalization layer, for each activation after one,
            and for each layer that keeps BatchNormalization layers inside.
        agreement: The correlation of the outputs with those of the given model, over calibration
            data of 8 samples or more: 1 if they vary alike from sample to sample.
    """

    entries: tuple[Replacement, ...]
    agreement: float | None = None

    @property
    def replaced(self) -> int:
        """The number of BatchNormalization layers that became FRN."""
        return sum(entry.reason == FRN for entry in self.entries)

    @property
    def left(self) -> int:
        """The number of BatchNormalization layers that were kept."""
        return sum(entry.left for entry in self.entries)

    def __str__(self) -> str:
        if not self.entries:
            return "No BatchNormalization layer was found: the model is an unchanged copy."
        width = max(len(entry.layer) for entry in self.entries)
        thresholds = sum(entry.reason == THRESHOLD for entry in self.entries)
        kept = sum(entry.action == "kept" and not entry.left for entry in self.entries)
        lines = [
            f"{format_count(self.replaced, 'BatchNormalization layer')} became FRN, {self.left} "
            f"left; {format_count(thresholds, 'activation')} became TLU, {kept} kept."
        ]
        if self.agreement is not None:
            lines.append(f"Correlation with the given model: {self.agreement:.3f}")
        lines.append(f"{'layer':{width}}  {'class':18}  N       eps/nu2  what")
        for entry in self.entries:
            ratio = "" if entry.epsilon_ratio is None else f"{entry.epsilon_ratio:.3g}"
            lines.append(
                f"{entry.layer:{width}}  {entry.kind:18}  {entry.positions or '':<6}  {ratio:7}  "
                f"{entry.action}: {entry.reason}"
            )
        return "\n".join(lines)
