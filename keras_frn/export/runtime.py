"""The one way to run a LiteRT file."""

import collections
import contextlib
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..samples import Samples
from ..typing import Array, Batch, PathLike

__all__ = ["LiteRT", "LiteRTError", "find_upstream", "import_litert"]

# Numbers in the tensors of one run, if all are kept: 0.5 GB.
_KEPT = 2**27
# From which ratio of the scale of what an operator reads to that of its output on LiteRT or
# TensorFlow Lite Micro refuses the file or ends the process, by bits. Kernels take the ratio as a
# fraction of one, and XNNPACK as a number below 256.
_SCALE_RATIOS = {
    "ADD": {8: 2**19, 16: 2**14},
    "SUB": {8: 2**19, 16: 2**14},
    "SQUARED_DIFFERENCE": {8: 2**12},
    "DEPTHWISE_CONV_2D": {8: 2**8},
    "CONV_2D": {8: 2**8},
    "FULLY_CONNECTED": {8: 2**8},
}


class LiteRTError(RuntimeError):
    """LiteRT does not run a file."""


def import_litert() -> Any:
    """Imports the interpreter, which is an extra."""
    try:
        from ai_edge_litert import interpreter
    except ImportError as error:
        raise ImportError("LiteRT is needed to run the file: pip install ai-edge-litert") from error
    return interpreter


class LiteRT:
    """A LiteRT file in the interpreter, on one thread.

    Call it with one array for each input; it returns a list with one array for each output. Where
    an input or an output of the file is an integer, floats are quantized and dequantized.

    Args:
        file: Path or content of the file.
        input_names: The names of the inputs in the order of the call. If the file has others, its
            own are taken in alphabetical order. Defaults to none.
        is_plain: Whether to keep each tensor and to run without delegates. Operators that are not
            built in are refused then. Defaults to False.

    Raises:
        LiteRTError: if LiteRT cannot read the file or, when called, run it.
    """

    def __init__(
        self, file: bytes | PathLike, input_names: Sequence[str | None] = (), is_plain: bool = False
    ) -> None:
        litert = import_litert()
        options: dict[str, Any] = {"model_content": file}
        if not isinstance(file, bytes):
            options = {"model_path": os.fspath(file)}
        if is_plain:
            resolver = litert.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
            options["experimental_op_resolver_type"] = resolver
            options["experimental_preserve_all_tensors"] = True
        with _litert_errors():
            self.interpreter = litert.Interpreter(num_threads=1, **options)
            self._runner = self.interpreter.get_signature_runner()
        self._check_scales()
        self._input_names = input_names

    def __call__(self, *arrays: Array) -> Batch:
        details = self._runner.get_input_details()
        is_named = set(self._input_names) == set(details)
        names = self._input_names if is_named else sorted(details)
        inputs = {name: _quantize(a, details[name]) for name, a in zip(names, arrays)}
        with _litert_errors():
            outputs = self._runner(**inputs)
        return [_dequantize(outputs[name], d) for name, d in self._list_outputs()]

    def run_each(self, samples: Samples) -> Iterator[None]:
        """Runs the samples one part after the other, small enough to keep each tensor."""
        self.allocate()
        tensors = self.list_tensors()
        kept = sum(math.prod(tensors[i]["shape"].tolist()) for i in self.list_computed())
        size = samples.fixed_size or max(_KEPT // max(kept, 1), 1)
        for batch in samples:
            for start in range(0, len(batch[0]), size):
                self(*(array[start : start + size] for array in batch))
                yield

    def _check_scales(self) -> None:
        """Refuses scales that a runtime does not run or survive."""
        details = self.list_tensors()
        for op in self.list_operators():
            name = op["op_name"]
            tensors = [details.get(int(i)) for i in (*op["inputs"][:2], *op["outputs"][:1])]
            if name not in _SCALE_RATIOS or not all(tensors):
                continue
            first, second, output = (t["quantization_parameters"]["scales"] for t in tensors if t)
            bits = 8 * np.dtype(details[op["outputs"][0]]["dtype"]).itemsize
            limit = _SCALE_RATIOS[name].get(bits)
            if not first.size or not second.size or not output.size or limit is None:
                continue
            largest = max(*first, *second)
            step = {"ADD": largest, "SUB": largest, "SQUARED_DIFFERENCE": largest**2}.get(
                name, first.max() * second.max()
            )
            if step / output[0] >= limit:
                raise LiteRTError(
                    f"{name} gives numbers so small beside those it reads that {bits} bits do not "
                    "hold both"
                )

    def _list_outputs(self) -> list[tuple[str, Mapping[str, Any]]]:
        details = self._runner.get_output_details()
        # Names of the converter's are numbered: output_2 comes before output_10.
        key = (lambda name: (len(name), name)) if "output_0" in details else None
        return [(name, details[name]) for name in sorted(details, key=key)]

    def find_reused_outputs(self) -> dict[int, int]:
        """The outputs that are also read inside or that are one tensor, by number, and how many
        before it are the same tensor."""
        indices = [detail["index"] for _, detail in self._list_outputs()]
        used = {int(i) for op in self.list_operators() for i in op["inputs"]}
        used |= {detail["index"] for detail in self.interpreter.get_input_details()}
        return {
            i: indices[:i].count(tensor)
            for i, tensor in enumerate(indices)
            if tensor in used or indices.count(tensor) > 1
        }

    def allocate(self) -> None:
        """Prepares a file that was not called."""
        # Unknown sizes are 1 in the file, which some models cannot run.
        with contextlib.suppress(RuntimeError):
            self.interpreter.allocate_tensors()

    def list_tensors(self) -> dict[int, dict[str, Any]]:
        """The tensors by their indices: dicts of `name`, `shape`, `dtype` and more."""
        return {detail["index"]: detail for detail in self.interpreter.get_tensor_details()}

    def list_computed(self) -> set[int]:
        """The indices of the tensors that are not constants: inputs, and outputs of operators."""
        computed = {int(i) for op in self.list_operators() for i in op["outputs"]}
        return computed | {detail["index"] for detail in self.interpreter.get_input_details()}

    def list_operators(self, *, are_delegates: bool = False) -> list[dict[str, Any]]:
        """The operators in the order of execution: dicts of `op_name` and the indices of `inputs`
        and `outputs`."""
        # Nothing public tells what the delegates run. They come last.
        operators = self.interpreter._get_ops_details()
        return [op for op in operators if (op["op_name"] == "DELEGATE") == are_delegates]

    def count_operators(self) -> dict[str, int]:
        """Returns how many of each operator the file has."""
        return dict(collections.Counter(op["op_name"] for op in self.list_operators()))

    def count_float_operators(self, least_weights: int | None = None) -> dict[str, int]:
        """Returns how many of each operator read or write float32 numbers, apart from QUANTIZE and
        from SHAPE, which may ask a float input for its sizes.

        With `least_weights` only those count that have a float32 matrix of as many weights.
        """
        tensors = self.list_tensors()
        floats = {i for i, tensor in tensors.items() if tensor["dtype"] is np.float32}
        if least_weights is not None:
            shapes = {i: tensors[i]["shape"] for i in floats - self.list_computed()}
            matrices = {i: shape for i, shape in shapes.items() if np.sum(shape > 1) > 1}
            floats = {i for i, shape in matrices.items() if np.prod(shape) >= least_weights}
        names = [
            op["op_name"]
            for op in self.list_operators()
            if op["op_name"] not in ("QUANTIZE", "DEQUANTIZE", "SHAPE")
            and floats & {int(i) for i in (*op["inputs"], *op["outputs"])}
        ]
        return dict(collections.Counter(names))

    def is_quantized(self) -> bool:
        """Whether any tensor of numbers is stored in fewer bits than float32."""
        return any(
            tensor["quantization_parameters"]["scales"].size or tensor["dtype"] is np.float16
            for tensor in self.list_tensors().values()
        )

    def count_delegates(self) -> tuple[int, int]:
        """Returns how many operators delegates run, and in how many pieces."""
        plain, delegates = self.list_operators(), self.list_operators(are_delegates=True)
        inside = [find_upstream(plain, d["outputs"], set(d["inputs"])) for d in delegates]
        return len(set().union(*inside)), len(delegates)


@contextlib.contextmanager
def _litert_errors() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        text = " ".join(str(error).split()).rstrip(".")
        # The words of a kernel, and then whose they are.
        kernel = re.match(r"(.*?)\.? ?Node number \d+ \((\w+)\) failed", text)
        if kernel:
            text = f"LiteRT refuses {kernel[2]} ({kernel[1]})"
        raise LiteRTError(text) from error


def find_upstream(
    operators: Sequence[Mapping[str, Any]], tensors: Iterable[int], borders: Collection[int] = ()
) -> set[int]:
    """The numbers of the operators that tensors depend on, as far as the borders."""
    producers = {output: i for i, op in enumerate(operators) for output in op["outputs"]}
    numbers: set[int] = set()
    pending = list(tensors)
    while pending:
        tensor = pending.pop()
        producer = producers.get(tensor)
        if producer is not None and tensor not in borders and producer not in numbers:
            numbers.add(producer)
            pending += list(operators[producer]["inputs"])
    return numbers


def _quantize(array: Array, detail: Mapping[str, Any]) -> Array:
    scale, zero = detail["quantization"]
    if not scale or array.dtype.kind != "f":
        return np.asarray(array, detail["dtype"])
    limits = np.iinfo(detail["dtype"])
    return np.clip(np.round(array / scale) + zero, limits.min, limits.max).astype(detail["dtype"])


def _dequantize(array: Array, detail: Mapping[str, Any]) -> Array:
    scale, zero = detail["quantization"]
    return (array.astype("float32") - zero) * scale if scale else array
