"""A SavedModel served by TensorFlow's C API, which programs in C, Go or Rust are built on."""

import contextlib
import ctypes
import os
from ctypes import POINTER, c_char_p, c_int, c_int64, c_size_t, c_void_p

import numpy as np
import tensorflow as tf

TF_FLOAT = 1


class Buffer(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("length", c_size_t), ("deallocator", c_void_p))


class Output(ctypes.Structure):
    _fields_ = (("operation", c_void_p), ("index", c_int))


# What each returns and takes, from the headers in tensorflow/c: undeclared, ctypes would cut
# pointers to 32 bits.
TENSORS, OUTPUTS = POINTER(c_void_p), POINTER(Output)
FUNCTIONS = {
    "TF_NewStatus": [c_void_p],
    "TF_GetCode": [c_int, c_void_p],
    "TF_Message": [c_char_p, c_void_p],
    "TF_DeleteStatus": [None, c_void_p],
    "TF_NewBuffer": [POINTER(Buffer)],
    "TF_DeleteBuffer": [None, POINTER(Buffer)],
    "TF_NewGraph": [c_void_p],
    "TF_GraphOperationByName": [c_void_p, c_void_p, c_char_p],
    "TF_DeleteGraph": [None, c_void_p],
    "TF_NewSessionOptions": [c_void_p],
    "TF_DeleteSessionOptions": [None, c_void_p],
    "TF_LoadSessionFromSavedModel": [
        *(c_void_p, c_void_p, c_void_p, c_char_p, POINTER(c_char_p), c_int),
        *(c_void_p, POINTER(Buffer), c_void_p),
    ],
    "TF_SessionRun": [
        *(None, c_void_p, c_void_p, OUTPUTS, TENSORS, c_int, OUTPUTS, TENSORS, c_int),
        *(c_void_p, c_int, c_void_p, c_void_p),
    ],
    "TF_CloseSession": [None, c_void_p, c_void_p],
    "TF_DeleteSession": [None, c_void_p, c_void_p],
    "TF_AllocateTensor": [c_void_p, c_int, POINTER(c_int64), c_int, c_size_t],
    "TF_TensorType": [c_int, c_void_p],
    "TF_NumDims": [c_int, c_void_p],
    "TF_Dim": [c_int64, c_void_p, c_int],
    "TF_TensorByteSize": [c_size_t, c_void_p],
    "TF_TensorData": [c_void_p, c_void_p],
    "TF_DeleteTensor": [None, c_void_p],
}


def library():
    # The very file that Python's TensorFlow runs in, and what it needs: loaded once, not twice.
    c = ctypes.CDLL(os.path.join(tf.sysconfig.get_lib(), "libtensorflow_cc.so.2"))
    for name, (result, *parameters) in FUNCTIONS.items():
        getattr(c, name).restype, getattr(c, name).argtypes = result, parameters
    return c


def to_tensor(c, array):
    shape = (c_int64 * array.ndim)(*array.shape)
    tensor = c.TF_AllocateTensor(TF_FLOAT, shape, array.ndim, array.nbytes)
    ctypes.memmove(c.TF_TensorData(tensor), array.tobytes(), array.nbytes)
    return tensor


def to_array(c, tensor):
    assert c.TF_TensorType(tensor) == TF_FLOAT
    data = ctypes.string_at(c.TF_TensorData(tensor), c.TF_TensorByteSize(tensor))
    shape = [c.TF_Dim(tensor, axis) for axis in range(c.TF_NumDims(tensor))]
    return np.frombuffer(data, "float32").reshape(shape)


def serve(path, batches):
    """The outputs of the signature `serving_default` for float32 batches."""
    c = library()
    outputs = []
    with contextlib.ExitStack() as stack:

        def owned(pointer, delete, *arguments):
            assert pointer
            stack.callback(delete, pointer, *arguments)
            return pointer

        def check():
            assert c.TF_GetCode(status) == 0, c.TF_Message(status).decode()

        def endpoint(tensors):
            (tensor,) = tensors.values()
            name, index = tensor.name.split(":")
            operation = c.TF_GraphOperationByName(graph, name.encode())
            assert operation, name
            return Output(operation, int(index))

        status = owned(c.TF_NewStatus(), c.TF_DeleteStatus)
        options = owned(c.TF_NewSessionOptions(), c.TF_DeleteSessionOptions)
        graph = owned(c.TF_NewGraph(), c.TF_DeleteGraph)
        meta = owned(c.TF_NewBuffer(), c.TF_DeleteBuffer)
        tags = (c_char_p * 1)(b"serve")
        session = c.TF_LoadSessionFromSavedModel(
            options, None, os.fsencode(path), tags, 1, graph, meta, status
        )
        check()
        owned(session, c.TF_DeleteSession, status)
        stack.callback(c.TF_CloseSession, session, status)
        described = ctypes.string_at(meta.contents.data, meta.contents.length)
        signature = tf.compat.v1.MetaGraphDef.FromString(described).signature_def["serving_default"]
        source, target = endpoint(signature.inputs), endpoint(signature.outputs)
        for batch in batches:
            feeds = (c_void_p * 1)(owned(to_tensor(c, batch), c.TF_DeleteTensor))
            fetches = (c_void_p * 1)()
            c.TF_SessionRun(
                session, None, source, feeds, 1, target, fetches, 1, None, 0, None, status
            )
            check()
            outputs.append(to_array(c, owned(fetches[0], c.TF_DeleteTensor)))
    return outputs
