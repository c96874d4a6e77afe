"""A forward pass of all samples together, in which each layer can be fitted before it runs."""

import collections
import functools
import tempfile
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np

from .. import graph
from ..samples import Samples
from ..typing import Tensor

__all__ = ["ForwardPass"]

# What all samples give in one tensor is in memory up to this size, and in a file above.
_BYTES_IN_MEMORY = 2**28


class ForwardPass:
    """The forward pass of a model at inference on all samples, one layer after the other.

    Each layer runs once on each batch, and what no later layer reads is dropped. So the time is
    that of one pass, whatever the depth, and what is kept is what crosses one point of the network.
    `unfitted` are the layers that will change when the pass comes to them.
    """

    def __init__(self, model: keras.Model, samples: Samples, unfitted: Iterable[Any]) -> None:
        steps, inputs = graph.unroll(model)
        self._unfitted = set(unfitted)
        inside = {step: {step.layer, *graph.list_layers(step.layer)} for step in steps}
        self._changing = {step: self._unfitted & layers for step, layers in inside.items()}
        self._pending = dict.fromkeys(steps)
        self._uses = collections.Counter(key for step in steps for key in step.inputs)
        self._values = {key: _Values() for key in inputs}
        self._count = 0
        for self._count, batch in enumerate(samples, 1):
            for key, array in zip(inputs, batch):
                self._values[key].append(graph.Value(array))

    def fit(self, fit_layer: Callable[[Any, Callable[..., None]], None]) -> None:
        """Calls `fit_layer(layer, watch_inputs)` for each layer that changes, just before it runs.

        `watch_inputs(watch)` calls `watch(x, mask)` for each batch of inputs of the layer, in all
        of its calls.
        """
        for step in list(self._pending):
            if step not in self._pending:
                continue
            for layer in self._order(step):
                steps = [s for s in self._pending if layer in self._changing[s]]
                steps = self._run_before(steps)
                fit_layer(layer, functools.partial(self._watch, layer, steps))
                self._unfitted.discard(layer)
            self._run(step)

    def _order(self, step: graph.Step) -> list[Any]:
        """The layers that a step changes, in the order in which they are called."""
        layers = self._changing[step] & self._unfitted
        if len(layers) < 2:
            return list(layers)
        order: dict[Any, None] = {}
        with graph.watch_calls(layers, lambda layer, *_: order.setdefault(layer)):
            step.run(self._values[key][0] for key in step.inputs)
        return list(order)

    def _run_before(self, steps: list[graph.Step]) -> list[graph.Step]:
        """Runs what comes before and is final; returns the steps with those that are not."""
        wanted = {key for step in steps for key in step.inputs}
        missing = []
        for step in reversed(self._pending):
            if step in steps or not wanted.isdisjoint(step.outputs):
                missing.append(step)
                wanted.update(step.inputs)
        rest = []
        for step in reversed(missing):
            is_ready = all(key in self._values for key in step.inputs)
            if step in steps or self._changing[step] & self._unfitted or not is_ready:
                rest.append(step)
            else:
                self._run(step)
        return rest

    def _watch(
        self, layer: Any, steps: list[graph.Step], watch: Callable[[Tensor, Tensor], None]
    ) -> None:
        """Runs steps for each batch, and drops what they give."""
        with graph.watch_calls([layer], lambda _, x, z, mask: watch(x, mask)):
            for i in range(self._count):
                given: dict[object, graph.Value] = {}
                for step in steps:
                    inputs = [given.get(key) or self._values[key][i] for key in step.inputs]
                    given |= zip(step.outputs, step.run(inputs))

    def _run(self, step: graph.Step) -> None:
        for i in range(self._count):
            values = step.run([self._values[key][i] for key in step.inputs])
            for key, value in zip(step.outputs, values):
                if self._uses[key]:
                    self._values.setdefault(key, _Values()).append(value)
        del self._pending[step]
        self._uses.subtract(step.inputs)
        for key in step.inputs:
            if not self._uses[key]:
                self._values.pop(key, None)


class _Values:
    """A tensor's values for all batches."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(_BYTES_IN_MEMORY)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._places: list[tuple[int, np.dtype[Any], tuple[int, ...], Any]] = []

    def append(self, value: graph.Value) -> None:
        array = np.asarray(value.array)
        self._places.append((self._file.tell(), array.dtype, array.shape, value.mask))
        self._file.write(array.tobytes())

    def __getitem__(self, i: int) -> graph.Value:
        start, dtype, shape, mask = self._places[i]
        self._file.seek(start)
        count = int(np.prod(shape)) * dtype.itemsize
        array = np.frombuffer(bytearray(self._file.read(count)), dtype)
        return graph.Value(array.reshape(shape), mask)
