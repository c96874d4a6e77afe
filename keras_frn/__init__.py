"""Filter Response Normalization (FRN) and the Thresholded Linear Unit (TLU) for Keras 3."""

import importlib
from typing import TYPE_CHECKING

# `addons` registers what migrated files need.
from . import addons, constraints, ops  # noqa: F401
from .layers import TLU, FilterResponseNormalization, FilterResponseNormalizationTLU

if TYPE_CHECKING:
    from . import callbacks, models
    from .addons.loading import load_addons_model, load_addons_weights
    from .conversion import ConversionReport, replace_batch_normalization
    from .export import ExportReport, export_tflite

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

# What files need is there at once; tools load when they are first used.
_HOMES = {
    "ConversionReport": "conversion",
    "ExportReport": "export",
    "export_tflite": "export",
    "load_addons_model": "addons.loading",
    "load_addons_weights": "addons.loading",
    "replace_batch_normalization": "conversion",
}


def __getattr__(name):
    if name in ("callbacks", "models"):
        return importlib.import_module(f".{name}", __name__)
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
