"""HDF5 files, read in a process of their own.

A damaged file can send the HDF5 library round in circles in C, where nothing can interrupt it. So
this file is also a program, which imports neither Keras nor this package: it sends what it finds
through a pipe, and is ended if it does not come to an end by itself.
"""

import contextlib
import io
import json
import os
import subprocess
import sys

_TIMEOUT_S, _BYTES_PER_S = 20, 10**7
_ATTRIBUTES = ("layer_names", "weight_names", "model_config", "training_config", "keras_version")
_MAX_OBJECTS, _MAX_DEPTH = 10**6, 64


class Group:
    """A group of the file: its members are groups and arrays."""

    def __init__(self):
        self.attrs, self.members = {}, {}

    def get(self, path):
        """The group or array at a path in this group, or None."""
        found = self
        for part in [part for part in path.split("/") if part]:
            found = found.members.get(part) if isinstance(found, Group) else None
        return found

    def arrays(self):
        """All arrays below."""
        below = [v.arrays() if isinstance(v, Group) else [v] for v in self.members.values()]
        return [array for arrays in below for array in arrays]


def read(file, limit):
    """The root group of a file, a path or bytes, whose arrays have `limit` bytes at most."""
    data, path = (file, "-") if isinstance(file, bytes) else (b"", file)
    if not sys.executable:
        raise ValueError("it is HDF5, and there is no Python interpreter to read that in")
    timeout = _TIMEOUT_S + (len(data) or os.path.getsize(path)) // _BYTES_PER_S
    # -P keeps the names of our own modules apart from those that h5py imports.
    command = [sys.executable, "-P", __file__, path, str(limit), str(timeout)]
    # Threads that nobody needs would reserve a part of the memory that the process may have.
    options = {"env": {**os.environ, "OPENBLAS_NUM_THREADS": "1"}, "capture_output": True}
    try:
        run = subprocess.run(command, input=data, timeout=timeout, check=False, **options)
    except subprocess.TimeoutExpired:
        raise ValueError(f"the HDF5 library does not come to an end in {timeout} s") from None
    root, stream = Group(), io.BytesIO(run.stdout)
    while line := stream.readline():
        entry = json.loads(line)
        if "end" in entry:
            return root
        if "error" in entry:
            raise ValueError(entry["error"])
        *parents, name = entry["path"]
        group = root
        for parent in parents:
            group = group.members[parent]
        if "shape" in entry:
            group.members[name] = _array(stream, entry)
        elif name:
            group = group.members.setdefault(name, Group())
        if "attrs" in entry:
            group.attrs = entry["attrs"]
    raise ValueError(f"the HDF5 library failed on it with code {run.returncode}")


def _array(stream, entry):
    import numpy as np

    data = stream.read(entry["bytes"])
    return np.frombuffer(data, entry["dtype"]).reshape(entry["shape"])


# What the process of its own does


def _main(path, limit, timeout):
    import h5py

    out = sys.stdout.buffer
    try:
        _limit(limit, timeout)
        file = io.BytesIO(sys.stdin.buffer.read()) if path == "-" else path
        with h5py.File(file, "r") as root:
            _send(out, root, limit, h5py)
        out.write(b'{"end": 1}\n')
    except Exception as error:
        said = " ".join(str(error).split())[:300] or type(error).__name__
        out.write(json.dumps({"error": said}).encode() + b"\n")
    out.flush()


def _limit(size, seconds):
    """What the process may use, also when the one that waits for it is no more."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # where there are no such limits
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (seconds + 10, seconds + 10))
        most = 2**32 + 4 * size
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _send(out, root, limit, h5py):
    """Every group and array once, parents first. Links lead to any file, and are not followed."""
    todo, seen = [([""], root)], set()
    while todo:
        path, group = todo.pop()
        attrs = {
            k: _texts(group.attrs[k]) for k in group.attrs if k.rstrip("0123456789") in _ATTRIBUTES
        }
        _line(out, path=path, attrs=attrs)
        if len(path) > _MAX_DEPTH or len(seen) > _MAX_OBJECTS:
            raise ValueError("its groups are too many, or nested too deep")
        for name in group:
            here = [*path[1:], name] if path == [""] else [*path, name]
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise ValueError(f"{name!r} is a link, not data")
            member = group[name]
            address = h5py.h5o.get_info(member.id).addr
            if address in seen:
                raise ValueError(f"{name!r} is a second name for other data")
            seen.add(address)
            if isinstance(member, h5py.Group):
                todo.append((here, member))
                continue
            if not isinstance(member, h5py.Dataset) or member.dtype.kind not in "biuf":
                raise ValueError(f"{name!r} is not an array of numbers")
            if member.shape is None or member.external or member.is_virtual:
                raise ValueError(f"{name!r} keeps its data in another file")
            limit -= member.size * member.dtype.itemsize
            if limit < 0:
                raise ValueError(
                    f"{name!r} claims the shape {member.shape}, more than the file has"
                )
            data = member[()].tobytes()
            dtype, shape = member.dtype.str, list(member.shape)
            _line(out, path=here, dtype=dtype, shape=shape, bytes=len(data))
            out.write(data)


def _line(out, **entry):
    out.write(json.dumps(entry).encode() + b"\n")


def _texts(value):
    """A text or a list of texts."""
    if hasattr(value, "ravel") and getattr(value, "ndim", 0):
        return [_texts(item) for item in value.ravel()]
    return value.decode() if isinstance(value, bytes) else str(value)


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
