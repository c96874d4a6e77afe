"""What each preset means, and the converter and the quantizer that write such files."""

import contextlib
import dataclasses
import functools
import io
import tempfile
import warnings

import keras
import numpy as np

from .runtime import LiteRT, upstream

# The share of a tensor's values that saturate on either side, and the bins that find it.
_RARE, _BINS = 2e-4, 4096


@dataclasses.dataclass(frozen=True)
class Preset:
    """How a file stores weights and computes."""

    # How far outputs may be off, as a share of their range and zero's. A file beyond is refused in
    # float32, where only roundings differ, and has a warning elsewhere.
    bound: float
    # Whether TensorFlow's converter stores the weights in fewer bits, and their type if chosen.
    is_optimized: bool = True
    weights: str | None = None
    # The integer type of the activations; None is float.
    activations: str | None = None
    # The converter's set of integer operators, and those that ai-edge-quantizer turns into
    # integers. It writes the file where there are any.
    converter_operators: str | None = None
    quantizer_operators: tuple[str, ...] = ()
    # Whether every operator shall be in integers.
    is_integer: bool = False
    # The least mean square that integer statistics tell from zero, as a share of a layer's largest.
    floor: float | None = None

    @property
    def is_calibrated(self):
        """Whether ranges of activations are measured on calibration data."""
        return self.activations is not None


_PRODUCTS = ("CONV_2D", "DEPTHWISE_CONV_2D", "CONV_2D_TRANSPOSE", "FULLY_CONNECTED")
PRESETS = {
    None: Preset(bound=1e-4, is_optimized=False),
    "float16": Preset(bound=0.01, weights="float16"),
    "dynamic": Preset(bound=0.1),
    "int8": Preset(
        bound=0.2,
        activations="int8",
        converter_operators="TFLITE_BUILTINS_INT8",
        quantizer_operators=("ALL_SUPPORTED",),
        is_integer=True,
        floor=1 / 64,
    ),
    "int8_float_statistics": Preset(bound=0.2, activations="int8", quantizer_operators=_PRODUCTS),
    "int16x8": Preset(
        bound=0.1,
        activations="int16",
        converter_operators="EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8",
        floor=1 / 1024,
    ),
}


def import_quantizer():
    """Imports ai-edge-quantizer, which is an extra."""
    try:
        from ai_edge_quantizer import qtyping, quantizer
    except ImportError as error:
        names = [name for name, preset in PRESETS.items() if preset.quantizer_operators]
        raise ImportError(
            f"ai-edge-quantizer is needed for {names}: pip install ai-edge-quantizer"
        ) from error
    return qtyping, quantizer


def convert(model, preset, specs, samples, integer_io):
    """Returns the content of a LiteRT file that computes the model, and a list of warnings."""
    input_names = [spec.name for spec in keras.tree.flatten(specs)]
    with tempfile.TemporaryDirectory() as folder:
        # `model.export` would trace some layers, such as `Resizing`, as in training.
        archive = keras.export.ExportArchive()
        archive.track(model)
        serve = functools.partial(model.__call__, training=False)
        archive.add_endpoint("serve", serve, input_signature=specs)
        archive.write_out(folder, verbose=False)
        if not preset.is_calibrated:
            return _by_converter(folder, preset, input_names, samples, integer_io), []
        content = _by_converter(folder, PRESETS[None], input_names, samples, False)
        if "WHILE" in LiteRT(content, is_plain=True).count_operators():
            # The converter does not survive one in int16x8.
            raise ValueError(
                "a loop has no integer form. Build recurrent layers with unroll=True, or use "
                "'dynamic'"
            )
        if not preset.quantizer_operators:
            return _by_converter(folder, preset, input_names, samples, integer_io), []
        content = _by_quantizer(content, preset, input_names, samples, integer_io)
        in_float = _float_operators(content) if preset.is_integer else []
        if not in_float:
            return content, []
        return _by_converter(folder, preset, input_names, samples, integer_io), [
            "quantized by TensorFlow's converter, as ai-edge-quantizer leaves "
            f"{', '.join(in_float)} in float. There the rarest values do not saturate."
        ]


def _by_converter(folder, preset, input_names, samples, integer_io):
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_saved_model(folder)
    if preset.is_optimized:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if preset.weights:
        converter.target_spec.supported_types = [tf.dtypes.as_dtype(preset.weights)]
    if preset.converter_operators:
        operators = getattr(tf.lite.OpsSet, preset.converter_operators)
        converter.target_spec.supported_ops = [operators]
        converter.representative_dataset = lambda: _rows(samples, input_names)
    if integer_io:
        dtype = tf.dtypes.as_dtype(preset.activations)
        converter.inference_input_type = converter.inference_output_type = dtype
    with warnings.catch_warnings():
        # That input and output are float while the rest is not, as asked for.
        warnings.filterwarnings("ignore", "Statistics for quantized inputs")
        # Of the interpreter that the converter itself uses for several inputs.
        warnings.filterwarnings("ignore", r"\s*Warning: tf.lite.Interpreter is deprecated")
        return converter.convert()


def _rows(samples, names):
    """Single samples, as the converter's calibration takes them, or batches of a fixed size."""
    for batch in samples:
        step = samples.fixed_size or 1
        for row in range(0, len(batch[0]), step):
            arrays = [array[row : row + step] for array in batch]
            yield dict(zip(names, arrays)) if len(names) > 1 else arrays


def _by_quantizer(content, preset, input_names, samples, integer_io):
    qtyping, ai_edge = import_quantizer()
    runtime = LiteRT(content, input_names, is_plain=True)
    quantizer = ai_edge.Quantizer(content)
    operator = qtyping.TFLOperationName
    ends = [operator.INPUT, operator.OUTPUT]
    chosen = [operator[name] for name in preset.quantizer_operators]
    for name in chosen + (ends if integer_io else []):
        quantizer.add_static_config(".*", name, activation_num_bits=8, weight_num_bits=8)
    if not integer_io:
        for name in ends:
            quantizer.update_quantization_recipe(".*", name, algorithm_key="no_quantize")
    ranges = _ranges(runtime, samples)
    # It shows a progress bar also when told not to.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        # Of an interpreter that the quantizer makes to look at the file.
        warnings.filterwarnings("ignore", ".*experimental_preserve_all_tensors")
        result = quantizer.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
    return bytes(result.quantized_model)


def _float_operators(content):
    """Names of the operators that read or write float numbers, but at the model's ends."""
    runtime = LiteRT(content, is_plain=True)
    details = runtime.interpreter.get_tensor_details()
    floats = {detail["index"] for detail in details if detail["dtype"] == np.float32}
    return sorted(
        {
            operator["op_name"]
            for operator in runtime.operators()
            if operator["op_name"] not in ("QUANTIZE", "DEQUANTIZE", "DELEGATE")
            and floats & {int(i) for i in (*operator["inputs"], *operator["outputs"])}
        }
    )


def _ranges(runtime, samples):
    """The range of each float tensor that is computed, by name, without its rarest values.

    Saturating the rarest values of a full-size tensor makes the steps of the others finer. On two
    networks that halved the error of the logits, with 1e-4 as with 3e-4 of the values on either
    side; 3e-5 and 1e-3 were worse. Inputs keep their range, and so does what no normalization
    follows: the peaks of a detector's output are rare, and what matters. A constant has its own
    range, channel by channel.
    """
    operators, interpreter = runtime.operators(), runtime.interpreter
    computed = {i for operator in operators for i in operator["outputs"]}
    computed |= {detail["index"] for detail in interpreter.get_input_details()}
    saturating = _before_normalizations(operators)
    limits, counts, shapes = {}, {}, {}

    def each_tensor():
        for batch in samples:
            runtime(*batch)
            for detail in interpreter.get_tensor_details():
                if detail["dtype"] == np.float32 and detail["index"] in computed:
                    values = interpreter.get_tensor(detail["index"])
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
    ranges = {}
    for name, (low, high) in limits.items():
        if name in counts:
            low, high = _saturated(counts[name], low, high)
        # Of the tensor's rank, as the quantizer wants them.
        shape = (1,) * len(shapes[name])
        ranges[name] = {"min": np.full(shape, low, "f4"), "max": np.full(shape, high, "f4")}
    return ranges


def _saturated(counts, low, high):
    """The range without the rarest values, from a histogram of the whole range."""
    share = np.cumsum(counts) / np.sum(counts)
    edges = np.linspace(low, high, _BINS + 1)
    least = edges[np.searchsorted(share, _RARE)]
    most = edges[np.searchsorted(share, 1 - _RARE) + 1]
    # A tensor of hardly anything but zeros is about its peaks.
    return (least, most) if most - least > (high - low) / 256 else (low, high)


def _before_normalizations(operators):
    """The computed tensors that a reciprocal square root depends on."""
    roots = [i for op in operators if op["op_name"] == "RSQRT" for i in op["inputs"]]
    return {output for i in upstream(operators, roots) for output in operators[i]["outputs"]}
