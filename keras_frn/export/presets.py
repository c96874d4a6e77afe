"""What each preset of `export_tflite` means."""

import dataclasses
from typing import Literal, TypeAlias

__all__ = ["PRESETS", "Preset", "Scheme"]

Preset: TypeAlias = Literal["float16", "dynamic", "int8", "int8_float_statistics", "int16x8"]


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a file stores weights and computes."""

    # How far outputs may be off, as a fraction of their range and zero's. A file beyond is refused
    # in float32, where only roundings differ, and has a warning elsewhere.
    bound: float
    # Whether TensorFlow's converter stores the weights in fewer bits, and their type if chosen.
    is_optimized: bool = True
    weights: str | None = None
    # The integer type of the activations; None is float.
    activations: str | None = None
    # The operators that ai-edge-quantizer turns into integers, and the set of TensorFlow's
    # converter, which writes the file if some are left.
    quantizer_operators: tuple[str, ...] = ()
    converter_operators: str | None = None
    # How many times wider than on the calibration data the ranges of activations are. 8 bits have
    # none to spare: there the rarest values saturate.
    headroom: float = 1.0
    # Whether every operator shall be in integers.
    is_integer: bool = False
    # The least number that a constant may be: epsilon becomes 0 below it.
    least_epsilon: float = 0.0
    # The least mean square that the integers tell from zero, as a fraction of a layer's largest.
    floor: float | None = None

    @property
    def is_calibrated(self) -> bool:
        """Whether ranges of activations are measured on calibration data."""
        return self.activations is not None

    @property
    def bits(self) -> int:
        """The bits of an activation in integers."""
        return 16 if self.activations == "int16" else 8


_PRODUCTS = ("CONV_2D", "DEPTHWISE_CONV_2D", "CONV_2D_TRANSPOSE", "FULLY_CONNECTED")
PRESETS: dict[Preset | None, Scheme] = {
    None: Scheme(bound=1e-4, is_optimized=False),
    "float16": Scheme(bound=0.01, weights="float16", least_epsilon=2**-14),
    "dynamic": Scheme(bound=0.1),
    "int8": Scheme(
        bound=0.2,
        activations="int8",
        quantizer_operators=("ALL_SUPPORTED",),
        converter_operators="TFLITE_BUILTINS_INT8",
        is_integer=True,
        floor=1 / 64,
    ),
    "int8_float_statistics": Scheme(bound=0.2, activations="int8", quantizer_operators=_PRODUCTS),
    "int16x8": Scheme(
        bound=0.1,
        activations="int16",
        quantizer_operators=("ALL_SUPPORTED",),
        converter_operators="EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8",
        # Not 4: LiteRT refuses most sums of 16 bits if each scale is a power of two, as those of
        # images from 0 to 255 that become -1 to 1 would be.
        headroom=4.01,
        is_integer=True,
        floor=1 / 1024,
    ),
}
