"""What an export says of itself."""

import dataclasses
from collections.abc import Mapping

from ..errors import format_count
from .presets import Preset

__all__ = ["ExportReport", "list_counts"]


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What `export_tflite` wrote, and how close it is to the model. `print(report)` shows it.

    Attributes:
        path: Path of the file.
        quantization: Name of the preset.
        size: Size of the file in bytes.
        operators: Dict from the name of an operator to how many the file has.
        in_float: Dict of those that the preset should have quantized and that stayed in float:
            operators of an integer file, weights of the others.
        delegated: Number of operators that the interpreter hands to XNNPACK on this machine.
        partitions: Number of pieces in which it does so; 1 is best.
        samples: Number of calibration samples compared; without any, random inputs are.
        ranges: Dict from the name of an input to the least and largest value in the samples;
            NaN for text.
        max_error: Largest absolute difference from the model's outputs, or of an output of
            integers, the fraction that differs. None for a model that does not run on random
            inputs.
        max_error_fraction: Largest difference as a fraction of the range of the output and zero.
        bound: What this fraction should not exceed on any sample.
        agreement: Fraction of samples (or positions) with the same argmax along the last axis, for
            outputs of more than one number, or with the same integer.
        is_quantized: False if the preset stores no number in fewer bits.
        equalized: Names of the normalization layers whose input channels were scaled.
        not_equalized: Dict from the names of the others to the reason.
        warnings: Sentences about what may cost accuracy.
    """

    path: str
    quantization: Preset | None
    size: int
    operators: Mapping[str, int]
    in_float: Mapping[str, int]
    delegated: int
    partitions: int
    samples: int
    ranges: Mapping[str, tuple[float, float]]
    max_error: float | None
    max_error_fraction: float
    bound: float
    agreement: float | None
    is_quantized: bool
    equalized: tuple[str, ...] = ()
    not_equalized: Mapping[str, str] = dataclasses.field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        count = sum(self.operators.values())
        nothing = "" if self.is_quantized else ", nothing quantized"
        lines = [
            f"{self.path}: {self.quantization or 'float32'}{nothing}, {self.size:,} bytes",
            f"operators      {count}: {list_counts(self.operators)}",
            f"XNNPACK        runs {self.delegated} of {format_count(count, 'operator')} in "
            + format_count(self.partitions, "piece")
            + ("" if self.partitions < 2 else ": each one more costs time"),
        ]
        if self.quantization is not None:
            lines.append(f"in float       {list_counts(self.in_float) or 'none'}")
        if self.max_error is None:
            lines.append(
                "difference     not known: the model does not run on random inputs. Pass "
                "calibration data"
            )
        else:
            share = f"{self.max_error_fraction:.2%} of the output's range"
            lines.append(
                f"difference     {self.max_error:.3g}, {share}, limit {100 * self.bound:g}%"
            )
        if self.agreement is not None:
            lines.append(f"same argmax    {self.agreement:.2%}")
        seen = "random inputs, as no calibration data were given"
        if self.samples:
            ranges = (
                f"{name} {low:.4g} to {high:.4g}" if low <= high else f"{name} of text"
                for name, (low, high) in self.ranges.items()
            )
            seen = f"{format_count(self.samples, 'sample')}, {', '.join(ranges)}"
        lines.append(f"compared on    {seen}")
        total = len(self.equalized) + len(self.not_equalized)
        if total:
            of_all = format_count(total, "normalization")
            lines.append(f"equalized      {len(self.equalized)} of {of_all}")
            lines += [f"  not {name}: {reason}" for name, reason in self.not_equalized.items()]
        return "\n".join([*lines, *(f"warning        {text}" for text in self.warnings)])


def list_counts(counts: Mapping[str, int]) -> str:
    """Operators and how many there are of each, as a text."""
    return ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))
