"""The content of a LiteRT file, by TensorFlow's converter and by ai-edge-quantizer."""

import contextlib
import functools
import io
import re
import tempfile
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import keras

from ..errors import ArgumentError
from ..samples import Samples
from .biases import correct_biases
from .presets import PRESETS, Scheme
from .ranges import measure_ranges
from .runtime import LiteRT
from .simplification import simplify

__all__ = ["ConversionError", "convert", "import_quantizer"]


class ConversionError(Exception):
    """Says in a sentence why a model does not become a file."""


def import_quantizer() -> tuple[Any, Any]:
    """Imports ai-edge-quantizer, which is an extra."""
    try:
        from ai_edge_quantizer import qtyping, quantizer
    except ImportError as error:
        names = [name for name, scheme in PRESETS.items() if scheme.is_calibrated]
        raise ImportError(
            f"ai-edge-quantizer is needed for {names}: pip install ai-edge-quantizer"
        ) from error
    return qtyping, quantizer


def convert(
    model: Any, scheme: Scheme, specs: Any, samples: Samples, integer_io: bool = False
) -> tuple[bytes, list[str]]:
    """Returns the content of a LiteRT file that computes the model, and a list of notes.

    Raises:
        ConversionError: if TensorFlow cannot trace the model, or if the converter or the quantizer
            refuses it.
        ArgumentError: about `input_signature`, if sizes must be fixed.
        LiteRTError: if LiteRT cannot run the float file, on which ranges are measured.
        OSError: if the temporary folder cannot be written.
    """
    inputs = keras.tree.flatten(specs)
    with tempfile.TemporaryDirectory() as folder:
        _save(model, specs, folder)
        by_converter = functools.partial(_by_converter, folder, inputs, samples)
        if not scheme.is_calibrated:
            return by_converter(scheme), []
        content = by_converter(PRESETS[None])
        plain = LiteRT(content, is_plain=True)
        if "WHILE" in plain.count_operators():
            # TensorFlow's converter does not survive one in int16x8.
            raise ConversionError(
                "a loop has no integer form. Build recurrent layers with unroll=True, or use "
                "'dynamic'."
            )
        reused = plain.find_reused_outputs()
        if reused:
            _save(model, specs, folder, reused)
            content = by_converter(PRESETS[None])
        try:
            content = _by_quantizer(content, scheme, inputs, samples, integer_io)
            in_float = LiteRT(content, is_plain=True).count_float_operators()
            reason = f"ai-edge-quantizer leaves {', '.join(in_float)} in float."
        except ConversionError as error:
            if not scheme.converter_operators:
                raise
            in_float, reason = {"every operator": 1}, str(error)
        if not in_float or not scheme.is_integer:
            return content, []
        note = f"quantized by TensorFlow's converter: {reason} Ranges are those of the data."
        return by_converter(scheme, integer_io), [note]


def _save(
    model: Any, specs: Any, folder: str, reused: Mapping[int, int] = MappingProxyType({})
) -> None:
    """Writes the inference function as a SavedModel, some of its outputs as copies."""
    import tensorflow as tf

    # `model.export` would trace some layers, such as `Resizing`, as in training.
    archive = keras.export.ExportArchive()
    archive.track(model)

    def serve(*inputs: Any) -> Any:
        outputs = model(*inputs, training=False)
        flat = keras.tree.flatten(outputs)
        for i, number in reused.items():
            # ai-edge-quantizer loses outputs that are read inside, or that are one tensor. Of one
            # tensor no chain is the beginning of another.
            for bit in f"{number:0{max(reused.values()).bit_length()}b}":
                flat[i] = (keras.ops.minimum if bit == "1" else keras.ops.maximum)(flat[i], flat[i])
        parts = outputs.values() if isinstance(outputs, dict) else outputs
        # A signature has no structures inside of others.
        is_nested = keras.tree.is_nested(outputs) and any(map(keras.tree.is_nested, parts))
        return flat if is_nested else keras.tree.pack_sequence_as(outputs, flat)

    archive.add_endpoint("serve", serve, input_signature=specs)
    # What code raises that was not written for a graph.
    untraceable = (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError)
    try:
        archive.write_out(folder, verbose=False)
    except (*untraceable, tf.errors.InvalidArgumentError) as error:
        raise ConversionError(f"TensorFlow cannot trace it: {_shorten(error)}.") from error
    except tf.errors.OpError as error:
        raise OSError(f"A SavedModel cannot be written to {folder}: {error.message}") from error


def _by_converter(
    folder: str,
    inputs: Sequence[keras.InputSpec],
    samples: Samples,
    scheme: Scheme,
    integer_io: bool = False,
) -> bytes:
    import tensorflow as tf

    # Private, as no public module has it; it derives from `Exception` itself.
    from tensorflow.lite.python.convert_phase import ConverterError

    converter = tf.lite.TFLiteConverter.from_saved_model(folder)
    if scheme.is_optimized:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if scheme.weights:
        converter.target_spec.supported_types = [tf.dtypes.as_dtype(scheme.weights)]
    if scheme.converter_operators:
        operators = getattr(tf.lite.OpsSet, scheme.converter_operators)
        converter.target_spec.supported_ops = [operators]
        converter.representative_dataset = lambda: _iterate_rows(samples, inputs)
    if integer_io:
        dtype = tf.dtypes.as_dtype(scheme.activations)
        converter.inference_input_type = converter.inference_output_type = dtype
    with warnings.catch_warnings():
        # That input and output are float while the rest is not, as asked for.
        warnings.filterwarnings("ignore", "Statistics for quantized inputs")
        # Of the interpreter that the converter itself uses for several inputs.
        warnings.filterwarnings("ignore", r"\s*Warning: tf.lite.Interpreter is deprecated")
        try:
            content = bytes(converter.convert())
        except (ConverterError, RuntimeError, ValueError) as error:
            raise _explain(error, inputs) from error
    return simplify(content)


def _explain(error: Exception, inputs: Sequence[keras.InputSpec]) -> Exception:
    """An error of the converter's reason and what helps, in place of what may be pages of MLIR."""
    found = sorted(set(re.findall(r"(?:'tf\.|for op: ')(\w+)'", str(error))))
    names, shapes = ", ".join(found), [x.shape for x in inputs]
    if "TensorList" in names and shapes[0][0] is None:
        problem = f"must fix the batch size of recurrent layers, as LiteRT has no {names}"
        return _refuse_signature(problem, shapes, [(1, *shape[1:]) for shape in shapes])
    if "not yet supported for op" in str(error):
        return ConversionError(
            f"there is no integer form of {names}. 'int8_float_statistics' and 'dynamic' take "
            "more operators than 'int8' and 'int16x8'."
        )
    if "3D" in names and None in shapes[0][1:]:
        # Layers in 3D are then written in 2D.
        problem = f"must fix the sizes of layers in 3D, as LiteRT has no {names}"
        fixed = [(1, *(size or 32 for size in shape[1:])) for shape in shapes]
        return _refuse_signature(problem, shapes, fixed)
    if names:
        return ConversionError(
            f"LiteRT has no operator for {names}. Replace the layer that needs it."
        )
    return ConversionError(f"TensorFlow's converter says: {_shorten(error)}.")


def _refuse_signature(problem: str, shapes: list[Any], fixed: list[Any]) -> ArgumentError:
    received, remedy = (", ".join(map(str, x)) for x in (shapes, fixed))
    text = f"{problem}. Received: {received}. Pass shapes such as {remedy}."
    return ArgumentError("input_signature", text)


def _shorten(error: Exception) -> str:
    """The first words of a message, in one line, without colors and places in a graph."""
    text = re.sub(r"\x1b\[\d*m", "", str(error)).split("Arguments received by")[0]
    text = re.sub(r"(<unknown>:0: error: )?loc\(.*\): (error: )?", "", text)
    return textwrap.shorten(text, 300, placeholder=" ...").rstrip(". ")


def _iterate_rows(samples: Samples, inputs: Sequence[keras.InputSpec]) -> Iterator[Any]:
    """Single samples, as the converter's calibration takes them, or batches of a fixed size."""
    for batch in samples:
        step = samples.fixed_size or 1
        for row in range(0, len(batch[0]), step):
            arrays = [array[row : row + step] for array in batch]
            names = [spec.name for spec in inputs]
            yield dict(zip(names, arrays)) if len(names) > 1 else arrays


def _by_quantizer(
    content: bytes,
    scheme: Scheme,
    inputs: Sequence[keras.InputSpec],
    samples: Samples,
    integer_io: bool,
) -> bytes:
    qtyping, ai_edge = import_quantizer()
    runtime = LiteRT(content, [spec.name for spec in inputs], is_plain=True)
    ranges = measure_ranges(runtime, samples, scheme.headroom, scheme.bits)
    # 16 bits round so little that what is right on average makes single samples worse.
    if scheme.bits == 8:
        content = correct_biases(content, runtime, samples, ranges)
    quantizer = ai_edge.Quantizer(content)
    operator = qtyping.TFLOperationName
    ends = [operator.INPUT, operator.OUTPUT]
    chosen = [operator[name] for name in scheme.quantizer_operators]
    for name in chosen + (ends if integer_io else []):
        quantizer.add_static_config(".*", name, activation_num_bits=scheme.bits, weight_num_bits=8)
    if not integer_io:
        for name in ends:
            quantizer.update_quantization_recipe(".*", name, algorithm_key="no_quantize")
    # It shows a progress bar also when told not to.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        # Of an interpreter that the quantizer makes to look at the file.
        warnings.filterwarnings("ignore", ".*experimental_preserve_all_tensors")
        try:
            result = quantizer.quantize(
                ranges, enable_progress_bar=False, enable_progress_report=False
            )
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ConversionError(f"ai-edge-quantizer says: {_shorten(error)}.") from error
    return simplify(bytes(result.quantized_model))
