"""A LiteRT file as an object that can be changed. The schema comes with LiteRT."""

from typing import Any

import numpy as np

from ..typing import Array

__all__ = ["add_buffer", "read", "write"]


def read(content: bytes) -> Any:
    """Reads a file, with all weights inside of the FlatBuffer.

    ai-edge-quantizer appends those of files above 256 kB, where TensorFlow Lite Micro does not
    look: it gives their place in memory to them, and computes with what is there.
    """
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(content, 0)
    for buffer in model.buffers:
        if buffer.offset:
            buffer.data = np.frombuffer(content, "uint8", buffer.size, buffer.offset)
            buffer.offset = buffer.size = 0
    return model


def write(model: Any) -> bytes:
    """Returns the content of a file."""
    import flatbuffers

    builder = flatbuffers.Builder(2**20)  # it grows
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def add_buffer(model: Any, values: Array) -> int:
    """Adds constant values; returns the number by which a tensor refers to them."""
    buffer = type(model.buffers[0])()
    buffer.data = np.frombuffer(values.tobytes(), "uint8")
    model.buffers.append(buffer)
    return len(model.buffers) - 1
