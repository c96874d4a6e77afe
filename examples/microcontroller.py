"""Title: A digit classifier for a microcontroller
Description: Train, quantize to 8-bit integers, and run the file in TensorFlow Lite Micro.
Accelerator: none, a minute on two CPU cores

## Introduction

A microcontroller has kilobytes of memory and often no floating-point unit, so every tensor is an
8-bit integer. FRN's mean square has the squared range of its input, too wide for 8 bits.
`keras_frn.export_tflite` scales the channels first, which changes nothing in float.

We train a digit classifier, write the file, and run it twice: in LiteRT, as a phone does, and in
the interpreter of TensorFlow Lite Micro (`tflite-micro`), whose C++ code also runs on the device.
Finally the file becomes a C array to compile into a program.

## Setup

    pip install ".[examples]"
    python examples/microcontroller.py

## What to expect

A file of about 19 kB that needs 6.6 kB of memory beside it. TensorFlow Lite Micro gets about 98%
of the 360 test digits right, and its outputs are within one step of 256 of LiteRT's.
"""

import argparse
from pathlib import Path

import keras
import numpy as np
from ai_edge_litert.interpreter import Interpreter
from keras import layers
from sklearn.datasets import load_digits
from tflite_micro import runtime

import keras_frn

"""
## The network

1,797 digits of 8x8 pixels, every fifth one for the test. Two convolutions, each with FRN and TLU.
"""


def data():
    """Training images and labels, then those for the test."""
    digits = load_digits()
    images, test = digits.images[..., None].astype("float32") / 16, np.arange(1797) % 5 == 0
    return images[~test], digits.target[~test], images[test], digits.target[test]


def build():
    """A network of 10,026 weights."""
    model = keras.Sequential([keras.Input((8, 8, 1))])
    for filters, strides in ((16, 1), (32, 2)):
        model.add(layers.Conv2D(filters, 3, strides, padding="same", use_bias=False))
        model.add(keras_frn.FilterResponseNormalizationTLU())
    model.add(layers.Flatten())
    model.add(layers.Dense(10))
    return model


def train(model, images, labels, epochs):
    """Adam with a cosine schedule."""
    steps = epochs * -(-len(images) // 32)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(5e-3, steps)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(images, labels, batch_size=32, epochs=epochs, verbose=2)


"""
## The two interpreters

With `integer_io=True` input and output are integers too. An integer stands for
`(integer - zero_point) * scale`.
"""


def in_litert(path, images):
    """The file's integer outputs for each image, in LiteRT."""
    interpreter = Interpreter(str(path))
    interpreter.allocate_tensors()
    inputs, outputs = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    scale, zero_point = inputs["quantization"]
    integers = np.clip(np.round(images / scale) + zero_point, -128, 127).astype("int8")
    results = []
    for image in integers:
        interpreter.set_tensor(inputs["index"], image[None])
        interpreter.invoke()
        results.append(interpreter.get_tensor(outputs["index"])[0])
    return integers, np.stack(results)


def in_tflite_micro(path, integers):
    """The file's integer outputs for each integer image, in TensorFlow Lite Micro."""
    interpreter = runtime.Interpreter.from_file(str(path))
    results = []
    for image in integers:
        interpreter.set_input(image[None], 0)
        interpreter.invoke()
        results.append(interpreter.get_output(0)[0])
    interpreter.print_allocations()  # the memory that the device needs besides the file
    return np.stack(results)


"""
## A C array

The header that a program for the device includes.
"""


def write_header(path, header):
    """Writes a file's bytes as a C array."""
    numbers = ", ".join(map(str, path.read_bytes()))
    header.write_text(f"alignas(16) const unsigned char digits[] = {{{numbers}}};\n")


def main(epochs=15, images=None, output="digits_int8.tflite"):
    """Returns the accuracy of the file, and the largest difference of the interpreters in steps."""
    keras.utils.set_random_seed(0)
    path = Path(output)
    x, y, x_test, y_test = data()
    model = build()
    train(model, x[:images], y[:images], epochs)
    report = keras_frn.export_tflite(
        model, path, quantization="int8", calibration_data=x[:300], integer_io=True
    )
    print(report)

    integers, expected = in_litert(path, x_test[:images])
    results = in_tflite_micro(path, integers)
    accuracy = float(np.mean(results.argmax(-1) == y_test[:images]))
    steps = int(np.max(np.abs(results.astype(int) - expected)))
    write_header(path, path.with_suffix(".h"))
    print(f"TensorFlow Lite Micro: {accuracy:.1%} of {len(results)} digits")
    print(f"at most {steps} steps of 256 from LiteRT")
    print(f"wrote {path}, {path.stat().st_size:,} bytes, and {path.with_suffix('.h')}")
    return accuracy, steps


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A digit classifier for a microcontroller.")
    parser.add_argument("--epochs", type=int, default=15)
    main(**vars(parser.parse_args()))
