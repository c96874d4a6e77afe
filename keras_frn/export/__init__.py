"""What `model.export` cannot do by itself: quantized LiteRT files that keep the accuracy."""

import dataclasses
import os
import pathlib
import warnings

import keras

from .. import graph
from ..layers import FilterResponseNormalization
from ..samples import Samples
from .check import compared, doubts
from .inference_form import InferenceCopy
from .quantization import PRESETS, convert, import_quantizer
from .runtime import LiteRT, import_litert
from .signature import specs_of

# Fewer different samples than these do not show the range of each channel.
_FEW = 16


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What `export_tflite` wrote, and how close it is to the model. `print(report)` shows it.

    Attributes:
        path: Path of the file.
        quantization: Name of the preset.
        size: Size of the file in bytes.
        operators: Dict from the name of an operator to how many the file has.
        delegated: Number of operators that the interpreter hands to XNNPACK on this machine.
        partitions: Number of pieces in which it does so; 1 is best.
        samples: Number of calibration samples compared; without any, random inputs are.
        ranges: Dict from the name of an input to the least and largest value in the samples.
        max_error: Largest absolute difference from the model's outputs. None for a model that
            does not run on random inputs.
        agreement: Share of samples (or positions) with the same argmax along the last axis, for
            outputs of more than one number.
        equalized: Names of the normalization layers whose input channels were scaled.
        not_equalized: Dict from the names of the others to the reason.
        warnings: Sentences about what may cost accuracy.
    """

    path: str
    quantization: str | None
    size: int
    operators: dict
    delegated: int
    partitions: int
    samples: int
    ranges: dict
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
        seen = "random inputs, as no `calibration_data` was given"
        if self.samples:
            ranges = (
                f"{name} {low:.4g} to {high:.4g}" for name, (low, high) in self.ranges.items()
            )
            seen = f"{self.samples} samples, {', '.join(ranges)}"
        if self.max_error is None:
            seen = "nothing: the model does not run on random inputs. Pass `calibration_data`"
        else:
            seen += f": max error {self.max_error:.3g}"
        if self.agreement is not None:
            seen += f", same argmax {self.agreement:.2%}"
        lines.append(f"verified on    {seen}")
        if PRESETS[self.quantization].is_calibrated:
            total = len(self.equalized) + len(self.not_equalized)
            lines.append(f"equalized      {len(self.equalized)} of {total} normalizations")
            lines += [f"  not {name}: {reason}" for name, reason in self.not_equalized.items()]
        return "\n".join([*lines, *(f"warning        {text}" for text in self.warnings)])


def export_tflite(
    model,
    path,
    quantization=None,
    calibration_data=None,
    integer_io=False,
    verbose=False,
    input_signature=None,
):
    """Writes a model as a LiteRT (TensorFlow Lite) file, and compares the two.

    ```
    FRN(k * x, k**2 * epsilon) = FRN(x, epsilon)       for k > 0, per channel
    ```

    The mean square of Filter Response Normalization has the square of its input's range, which an
    8-bit integer cannot hold as soon as channels or samples differ in scale. So the integer
    presets first scale each input channel to unit root mean square on the calibration data, through
    the filters of the layer before it, which changes nothing in float; and `"int8"` and `"int16x8"`
    normalize twice, coarsely and then exactly, where samples differ more than integers resolve. In
    both 8-bit presets the rarest 2 of 10,000 values before a normalization saturate. The model
    given stays as it is.

    Args:
        model: A built Keras model. A functional, Sequential or nested one is exported through a
            float32 copy, mixed precision included. A subclassed one must be in float32 and is
            exported as it is, without equalization.
        path: Path of the file to write, a `str` or `os.PathLike` that ends with `.tflite`.
        quantization: How the file stores weights and computes, one of
            None: float32.
            `"float16"`: weights stored in half precision.
            `"dynamic"`: 8-bit weights; convolutions scale their inputs for each sample.
            `"int8"`: every tensor and operator in integers, for NPUs and microcontrollers.
            `"int8_float_statistics"`: convolutions and dense layers in 8-bit integers, the rest in
            float: the robust one.
            `"int16x8"`: 16-bit activations and 8-bit weights.
            Defaults to None.
        calibration_data: Inputs like those at inference, without labels; 100 to 500 samples are
            enough, and at most 2048 are used. An array, a list or dict of arrays for several
            inputs, a tuple `(inputs, targets)`, a `tf.data.Dataset`, a `keras.utils.PyDataset`, an
            iterable of batches, each the inputs or `(inputs, targets)`, or a function that returns
            one. The integer presets need it. With any preset the report compares the file with the
            model on it. Defaults to None, where random inputs are compared.
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
        ImportError: if LiteRT, or for the 8-bit presets ai-edge-quantizer, is not installed.

    Example:

    >>> report = keras_frn.export_tflite(model, "model.tflite", "int8", images[:50])
    >>> report.samples
    50
    """
    path = _checked_path(path)
    preset = _checked_preset(quantization, integer_io)
    import_litert()
    if preset.quantizer_operators:
        import_quantizer()
    if preset.is_calibrated and calibration_data is None:
        raise ValueError(
            f"`calibration_data` must be given with quantization={quantization!r}. Received: "
            "calibration_data=None. Pass inputs like those at inference, in their whole range of "
            "contrast: an array of 100 to 500 samples, a `tf.data.Dataset` or an iterable of "
            "batches."
        )
    show = print if verbose else lambda step: None
    show("copying the model in float32")
    copy = _copied(model)
    specs = specs_of(model, input_signature)
    inputs = keras.tree.flatten(specs)
    samples = Samples(model, calibration_data, inputs, _FEW if preset.is_calibrated else 1)
    notes, equalized, not_equalized = [], (), {}
    if preset.is_calibrated and any(None in spec.shape[1:] for spec in inputs):
        specs = _with_sizes(specs, samples, quantization)
        inputs = keras.tree.flatten(specs)
        sizes = ", ".join(str(spec.shape[1:]) for spec in inputs)
        notes.append(f"takes the size of the calibration data only, {sizes}.")
    if preset.is_calibrated and copy is None:
        norms = [x for x in graph.layers(model) if isinstance(x, FilterResponseNormalization)]
        not_equalized = {norm.name: "it is part of a subclassed model" for norm in norms}
    elif preset.is_calibrated:
        show(f"equalizing {len(copy.normalizations)} normalizations")
        copy.equalize(samples)
        if preset.floor:
            copy.use_integer_form(preset.floor)
        equalized, not_equalized = tuple(copy.equalized), copy.not_equalized
    if preset.is_integer and not_equalized:
        notes.append(
            f"not equalized: {', '.join(not_equalized)}. If channels differ in scale there, "
            f"{quantization!r} loses accuracy and 'int8_float_statistics' does not."
        )

    show(f"converting to {quantization or 'float32'}")
    exported = model if copy is None else copy.model
    try:
        content, more_notes = convert(exported, preset, specs, samples, integer_io)
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(". ")
        advice = (
            "'int8_float_statistics' and 'dynamic' take more operators than 'int8' and 'int16x8'."
        )
        if inputs[0].shape[0] is None:
            fixed = f"[keras.InputSpec(shape={(1, *inputs[0].shape[1:])})]"
            advice += f" Recurrent layers need a fixed batch, such as input_signature={fixed}."
        raise ValueError(
            "`model` must consist of operators that LiteRT has with quantization="
            f"{quantization!r}. Received: {model.name}, of which the converter says: {reason}. "
            f"{advice}"
        ) from error
    show("verifying in LiteRT")
    try:
        runtime = LiteRT(content, [spec.name for spec in inputs])
        found = compared(model, runtime, specs, samples)
        if found["max_error"] is None:
            runtime.allocate()
    except RuntimeError as error:
        raise ValueError(
            f"`model` must become a file that LiteRT runs. Received: {model.name}, which with "
            f"quantization={quantization!r} gives: {error}. Try another preset."
        ) from error
    about_outputs = doubts(model, specs, samples, quantization, found.pop("share"))
    for text in about_outputs:
        warnings.warn(text, stacklevel=2)
    report = ExportReport(
        path=path,
        quantization=quantization,
        size=len(content),
        operators=runtime.count_operators(),
        delegated=runtime.count_delegated(),
        partitions=runtime.count_partitions(),
        samples=samples.count,
        ranges={spec.name or "input": ends for spec, ends in zip(inputs, samples.ranges)},
        **found,
        equalized=equalized,
        not_equalized=not_equalized,
        warnings=(*notes, *more_notes, *samples.warnings, *about_outputs),
    )
    _write(path, content)
    return report


def _checked_path(path):
    path = os.fspath(path)
    if not path.endswith(".tflite"):
        raise ValueError(f"`path` must end with .tflite. Received: path={path!r}. Add the ending.")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise ValueError(
            f"`path` must be in a folder that exists. Received: path={path!r}. Create the folder."
        )
    return path


def _checked_preset(quantization, integer_io):
    if quantization not in PRESETS:
        raise ValueError(
            f"`quantization` must be one of {tuple(PRESETS)}. Received: "
            f"quantization={quantization!r}. Use 'int8' for integer hardware and 'dynamic' or "
            "'int8_float_statistics' for CPUs."
        )
    preset = PRESETS[quantization]
    if integer_io and not preset.is_calibrated:
        calibrated = tuple(name for name, preset in PRESETS.items() if preset.is_calibrated)
        raise ValueError(
            f"`integer_io` must be False unless `quantization` is one of {calibrated}. Received: "
            f"integer_io={integer_io}, quantization={quantization!r}. Leave it out."
        )
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            "`export_tflite` must run on the TensorFlow backend. Received: "
            f"backend={keras.backend.backend()!r}. Save the model as .keras, and export it in a "
            "process with KERAS_BACKEND=tensorflow."
        )
    return preset


def _copied(model):
    """The `InferenceCopy`, or None for a model that has to be exported as it is."""
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(
            f"`model` must be a built Keras model. Received: model={model!r}. Call it on data."
        )
    if graph.is_graph(model):
        try:
            copy = InferenceCopy(model)
        except (TypeError, NotImplementedError) as error:
            raise ValueError(
                "`model` must consist of layers that `get_config` describes. Received: "
                f"{model.name}, of which a copy fails with: {error}"
            ) from error
        copy.pool_first()
        return copy
    dtypes = {weight.dtype for weight in model.weights}
    dtypes |= {layer.compute_dtype for layer in (model, *graph.layers(model))}
    if not dtypes <= {"float32"}:
        raise ValueError(
            "`model` must be functional or Sequential to be exported from mixed precision. "
            f"Received: a subclassed model with dtypes {sorted(dtypes)}. Load it in float32."
        )
    return None


def _with_sizes(specs, samples, quantization):
    """The specs with the sizes of the samples where they are unknown.

    A static runtime would read an integer file of unknown sizes as one position, without an error.
    """
    inputs = keras.tree.flatten(specs)
    seen = [set() for _ in inputs]
    for batch in samples:
        for sizes, array in zip(seen, batch):
            sizes.add(array.shape[1:])
    if any(len(sizes) > 1 for sizes in seen):
        raise ValueError(
            "`calibration_data` must have samples of one size with "
            f"quantization={quantization!r}. Received: {[sorted(sizes) for sizes in seen]}. "
            "Integer files have one size: resize the samples, or use 'dynamic', which takes any."
        )
    chosen = [
        keras.InputSpec(shape=(x.shape[0], *sizes.pop()), dtype=x.dtype, name=x.name)
        for x, sizes in zip(inputs, seen)
    ]
    return keras.tree.pack_sequence_as(specs, chosen)


def _write(path, content):
    partial = pathlib.Path(f"{path}.{os.getpid()}.tmp")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
