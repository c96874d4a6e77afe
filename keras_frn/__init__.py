"""Filter Response Normalization (FRN) and the Thresholded Linear Unit (TLU) for Keras 3."""

import os
import warnings

try:
    import keras
except (ImportError, ValueError) as error:  # a backend that is missing, or of no known name
    raise ImportError(
        "keras_frn needs Keras 3.13.2 or newer, and the backend that KERAS_BACKEND or Keras' own "
        f"config names. Received: {error}. Install it, or name another backend."
    ) from error
if keras.__version__.split(".")[0] < "3":
    raise ImportError(
        f"keras_frn needs Keras 3.13.2 or newer. Received: Keras {keras.__version__}. Upgrade it: "
        "pip install --upgrade keras"
    )
if os.environ.get("TF_USE_LEGACY_KERAS", "").lower() in ("1", "true"):
    warnings.warn(
        "TF_USE_LEGACY_KERAS is set, so `tf.keras` is Keras 2, whose models cannot hold the layers "
        "of keras_frn. Unset it, or build models with `import keras`.",
        stacklevel=2,
    )

from . import callbacks, constraints, models, ops
from .addons.loading import load_addons_model, load_addons_weights
from .conversion import ConversionReport, replace_batch_normalization
from .export import ExportReport, export_tflite
from .layers import TLU, FilterResponseNormalization, FilterResponseNormalizationTLU

__version__ = "0.1.0"

__all__ = [
    "TLU",
    "ConversionReport",
    "ExportReport",
    "FilterResponseNormalization",
    "FilterResponseNormalizationTLU",
    "callbacks",
    "constraints",
    "export_tflite",
    "load_addons_model",
    "load_addons_weights",
    "models",
    "ops",
    "replace_batch_normalization",
]
