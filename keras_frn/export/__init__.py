"""What `model.export` cannot do by itself: quantized LiteRT files that keep the accuracy."""

import os
import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras

from .. import graph
from ..errors import ArgumentError, format_count
from ..layers import FilterResponseNormalization
from ..samples import Samples
from ..typing import CalibrationData, PathLike
from .check import check_outputs, compare, find_bound
from .converters import ConversionError, convert, import_quantizer
from .inference_form import InferenceCopy
from .presets import PRESETS, Preset, Scheme
from .report import ExportReport, list_counts
from .runtime import LiteRT, LiteRTError, import_litert
from .signature import specs_of

__all__ = ["ExportReport", "Preset", "export_tflite"]

# Fewer different samples than these do not show the range of each channel. With 24 and 32 of them,
# 4 of 140 int8 files of random models were beyond their limit on other samples and did not warn;
# with 64, none of 194.
_FEW = 64
# Weights of fewer numbers stay in float in TensorFlow's converter.
_MANY = 1024


def export_tflite(
    model: keras.Model,
    path: PathLike,
    *,
    quantization: Preset | None = None,
    calibration_data: CalibrationData | None = None,
    integer_io: bool = False,
    verbose: bool = False,
    input_signature: Sequence[Any] | None = None,
) -> ExportReport:
    """Writes a model as a LiteRT (TensorFlow Lite) file, and compares the two.

    ```
    FRN(k * x, k**2 * epsilon) = FRN(x, epsilon)       for k > 0, per channel
    ```

    The mean square of Filter Response Normalization has the square of its input's range, which an
    8-bit integer cannot hold as soon as channels or samples differ in scale. So with calibration
    data each input channel is first scaled to unit root mean square, through the filters of the
    layer before it, which changes nothing in float; and `"int8"` and `"int16x8"` normalize twice,
    coarsely and then exactly, where samples differ more than integers resolve. In both 8-bit
    presets the rarest 2 of 10,000 values on either side saturate before a normalization; in
    `"int16x8"` ranges are four times as wide as on the calibration data. The model given stays as
    it is.

    Args:
        model: A built Keras model. A functional, Sequential or nested one is exported through a
            float32 copy, mixed precision included. A subclassed one must be in float32 and is
            exported as it is, without equalization.
        path: Path of the file to write, a `str` or `os.PathLike` that ends with `.tflite`.
        quantization: How the file stores weights and computes. Defaults to None, float32.

            - `"float16"`: weights stored in half precision.
            - `"dynamic"`: 8-bit weights; convolutions scale their inputs for each sample.
            - `"int8"`: tensors and operators in integers, for NPUs and microcontrollers. The report
              and a warning name the operators that have no integer form.
            - `"int8_float_statistics"`: convolutions and dense layers in 8-bit integers, the rest
              in float.
            - `"int16x8"`: 16-bit activations and 8-bit weights, for NPUs.
        calibration_data: Inputs like those at inference, without labels; 100 to 500 samples are
            enough, and at most 2048 are used. An array, a list or dict of arrays for several
            inputs, a tuple `(inputs, targets)`, a `tf.data.Dataset`, a `keras.utils.PyDataset`, an
            iterable of batches, each the inputs or `(inputs, targets)`, or a function that returns
            one. The integer presets need it. With any preset the report compares the file with the
            model on it. Defaults to None: random inputs are compared.
        integer_io: Whether inputs and outputs are integers too (int8, or int16 with `"int16x8"`).
            Defaults to False.
        verbose: Whether to print each step. Defaults to False.
        input_signature: A list of a `keras.InputSpec` or `tf.TensorSpec` for each input, with the
            batch, as `model.export` takes it. LiteRT.js and recurrent layers need a fixed batch.
            Defaults to None: the model's sizes, and for integer presets those of the calibration
            data where the model's are unknown.

    Returns:
        An `ExportReport`.

    Raises:
        ValueError: if an argument is not one of those above, if the data do not fit the model, if
            the model has an operator that LiteRT does not have with this preset, if a float32 file
            computes something else than a float32 model, or if the backend is not TensorFlow. A
            file that was there before stays as it was.
        OSError: if the file or the temporary folder cannot be written.
        ImportError: if LiteRT, or for the integer presets ai-edge-quantizer, is not installed.

    Example:

    ```python
    report = keras_frn.export_tflite(
        model, "model.tflite", quantization="int8", calibration_data=images[:300]
    )
    print(report)
    ```
    """
    path = _check_path(path)
    scheme = _check_preset(quantization, integer_io)
    import_litert()
    if scheme.is_calibrated:
        import_quantizer()
    if scheme.is_calibrated and calibration_data is None:
        raise ArgumentError(
            "calibration_data",
            f"must be given with the preset {quantization!r}. Received: None. "
            "Pass 100 to 500 samples like those at inference, in their whole range of contrast.",
        )

    def show(step: str) -> None:
        if verbose:
            print(step)

    show("copying the model in float32")
    copy = _copy(model)
    specs = specs_of(model, input_signature)
    inputs = keras.tree.flatten(specs)
    samples = Samples(model, calibration_data, inputs, _FEW if scheme.is_calibrated else 1)
    notes: list[str] = []
    equalized: list[str] = []
    not_equalized: dict[str, str] = {}
    if scheme.is_calibrated and any(None in spec.shape[1:] for spec in inputs):
        specs = _take_sizes(specs, samples, quantization)
        inputs = keras.tree.flatten(specs)
        sizes = ", ".join(str(spec.shape[1:]) for spec in inputs)
        notes.append(f"takes the size of the calibration data only, {sizes}.")
    if calibration_data is not None and copy is None:
        norms = [x for x in graph.list_layers(model) if isinstance(x, FilterResponseNormalization)]
        not_equalized = {norm.name: "it is part of a subclassed model" for norm in norms}
    elif calibration_data is not None and copy is not None:
        show(f"equalizing {format_count(len(copy.normalizations), 'normalization')}")
        copy.equalize(samples, scheme.least_epsilon, to_peaks=scheme.is_calibrated)
        if scheme.floor:
            copy.use_integer_form(scheme.floor, scheme.bits)
        equalized, not_equalized = copy.equalized, copy.not_equalized
    if scheme.is_integer and not_equalized:
        notes.append(
            f"not equalized: {', '.join(not_equalized)}. If channels differ in scale there, "
            f"{quantization!r} loses accuracy, and 'dynamic' less."
        )

    show(f"converting to {quantization or 'float32'}")
    names = [spec.name for spec in inputs]
    try:
        content, more_notes = convert(
            model if copy is None else copy.model, scheme, specs, samples, integer_io
        )
        plain = LiteRT(content, is_plain=True)
        show("comparing in LiteRT")
        runtime = LiteRT(content, names)
        found = compare(model, runtime, specs, samples)
        if found.max_error is None:
            runtime.allocate()
    except ConversionError as error:
        modes = [getattr(x, "quantization_mode", None) for x in graph.list_layers(model)]
        remedy = ". Export the model as it was before `model.quantize`" if any(modes) else ""
        raise ValueError(
            "`model` must have operators that LiteRT has with "
            f"quantization={quantization!r}. Received: {model.name}, but {error}{remedy}"
        ) from error
    except LiteRTError as error:
        raise ValueError(
            f"`model` must become a file that LiteRT runs. Received: {model.name}, which with "
            f"quantization={quantization!r} gives: {error}. Try another preset."
        ) from error
    in_float = {}
    if quantization is not None:
        in_float = plain.count_float_operators(None if scheme.is_integer else _MANY)
    if integer_io and scheme.is_integer and in_float:
        raise ArgumentError(
            "integer_io",
            f"must be False if operators stay in float. Received: True, while the preset "
            f"{quantization!r} leaves {list_counts(in_float)} in float. Replace their "
            "layers, or leave it out.",
        )

    def write_part(part: keras.Model) -> Callable[..., Any]:
        return LiteRT(convert(part, PRESETS[None], specs, samples)[0], names)

    doubts = check_outputs(model, specs, samples, quantization, found.fraction, write_part)
    is_quantized = quantization is None or plain.is_quantized()
    doubts += _describe_floats(in_float, scheme, is_quantized)
    for text in doubts:
        warnings.warn(text, stacklevel=2)
    delegated, partitions = runtime.count_delegates()
    report = ExportReport(
        path=path,
        quantization=quantization,
        size=len(content),
        operators=runtime.count_operators(),
        in_float=in_float,
        is_quantized=is_quantized,
        delegated=delegated,
        partitions=partitions,
        samples=samples.count,
        ranges={spec.name or "input": ends for spec, ends in zip(inputs, samples.ranges)},
        max_error=found.max_error,
        max_error_fraction=found.fraction,
        bound=find_bound(model, quantization),
        agreement=found.agreement,
        equalized=tuple(equalized),
        not_equalized=not_equalized,
        warnings=(*notes, *more_notes, *samples.warnings, *doubts),
    )
    _write(path, content)
    return report


def _check_path(path: PathLike) -> str:
    path = os.fspath(path)
    if not path.endswith(".tflite"):
        raise ArgumentError(
            "path", f"must end with .tflite. Received: path={path!r}. Add the ending."
        )
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise ArgumentError(
            "path", f"must be in a folder that exists. Received: path={path!r}. Create the folder."
        )
    return path


def _check_preset(quantization: Preset | None, integer_io: bool) -> Scheme:
    if quantization not in PRESETS:
        raise ArgumentError(
            "quantization",
            f"must be one of {tuple(PRESETS)}. Received: quantization={quantization!r}. Use 'int8' "
            "for integer hardware and 'dynamic' or 'int8_float_statistics' for CPUs.",
        )
    scheme = PRESETS[quantization]
    if integer_io and not scheme.is_calibrated:
        calibrated = tuple(name for name, scheme in PRESETS.items() if scheme.is_calibrated)
        raise ArgumentError(
            "integer_io",
            f"must be False unless the preset is one of {calibrated}. Received: {integer_io} with "
            f"the preset {quantization!r}. Leave it out.",
        )
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            "`export_tflite` must run on the TensorFlow backend. Received: "
            f"backend={keras.backend.backend()!r}. Save the model as .keras, and export it in a "
            "process with KERAS_BACKEND=tensorflow."
        )
    return scheme


def _copy(model: keras.Model) -> InferenceCopy | None:
    """The `InferenceCopy`, or None for a model that has to be exported as it is."""
    graph.check_built(model)
    if graph.is_graph(model):
        copy = InferenceCopy(model)
        copy.pool_first()
        return copy
    dtypes = {weight.dtype for weight in model.weights}
    dtypes |= {layer.compute_dtype for layer in (model, *graph.list_layers(model))}
    if not dtypes <= {"float32"}:
        raise ArgumentError(
            "model",
            "must be functional or Sequential to be exported from mixed precision. Received: a "
            f"subclassed model with dtypes {sorted(dtypes)}. Load it in float32.",
        )
    return None


def _take_sizes(specs: Any, samples: Samples, quantization: Preset | None) -> Any:
    """The specs with the sizes of the samples where they are unknown.

    A static runtime would read an integer file of unknown sizes as one position, without an error.
    """
    inputs = keras.tree.flatten(specs)
    seen: list[set[tuple[int, ...]]] = [set() for _ in inputs]
    for batch in samples:
        for sizes, array in zip(seen, batch):
            sizes.add(array.shape[1:])
    if any(len(sizes) > 1 for sizes in seen):
        raise ArgumentError(
            "calibration_data",
            f"must have samples of one size with the preset {quantization!r}. Received: "
            f"{[sorted(sizes) for sizes in seen]}. Integer files have one size: resize the "
            "samples, or use 'dynamic', which takes any.",
        )
    chosen = [
        keras.InputSpec(shape=(x.shape[0], *sizes.pop()), dtype=x.dtype, name=x.name)
        for x, sizes in zip(inputs, seen)
    ]
    return keras.tree.pack_sequence_as(specs, chosen)


def _describe_floats(in_float: dict[str, int], scheme: Scheme, is_quantized: bool) -> list[str]:
    """Sentences about what the preset should have quantized."""
    if not is_quantized:
        return [
            "nothing is quantized: the file computes as a float32 file does and is as large. The "
            f"preset quantizes no weights of fewer than {_MANY:,} numbers, and none of "
            f"{list_counts(in_float) or 'the other operators'}."
        ]
    if in_float and scheme.is_integer:
        return [
            f"operators stay in float, as they have no integer form: {list_counts(in_float)}. "
            "Integer-only hardware does not run them."
        ]
    return [f"weights stay in float: those of {list_counts(in_float)}."] if in_float else []


def _write(path: str, content: bytes) -> None:
    partial = pathlib.Path(f"{path}.{os.getpid()}.tmp")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
