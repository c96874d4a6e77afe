"""Filter Response Normalization (FRN) and the Thresholded Linear Unit (TLU) for Keras 3."""

from . import ops
from .layers import TLU, FilterResponseNormalization, FilterResponseNormalizationTLU

__version__ = "0.1.0"

__all__ = ["TLU", "FilterResponseNormalization", "FilterResponseNormalizationTLU", "ops"]
