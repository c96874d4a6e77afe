"""Callbacks for training with FRN."""

from .conversion.schedule import EpsilonScheduler
from .monitor import FRNMonitor

__all__ = ["EpsilonScheduler", "FRNMonitor"]
