"""The one way to run a LiteRT file."""

import contextlib

import numpy as np


def import_litert():
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
        input_names: The names of the inputs in the order of the call. Those of the file in
            alphabetical order, where the file has others. Defaults to none.
        is_plain: Whether to keep each tensor and to run without delegates. Operators that are not
            built in are refused then. Defaults to False.
    """

    def __init__(self, file, input_names=(), is_plain=False):
        litert = import_litert()
        options = {"model_content": file} if isinstance(file, bytes) else {"model_path": str(file)}
        if is_plain:
            resolver = litert.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
            options["experimental_op_resolver_type"] = resolver
            options["experimental_preserve_all_tensors"] = True
        self.interpreter = litert.Interpreter(num_threads=1, **options)
        self._runner = self.interpreter.get_signature_runner()
        self._input_names = input_names

    def __call__(self, *arrays):
        details = self._runner.get_input_details()
        is_named = set(self._input_names) == set(details)
        names = self._input_names if is_named else sorted(details)
        inputs = {name: _quantized(a, details[name]) for name, a in zip(names, arrays)}
        outputs = self._runner(**inputs)
        details = self._runner.get_output_details()
        # Names of the converter's are numbered: output_2 comes before output_10.
        key = (lambda name: (len(name), name)) if "output_0" in outputs else None
        return [_dequantized(outputs[name], details[name]) for name in sorted(outputs, key=key)]

    def allocate(self):
        """Prepares a file that was not called."""
        # Unknown sizes are 1 in the file, which some models cannot run.
        with contextlib.suppress(RuntimeError):
            self.interpreter.allocate_tensors()

    def operators(self):
        """The operators in the order of execution, then the delegates: dicts of `op_name` and the
        indices of `inputs` and `outputs`."""
        return self.interpreter._get_ops_details()

    def count_operators(self):
        """Dict from the name of an operator to how many the file has."""
        names = [op["op_name"] for op in self.operators() if op["op_name"] != "DELEGATE"]
        return {name: names.count(name) for name in dict.fromkeys(names)}

    def count_partitions(self):
        """The number of pieces that delegates run."""
        return sum(op["op_name"] == "DELEGATE" for op in self.operators())

    def count_delegated(self):
        """The number of operators that delegates run."""
        delegates = [op for op in self.operators() if op["op_name"] == "DELEGATE"]
        plain = [op for op in self.operators() if op["op_name"] != "DELEGATE"]
        inside = [upstream(plain, d["outputs"], set(d["inputs"])) for d in delegates]
        return len(set().union(*inside))


def upstream(operators, tensors, borders=()):
    """The numbers of the operators that tensors depend on, as far as the borders."""
    makers = {output: i for i, op in enumerate(operators) for output in op["outputs"]}
    numbers, pending = set(), list(tensors)
    while pending:
        tensor = pending.pop()
        maker = makers.get(tensor)
        if maker is not None and tensor not in borders and maker not in numbers:
            numbers.add(maker)
            pending += list(operators[maker]["inputs"])
    return numbers


def _quantized(array, detail):
    scale, zero = detail["quantization"]
    if not scale or array.dtype.kind != "f":
        return np.asarray(array, detail["dtype"])
    limits = np.iinfo(detail["dtype"])
    return np.clip(np.round(array / scale) + zero, limits.min, limits.max).astype(detail["dtype"])


def _dequantized(array, detail):
    scale, zero = detail["quantization"]
    return (array.astype("float32") - zero) * scale if scale else array
