"""What `model.export` cannot do by itself: quantized LiteRT files that keep the accuracy."""

import contextlib
import dataclasses
import io
import os
import pathlib
import tempfile
import warnings

import keras
import numpy as np

from ..layers import FilterResponseNormalization
from .inference_form import InferenceCopy, input_structure

_PRESETS = (None, "float16", "dynamic", "int8", "int8_float_statistics", "int16x8")
_STATIC = ("int8", "int8_float_statistics", "int16x8")
_BY_QUANTIZER = ("int8", "int8_float_statistics")
_MAX_SAMPLES = 2048
# The share of a tensor's values that saturate on either side, and the bins that find it.
_RARE, _BINS = 2e-4, 4096


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What `export_tflite` wrote, and how close it is to the model. `print(report)` shows it.

    Attributes:
        path: The file.
        quantization: The preset.
        size: Bytes of the file.
        operators: Dict of operator name to count.
        delegated: Number of operators that the interpreter hands to XNNPACK on this machine.
        partitions: Number of pieces in which it does so; 1 is best.
        samples: Number of calibration samples compared; without any, the next two are None.
        max_error: Largest absolute difference from the model's outputs.
        agreement: Share of samples (or positions) with the same argmax along the last axis, for
            outputs of more than one number.
        equalized: Names of the normalization layers whose input channels were scaled.
        not_equalized: Dict of the other ones' names to the reason.
        warnings: What a user should know.
    """

    path: str
    quantization: str | None
    size: int
    operators: dict
    delegated: int
    partitions: int
    samples: int
    max_error: float | None
    agreement: float | None
    equalized: tuple = ()
    not_equalized: dict = dataclasses.field(default_factory=dict)
    warnings: tuple = ()

    def __str__(self):
        count = sum(self.operators.values())
        names = ", ".join(f"{n} {name}" for name, n in sorted(self.operators.items()))
        lines = [
            f"{self.path}: {self.quantization or 'float32'}, {self.size:,} bytes",
            f"operators      {count}: {names}",
            f"XNNPACK        {self.delegated} of {count} operators, partitions: {self.partitions}",
        ]
        if self.samples:
            lines.append(
                f"verified on    {self.samples} samples: max error {self.max_error:.3g}"
                + ("" if self.agreement is None else f", same argmax {self.agreement:.2%}")
            )
        else:
            lines.append("verified on    nothing, as no `calibration_data` was given")
        if self.quantization in _STATIC:
            total = len(self.equalized) + len(self.not_equalized)
            lines.append(f"equalized      {len(self.equalized)} of {total} normalizations")
            lines += [f"  not {name}: {reason}" for name, reason in self.not_equalized.items()]
        return "\n".join([*lines, *(f"warning        {text}" for text in self.warnings)])


def export_tflite(
    model, path, quantization=None, calibration_data=None, integer_io=False, verbose=False
):
    """Writes a model as a LiteRT (TensorFlow Lite) file, and compares the two.

    ```
    FRN(k * x, k**2 * epsilon) = FRN(x, epsilon)       for k > 0, per channel
    ```

    The mean square of Filter Response Normalization has the square of its input's range, which an
    8-bit integer cannot hold as soon as channels or samples differ in scale. So the integer
    presets first scale each input channel to unit root mean square on the calibration data, through
    the filters of the layer before it, which changes nothing in float; and `"int8"` normalizes
    twice, coarsely and then exactly, where samples differ more than 8 bits resolve. In both 8-bit
    presets the rarest 2 of 10,000 values before a normalization saturate. The model given stays as
    it is.

    Args:
        model: A functional, Sequential or nested Keras model; mixed precision is exported in
            float32. A subclassed model in float32 is taken as it is, without equalization.
        path: Where to write; ends with `.tflite`.
        quantization: One of
            None: float32.
            `"float16"`: weights stored in half precision.
            `"dynamic"`: 8-bit weights; convolutions scale their inputs for each sample.
            `"int8"`: every tensor and operator in integers, for NPUs and microcontrollers.
            `"int8_float_statistics"`: convolutions and dense layers in 8-bit integers, the rest in
            float: the robust one.
            `"int16x8"`: 16-bit activations and 8-bit weights.
            Defaults to None.
        calibration_data: Inputs like those at inference, some hundreds of samples: an array, a list
            or dict of arrays for several inputs, a `tf.data.Dataset`, or an iterable of batches,
            each the inputs or `(inputs, targets)`. The integer presets need it; with any preset the
            report compares the file with the model on it. At most 2048 samples are used. Defaults
            to None.
        integer_io: Whether inputs and outputs are integers too (int8, or int16 with `"int16x8"`).
            Defaults to False.
        verbose: Whether to print each step. Defaults to False.

    Returns:
        An `ExportReport`.

    Raises:
        ValueError: if an argument does not fit, or the model cannot be exported in this way. No
            file is left behind.
        ImportError: if LiteRT, or for the 8-bit presets ai-edge-quantizer, is not installed.

    Example:

    >>> report = keras_frn.export_tflite(model, "model.tflite", "int8", images[:300])
    >>> print(report)
    """
    path = _checked_path(path)
    _check_arguments(quantization, integer_io)
    _import_litert()
    if quantization in _BY_QUANTIZER:
        _import_quantizer()
    batches = _batches(model, calibration_data, quantization)
    say = print if verbose else lambda *_: None

    say("copying the model in float32")
    copy = _copied(model)
    notes = []
    if quantization in _STATIC and copy is not None:
        say(f"equalizing {len(copy.normalizations)} normalizations")
        copy.equalize(batches)
        if quantization == "int8":
            copy.use_integer_form(batches)
    equalized = () if copy is None else tuple(copy.equalized)
    not_equalized = dict(copy.not_equalized) if copy is not None else _named_normalizations(model)
    if quantization == "int8" and not_equalized:
        notes.append(
            f"not equalized: {', '.join(not_equalized)}. If channels differ in scale there, 'int8' "
            "loses accuracy and 'int8_float_statistics' does not."
        )

    with tempfile.TemporaryDirectory() as folder:
        say(f"converting to {quantization or 'float32'}")
        exported = model if copy is None else copy.model
        content, said = _converted(exported, folder, quantization, batches, integer_io)
        notes += said
    say("verifying in LiteRT")
    try:
        runtime = _Runtime(content, _input_names(model), batches)
    except RuntimeError as error:
        raise ValueError(
            f"`model` must become a file that LiteRT runs. Received: {model.name}, which with "
            f"quantization={quantization!r} gives: {error}. Try another preset."
        ) from error
    samples, max_error, agreement = _compared(model, runtime, batches)
    _write(path, content)
    return ExportReport(
        path=path,
        quantization=quantization,
        size=len(content),
        operators=runtime.operators,
        delegated=runtime.delegated,
        partitions=runtime.partitions,
        samples=samples,
        max_error=max_error,
        agreement=agreement,
        equalized=equalized,
        not_equalized=not_equalized if quantization in _STATIC else {},
        warnings=tuple(notes),
    )


def _checked_path(path):
    path = os.fspath(path)
    if not path.endswith(".tflite"):
        raise ValueError(f"`path` must end with .tflite. Received: path={path!r}. Add the ending.")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise ValueError(
            f"`path` must be in a folder that exists. Received: path={path!r}. Create the folder."
        )
    return path


def _check_arguments(quantization, integer_io):
    if quantization not in _PRESETS:
        raise ValueError(
            f"`quantization` must be one of {_PRESETS}. Received: quantization={quantization!r}. "
            "Use 'int8' for integer hardware and 'dynamic' or 'int8_float_statistics' for CPUs."
        )
    if integer_io and quantization not in _STATIC:
        raise ValueError(
            f"`integer_io` must be False unless `quantization` is one of {_STATIC}. Received: "
            f"integer_io={integer_io}, quantization={quantization!r}. Leave it out."
        )
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            "`export_tflite` must run on the TensorFlow backend. Received: "
            f"backend={keras.backend.backend()!r}. Save the model as .keras, and export it in a "
            "process with KERAS_BACKEND=tensorflow."
        )


def _import_litert():
    try:
        from ai_edge_litert import interpreter
    except ImportError as error:
        raise ImportError(
            'LiteRT is needed to verify the file: pip install "keras-frn[export]"'
        ) from error
    return interpreter


def _import_quantizer():
    try:
        from ai_edge_quantizer import qtyping, quantizer
    except ImportError as error:
        raise ImportError(
            f'ai-edge-quantizer is needed for {_BY_QUANTIZER}: pip install "keras-frn[export]"'
        ) from error
    return qtyping, quantizer


def _is_functional(model):
    return isinstance(model, (keras.Sequential, keras.Function)) and bool(model.inputs)


def _input_names(model):
    return [t.name for t in model.inputs] if _is_functional(model) else []


def _copied(model):
    """The `InferenceCopy`, or None for a model that has to be exported as it is."""
    if _is_functional(model):
        try:
            copy = InferenceCopy(model)
        except (TypeError, NotImplementedError) as error:
            raise ValueError(
                "`model` must consist of layers that `get_config` describes. Received: "
                f"{model.name}, of which a copy fails with: {error}"
            ) from error
        copy.absorb_offsets()
        copy.pool_first()
        return copy
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(
            f"`model` must be a built Keras model. Received: model={model!r}. Call it on data."
        )
    other = {w.dtype for w in model.weights} | {model.compute_dtype}
    other |= {layer.compute_dtype for layer in model._flatten_layers(include_self=False)}
    if not other <= {"float32"}:
        raise ValueError(
            "`model` must be functional or Sequential to be exported from mixed precision. "
            f"Received: a subclassed model with dtypes {sorted(other)}. Load it in float32."
        )
    return None


def _named_normalizations(model):
    return {
        layer.name: "it is part of a subclassed model"
        for layer in model._flatten_layers(include_self=False)
        if isinstance(layer, FilterResponseNormalization)
    }


def _batches(model, data, quantization):
    """The data as a list of batches, each a list of arrays in the order of the model's inputs."""
    if data is None:
        if quantization in _STATIC:
            raise ValueError(
                f"`calibration_data` must be given with quantization={quantization!r}. Received: "
                "calibration_data=None. Pass inputs like those at inference, in their whole range "
                "of contrast: an array of 100 to 500 samples, a `tf.data.Dataset` or an iterable "
                "of batches."
            )
        return []
    inputs = list(model.inputs or ()) if _is_functional(model) else []
    fixed = inputs[0].shape[0] if inputs else None
    step = fixed or 32
    batches, samples = [], 0
    for element in _elements(data, len(inputs)):
        arrays = _flat_inputs(element, inputs)
        for start in range(0, len(arrays[0]), step):
            # A model of a fixed batch size gets full batches.
            stop = start + step if fixed else min(start + step, len(arrays[0]))
            rows = np.arange(start, stop) % len(arrays[0])
            batches.append([array[rows] for array in arrays])
        samples += len(arrays[0])
        if samples >= _MAX_SAMPLES:
            break
    if not samples:
        raise ValueError(
            "`calibration_data` must hold at least one sample. Received: nothing. A generator that "
            "was used before is empty."
        )
    return batches


def _elements(data, number_of_inputs):
    if isinstance(data, dict) or hasattr(data, "shape"):
        data = keras.tree.map_structure(lambda array: array[:_MAX_SAMPLES], data)
        return [data]
    if (
        isinstance(data, (list, tuple))
        and number_of_inputs > 1
        and len(data) == number_of_inputs
        and all(hasattr(array, "shape") for array in data)
    ):
        return [list(data)]
    return (keras.utils.unpack_x_y_sample_weight(element)[0] for element in data)


def _flat_inputs(element, inputs):
    if isinstance(element, dict) and inputs and set(element) == {t.name for t in inputs}:
        element = [element[t.name] for t in inputs]
    arrays = [np.asarray(array) for array in keras.tree.flatten(element)]
    if inputs and len(arrays) != len(inputs):
        raise ValueError(
            f"`calibration_data` must hold {len(inputs)} inputs per sample. Received: "
            f"{len(arrays)}. Pass a list in the order of `model.inputs`, or a dict of their names."
        )
    for i, tensor in enumerate(inputs):
        if arrays[i].ndim == len(tensor.shape) - 1:
            arrays[i] = arrays[i][None]
        sizes = zip(arrays[i].shape[1:], tensor.shape[1:])
        if arrays[i].ndim != len(tensor.shape) or any(b not in (None, a) for a, b in sizes):
            raise ValueError(
                f"`calibration_data` must have the shape of the model's inputs, {tensor.shape}. "
                f"Received: an array of shape {arrays[i].shape}. Prepare it as for `model.predict`."
            )
        if keras.backend.is_float_dtype(tensor.dtype):
            arrays[i] = arrays[i].astype("float32")
    if any(a.dtype.kind == "f" and not np.isfinite(a).all() for a in arrays):
        raise ValueError(
            "`calibration_data` must be finite. Received: an array with NaN or infinity. Remove it."
        )
    return arrays


def _converted(model, folder, quantization, batches, integer_io):
    """The file's content, and what a user should know of it."""
    import tensorflow as tf

    names, notes = _input_names(model), []
    model.export(folder, format="tf_saved_model", verbose=False)

    def convert(quantization):
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        if quantization is not None:
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if quantization == "float16":
            converter.target_spec.supported_types = [tf.float16]
        if quantization in ("int8", "int16x8"):
            sets = tf.lite.OpsSet
            converter.representative_dataset = lambda: _rows(batches, names)
            converter.target_spec.supported_ops = [
                sets.TFLITE_BUILTINS_INT8
                if quantization == "int8"
                else sets.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8
            ]
            if integer_io:
                dtype = tf.int8 if quantization == "int8" else tf.int16
                converter.inference_input_type = converter.inference_output_type = dtype
        with warnings.catch_warnings():
            # That input and output are float while the rest is not, as asked for.
            warnings.filterwarnings("ignore", "Statistics for quantized inputs")
            # Of the interpreter that the converter itself uses for several inputs.
            warnings.filterwarnings("ignore", r"\s*Warning: tf.lite.Interpreter is deprecated")
            return converter.convert()

    try:
        if quantization not in _BY_QUANTIZER:
            return convert(quantization), notes
        content = _with_integers(convert(None), quantization, names, batches, integer_io)
        left = _float_operators(content) if quantization == "int8" else []
        if left:
            content = convert("int8")
            notes.append(
                "quantized by TensorFlow's converter, as ai-edge-quantizer leaves "
                f"{', '.join(left)} in float. There the rarest values do not saturate."
            )
        return content, notes
    except Exception as error:
        raise ValueError(
            "`model` must consist of operators that LiteRT has with quantization="
            f"{quantization!r}. Received: {model.name}, of which the converter says: {error}. "
            "'int8_float_statistics' and 'dynamic' take more operators than 'int8'."
        ) from error


def _rows(batches, names):
    """Single samples, as the converter's calibration takes them."""
    for batch in batches:
        for row in range(len(batch[0])):
            arrays = [array[row : row + 1] for array in batch]
            yield dict(zip(names, arrays)) if len(names) > 1 else arrays


def _with_integers(content, quantization, names, batches, integer_io):
    """Quantizes a float LiteRT file: every operator, or the convolutions and dense layers."""
    qtyping, quantizer = _import_quantizer()
    runtime = _Runtime(content, names, batches, keep_tensors=True)
    operator = qtyping.TFLOperationName
    made = quantizer.Quantizer(_with_sizes(content, runtime.shapes))
    products = ["CONV_2D", "DEPTHWISE_CONV_2D", "CONV_2D_TRANSPOSE", "FULLY_CONNECTED"]
    ends = [operator.INPUT, operator.OUTPUT]
    chosen = [operator.ALL_SUPPORTED] if quantization == "int8" else [operator[p] for p in products]
    for name in chosen + (ends if integer_io else []):
        made.add_static_config(".*", name, activation_num_bits=8, weight_num_bits=8)
    if not integer_io:
        for name in ends:
            made.update_quantization_recipe(".*", name, algorithm_key="no_quantize")
    ranges = runtime.ranges(batches)
    # It shows a progress bar also when told not to.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        # Of an interpreter that the quantizer makes to look at the file.
        warnings.filterwarnings("ignore", ".*experimental_preserve_all_tensors")
        result = made.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
    return bytes(result.quantized_model)


def _with_sizes(content, shapes):
    """The file with inputs of these shapes unless resized. The quantizer tries it at that size, and
    not every model of unknown size runs on a single pixel.
    """
    from tensorflow.lite.tools import flatbuffer_utils

    file = flatbuffer_utils.convert_bytearray_to_object(bytearray(content))
    for index, shape in shapes.items():
        file.subgraphs[0].tensors[index].shape = shape
    return bytes(flatbuffer_utils.convert_object_to_bytearray(file))


def _float_operators(content):
    """Names of the operators that read or write float numbers, but at the model's ends."""
    litert = _import_litert()
    resolver = litert.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = litert.Interpreter(model_content=content, experimental_op_resolver_type=resolver)
    floats = {d["index"] for d in interpreter.get_tensor_details() if d["dtype"] == np.float32}
    return sorted(
        {
            operator["op_name"]
            for operator in interpreter._get_ops_details()
            if operator["op_name"] not in ("QUANTIZE", "DEQUANTIZE", "DELEGATE")
            and floats & {int(i) for i in (*operator["inputs"], *operator["outputs"])}
        }
    )


class _Runtime:
    """A LiteRT file in the interpreter, called on batches with inputs in the order of `names`."""

    def __init__(self, content, names, batches, keep_tensors=False):
        litert = _import_litert()
        options = {}
        if keep_tensors:
            resolvers = litert.OpResolverType
            options = {
                "experimental_preserve_all_tensors": True,
                "experimental_op_resolver_type": resolvers.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
            }
        self._interpreter = litert.Interpreter(model_content=content, num_threads=1, **options)
        self._names = names
        self._runner = self._interpreter.get_signature_runner()
        if batches:
            self([array[:1] for array in batches[0]])
        else:
            # Without data, unknown sizes are 1, which some models cannot run.
            with contextlib.suppress(RuntimeError):
                self._interpreter.allocate_tensors()
        self.shapes = {d["index"]: d["shape"] for d in self._interpreter.get_input_details()}
        operators = self._interpreter._get_ops_details()
        kinds = [operator["op_name"] for operator in operators]
        self.operators = {k: kinds.count(k) for k in dict.fromkeys(kinds) if k != "DELEGATE"}
        self.partitions = kinds.count("DELEGATE")
        self.delegated = _number_delegated(operators)

    def __call__(self, batch):
        details = self._runner.get_input_details()
        keys = self._names if set(self._names) == set(details) else sorted(details)
        inputs = {key: _quantized(a, details[key]) for key, a in zip(keys, batch)}
        outputs = self._runner(**inputs)
        details = self._runner.get_output_details()
        keys = sorted(outputs, key=lambda key: (len(key), key) if "output_0" in outputs else key)
        return [_dequantized(outputs[key], details[key]) for key in keys]

    def ranges(self, batches):
        """The range of each float tensor that is computed, by name, without its rarest values.

        Saturating the rarest values of a full-size tensor makes the steps of the others finer. On
        two networks that halved the error of the logits, with 1e-4 as with 3e-4 of the values on
        either side; 3e-5 and 1e-3 were worse. Inputs keep their range, and so does what no
        normalization follows: the peaks of a detector's output are rare, and what matters.
        A constant has its own range, channel by channel.
        """
        operators = self._interpreter._get_ops_details()
        written = {i for operator in operators for i in operator["outputs"]}
        written |= {detail["index"] for detail in self._interpreter.get_input_details()}
        saturating = _before_normalizations(operators)
        limits, counts, shapes = {}, {}, {}

        def each_tensor():
            for batch in batches:
                self(batch)
                for detail in self._interpreter.get_tensor_details():
                    if detail["dtype"] == np.float32 and detail["index"] in written:
                        values = self._interpreter.get_tensor(detail["index"])
                        if values.size:
                            yield detail["index"], detail["name"], values

        for _, name, values in each_tensor():
            low, high = limits.get(name, (np.inf, -np.inf))
            limits[name] = min(low, values.min()), max(high, values.max())
            shapes[name] = values.shape
        for index, name, values in each_tensor():
            is_full_size = np.prod(shapes[name][1:-1]) > 1  # not one number per channel
            if index in saturating and is_full_size and np.isfinite(limits[name]).all():
                count, _ = np.histogram(values, _BINS, limits[name])
                counts[name] = counts.get(name, 0) + count
        found = {}
        for name, (low, high) in limits.items():
            if name in counts:
                share = np.cumsum(counts[name]) / np.sum(counts[name])
                edges = np.linspace(low, high, _BINS + 1)
                least = edges[np.searchsorted(share, _RARE)]
                most = edges[np.searchsorted(share, 1 - _RARE) + 1]
                # A tensor of hardly anything but zeros is about its peaks.
                if most - least > (high - low) / 256:
                    low, high = least, most
            # Of the tensor's rank, as the quantizer wants them.
            one = (1,) * len(shapes[name])
            found[name] = {"min": np.full(one, low, "f4"), "max": np.full(one, high, "f4")}
        return found


def _upstream(operators, tensors, borders=()):
    """The numbers of the operators that tensors depend on, as far as the borders."""
    maker = {output: i for i, op in enumerate(operators) for output in op["outputs"]}
    found, pending = set(), list(tensors)
    while pending:
        tensor = pending.pop()
        if tensor in maker and tensor not in borders and maker[tensor] not in found:
            found.add(maker[tensor])
            pending += list(operators[maker[tensor]]["inputs"])
    return found


def _before_normalizations(operators):
    """The computed tensors that a reciprocal square root depends on."""
    roots = [
        i for operator in operators if operator["op_name"] == "RSQRT" for i in operator["inputs"]
    ]
    return {output for i in _upstream(operators, roots) for output in operators[i]["outputs"]}


def _number_delegated(operators):
    """How many operators the delegates at the end of the list stand for."""
    plain = [operator for operator in operators if operator["op_name"] != "DELEGATE"]
    inside = set()
    for delegate in operators[len(plain) :]:
        inside |= _upstream(plain, delegate["outputs"], set(delegate["inputs"]))
    return len(inside)


def _quantized(array, detail):
    scale, zero = detail["quantization"]
    if not scale or array.dtype.kind != "f":
        return array
    limits = np.iinfo(detail["dtype"])
    return np.clip(np.round(array / scale) + zero, limits.min, limits.max).astype(detail["dtype"])


def _dequantized(array, detail):
    scale, zero = detail["quantization"]
    return (array.astype("float32") - zero) * scale if scale else array


def _compared(model, runtime, batches):
    """Number of samples, largest difference, and share of equal argmax."""
    structure = input_structure(model) if _is_functional(model) else None
    samples, max_error, same, positions = 0, 0.0, 0, 0
    for batch in batches:
        inputs = batch[0] if structure is None else keras.tree.pack_sequence_as(structure, batch)
        outputs = keras.tree.flatten(model(inputs, training=False))
        for ours, theirs in zip(runtime(batch), outputs):
            theirs = np.asarray(theirs, "float32")
            with np.errstate(invalid="ignore"):
                error = np.where(ours == theirs, 0.0, np.abs(ours - theirs))
            max_error = max(max_error, float(error.max(initial=0.0)))
            if theirs.ndim > 1 and theirs.shape[-1] > 1:
                equal = ours.argmax(-1) == theirs.argmax(-1)
                same, positions = same + int(equal.sum()), positions + equal.size
        samples += len(batch[0])
    return (
        samples,
        max_error if samples else None,
        same / positions if positions else None,
    )


def _write(path, content):
    partial = f"{path}.{os.getpid()}.tmp"
    try:
        pathlib.Path(partial).write_bytes(content)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)
        raise
