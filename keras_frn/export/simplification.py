"""Says what a LiteRT file computes in operators that quantizers and NPUs have.

TensorFlow's converter has several names for a reshape, and as soon as the batch size is unknown it
computes at run time what is known of the other sizes. ai-edge-quantizer has no integers for these
operators, and NPUs leave them to the CPU.
"""

import collections
from collections.abc import Iterable, Sequence
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
        # Operators on variables may lack inputs or outputs.
        operators = [x for x in graph.operators if _count(x.inputs) and _count(x.outputs)]
        producers = {output: operator for operator in operators for output in operator.outputs}
        unread: list[int] = []
        for operator in operators:
            name, (first, *others) = codes[operator.opcodeIndex], operator.inputs
            is_reshape = name in ("EXPAND_DIMS", "SQUEEZE")
            is_reshape |= name == "RESHAPE" and bool(producers.keys() & set(others))
            output = graph.tensors[operator.outputs[0]]
            sizes = output.shape if output.shapeSignature is None else output.shapeSignature
            if is_reshape and _count(sizes) and list(sizes).count(-1) < 2:
                buffer = flatbuffer.add_buffer(model, np.array(sizes, "int32"))
                name = output.name + b"_sizes"
                graph.tensors.append(
                    schema.TensorT([len(sizes)], schema.TensorType.INT32, buffer, name)
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
        dropped = _find_useless(graph, operators, unread)
        graph.operators = [x for x in graph.operators if id(x) not in dropped]
    return flatbuffer.write(model)


def _count(numbers: Any) -> int:
    """The length of a vector of a file, which is None if it is empty."""
    return 0 if numbers is None else len(numbers)


def _find_useless(graph: Any, operators: Sequence[Any], tensors: Iterable[int]) -> set[int]:
    """The operators whose outputs nothing reads, upstream of some tensors, by `id`."""
    producers = {output: operator for operator in operators for output in operator.outputs}
    readers = collections.Counter(i for operator in operators for i in operator.inputs)
    readers.update(graph.outputs)
    found: set[int] = set()
    pending = list(tensors)
    while pending:
        operator = producers.get(pending.pop())
        if operator is None or id(operator) in found or any(readers[i] for i in operator.outputs):
            continue
        found.add(id(operator))
        readers.subtract(operator.inputs)
        pending.extend(operator.inputs)
    return found
