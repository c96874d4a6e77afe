"""Says what a LiteRT file computes in operators that quantizers and NPUs have.

TensorFlow's converter has several names for a reshape, and as soon as the batch size is unknown it
computes at run time what is known of the other sizes. ai-edge-quantizer has no integers for these
operators, and NPUs leave them to the CPU.
"""

import collections
from typing import Any

import numpy as np

from . import flatbuffer

__all__ = ["simplify"]


def simplify(content: bytes) -> bytes:
    """Returns a file that computes the same.

    EXPAND_DIMS and SQUEEZE become RESHAPE. A RESHAPE of which all sizes but one are known gets them
    as a constant. SHAPE reads integers where they are at hand. What nothing reads then goes.
    """
    from ai_edge_litert import schema_py_generated as schema

    model = flatbuffer.read(content)
    names = {number: name for name, number in vars(schema.BuiltinOperator).items()}
    codes = [names[max(x.builtinCode, x.deprecatedBuiltinCode)] for x in model.operatorCodes]
    if "RESHAPE" not in codes:
        codes.append("RESHAPE")
        number = schema.BuiltinOperator.RESHAPE
        model.operatorCodes.append(
            schema.OperatorCodeT(builtinCode=number, deprecatedBuiltinCode=number)
        )
    for graph in model.subgraphs:
        producers = {
            output: operator for operator in graph.operators for output in operator.outputs
        }
        unread: list[int] = []
        for operator in graph.operators:
            name, output = codes[operator.opcodeIndex], graph.tensors[operator.outputs[0]]
            first, *others = operator.inputs
            sizes = output.shape if output.shapeSignature is None else output.shapeSignature
            # A scalar has None.
            is_known = sizes is not None and len(sizes) > 0 and list(sizes).count(-1) < 2
            if name == "RESHAPE":
                is_known = is_known and producers.keys() & set(others)
            if name in ("EXPAND_DIMS", "SQUEEZE", "RESHAPE") and is_known:
                buffer = flatbuffer.add_buffer(model, np.array(sizes, "int32"))
                graph.tensors.append(
                    schema.TensorT(
                        [len(sizes)], schema.TensorType.INT32, buffer, output.name + b"_sizes"
                    )
                )
                operator.inputs = [first, len(graph.tensors) - 1]
                operator.opcodeIndex = codes.index("RESHAPE")
                operator.builtinOptions = schema.ReshapeOptionsT()
                operator.builtinOptionsType = schema.BuiltinOptions.ReshapeOptions
                unread += others
            producer = producers.get(first)
            if name == "SHAPE" and producer and codes[producer.opcodeIndex] == "DEQUANTIZE":
                operator.inputs = producer.inputs
                unread.append(first)
        _drop(graph, unread)
    return flatbuffer.write(model)


def _drop(graph: Any, tensors: list[int]) -> None:
    """Takes out the operators whose outputs nothing reads, upstream of some tensors."""
    producers = {output: operator for operator in graph.operators for output in operator.outputs}
    readers = collections.Counter(i for operator in graph.operators for i in operator.inputs)
    readers.update(graph.outputs)
    dropped = set()
    while tensors:
        operator = producers.get(tensors.pop())
        if (
            operator
            and id(operator) not in dropped
            and not any(readers[i] for i in operator.outputs)
        ):
            dropped.add(id(operator))
            readers.subtract(operator.inputs)
            tensors.extend(operator.inputs)
    graph.operators = [operator for operator in graph.operators if id(operator) not in dropped]
