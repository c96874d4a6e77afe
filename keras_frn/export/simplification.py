"""Says what a LiteRT file computes in operators that quantizers and NPUs have.

TensorFlow's converter has several names for a reshape, and as soon as the batch size is unknown it
computes at run time what is known of the other sizes. ai-edge-quantizer has no integers for these
operators, and NPUs leave them to the CPU.
"""

import collections
from collections.abc import Iterable, Mapping
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
            output = graph.tensors[operator.outputs[0]]
            sizes = output.shape if output.shapeSignature is None else output.shapeSignature
            is_known = _count(sizes) and list(sizes).count(-1) < 2
            is_computed = name == "RESHAPE" and producers.keys() & set(others)
            if is_known and (is_computed or name in ("EXPAND_DIMS", "SQUEEZE")):
                buffer = flatbuffer.add_buffer(model, np.array(sizes, "int32"))
                kind, label = schema.TensorType.INT32, output.name + b"_sizes"
                graph.tensors.append(schema.TensorT([len(sizes)], kind, buffer, label))
                operator.inputs = [first, len(graph.tensors) - 1]
                operator.opcodeIndex = codes.index("RESHAPE")
                operator.builtinOptions = schema.ReshapeOptionsT()
                operator.builtinOptionsType = schema.BuiltinOptions.ReshapeOptions
                unread += others
            elif name == "SHAPE" and first in producers:
                producer = producers[first]
                if codes[producer.opcodeIndex] == "DEQUANTIZE":
                    operator.inputs = producer.inputs
                    unread.append(first)
        dropped = _find_useless(graph, producers, unread)
        graph.operators = [x for x in graph.operators if id(x) not in dropped]
    return flatbuffer.write(model)


def _count(numbers: Any) -> int:
    """The length of a vector of a file, which is None if it is empty."""
    return 0 if numbers is None else len(numbers)


def _find_useless(graph: Any, producers: Mapping[int, Any], tensors: Iterable[int]) -> set[int]:
    """The operators whose outputs nothing reads, upstream of some tensors, by `id`."""
    inputs = [x.inputs for x in graph.operators if _count(x.inputs)]
    readers = collections.Counter(i for read in (*inputs, graph.outputs) for i in read)
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
