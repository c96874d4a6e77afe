"""TensorFlow's checkpoint format, read without TensorFlow.

TensorFlow's own reader ends the process where an index lies about itself, so that a file could take
a program down. A checkpoint is an index (a sorted string table of protocol buffers) and data files.
The graph of the objects that were saved is one of its strings.
"""

import os
import struct

import numpy as np

_DTYPES = {
    1: "<f4", 2: "<f8", 3: "<i4", 4: "u1", 5: "<i2", 6: "i1", 9: "<i8", 10: "?", 14: "<u2",
    17: "<u2", 19: "<f2", 22: "<u4", 23: "<u8",
}  # fmt: skip
_STRING, _BFLOAT16 = 7, 14
_MAGIC = 0xDB4775248B80FB57


class Checkpoint:
    """The arrays of a checkpoint by key, and the object graph."""

    def __init__(self, prefix):
        self._prefix = prefix
        with open(prefix + ".index", "rb") as file:
            index = file.read()
        entries = {}
        for _, handle in _block(index, *_footer(index)):
            for key, value in _block(index, *_integers(handle, 2)[0]):
                entries[key] = value
        header = fields(entries.pop(b"", b""))
        if header.get(2, 0) != 0:
            raise ValueError("its checkpoint is big-endian")
        self._shards = header.get(1, 1)
        self._entries = {key.decode(): fields(value) for key, value in entries.items()}
        self._counts = {key: self._count(key) for key in self._entries}
        folder, start = os.path.dirname(prefix) or ".", os.path.basename(prefix) + ".data-"
        shards = [name for name in os.listdir(folder) if name.startswith(start)]
        self._size = sum(os.path.getsize(os.path.join(folder, name)) for name in shards)
        # Two entries may name the same data, and a file should not be read over and over.
        self._unread = 2 * self._size + 2**20

    def elements(self):
        """How many numbers there are, at most one for each byte of data."""
        return min(sum(self._counts.values()), self._size)

    def _count(self, key):
        """How many numbers an entry says it has."""
        sizes = [fields(d).get(1, 0) for n, d in protobuf(self._entries[key].get(2, b"")) if n == 2]
        count = 1
        for size in sizes:
            count *= size
        return count if self._entries[key].get(1) != _STRING else 0

    def graph(self):
        """The object graph: per object its edges, its arrays' (key, full name), its slots."""
        if "_CHECKPOINTABLE_OBJECT_GRAPH" not in self._entries:
            raise ValueError("it has no object graph: it is a checkpoint of TensorFlow 1")
        data = self._data("_CHECKPOINTABLE_OBJECT_GRAPH")
        (length,), at = _integers(data, 1)
        if length != len(data) - at - 4:
            raise ValueError("its object graph is not one string")
        nodes = []
        for number, node in protobuf(data[at + 4 :]):
            if number == 1:
                nodes.append(Object(node))
        return nodes

    def array(self, key):
        """The array of a key."""
        entry = self._entries.get(key)
        if entry is None or entry.get(1) not in _DTYPES:
            raise ValueError(f"{key!r} is not an array of numbers")
        shape = [fields(d).get(1, 0) for n, d in protobuf(entry.get(2, b"")) if n == 2]
        values = np.frombuffer(self._data(key), _DTYPES[entry[1]])
        if values.size != self._counts[key]:
            raise ValueError(f"{key!r} claims the shape {shape} and has {values.size} numbers")
        if entry[1] == _BFLOAT16:
            values = (values.astype("<u4") << 16).view("<f4")
        return values.reshape(shape)

    def _data(self, key):
        entry = self._entries[key]
        if 7 in entry:
            raise ValueError(f"{key!r} is stored in slices")
        self._unread -= entry.get(5, 0)
        if self._unread < 0:
            raise ValueError(f"{key!r} and others have the same data")
        name = f"{self._prefix}.data-{entry.get(3, 0):05d}-of-{self._shards:05d}"
        start, size = entry.get(4, 0), entry.get(5, 0)
        if not os.path.isfile(name) or start + size > os.path.getsize(name):
            raise ValueError(f"{os.path.basename(name)!r} is missing or cut short")
        with open(name, "rb") as file:
            file.seek(start)
            data = file.read(size)
        checked = data
        if entry.get(1) == _STRING:
            # The lengths have a checksum of their own, in the four bytes after them, and enter the
            # entry's as 32-bit numbers.
            lengths, at = _integers(data, 1)
            checked = struct.pack("<I", lengths[0] & 0xFFFFFFFF) + data[at:]
        _check(checked, entry.get(6, 0), f"the data of {key!r}")
        return data


class Object:
    """One node of the object graph."""

    def __init__(self, data):
        self.edges, self.values, self.slots = {}, [], []
        for number, part in protobuf(data):
            part = fields(part) if number in (1, 2, 3) else {}
            if number == 1:
                self.edges[part.get(2, b"").decode()] = part.get(1, 0)
            elif number == 2:
                self.values.append((part.get(3, b"").decode(), part.get(2, b"").decode()))
            elif number == 3:
                self.slots.append((part.get(2, b"").decode(), part.get(1, 0), part.get(3, 0)))


def protobuf(data):
    """The fields of a message, in order: (number, integer or bytes)."""
    if not isinstance(data, bytes):
        raise ValueError("a message in it is corrupt")
    at = 0
    while at < len(data):
        (key,), at = _integers(data, 1, at)
        kind = key & 7
        if kind == 0:
            (value,), at = _integers(data, 1, at)
        else:
            size = {1: 8, 5: 4}.get(kind)
            if kind == 2:
                (size,), at = _integers(data, 1, at)
            if size is None or at + size > len(data):
                raise ValueError("a message in it is corrupt")
            value = data[at : at + size]
            at += size
            if kind != 2:
                value = int.from_bytes(value, "little")
        yield key >> 3, value


def fields(data):
    """The last value of each field of a message."""
    return dict(protobuf(data))


def _integers(data, count, at=0):
    """So many variable-length integers, and where they end."""
    found = []
    for _ in range(count):
        value = shift = 0
        while True:
            if at >= len(data) or shift > 63:
                raise ValueError("it is corrupt or cut short")
            value |= (data[at] & 127) << shift
            shift += 7
            at += 1
            if data[at - 1] < 128:
                break
        found.append(value)
    return found, at


def _footer(index):
    if len(index) < 48 or int.from_bytes(index[-8:], "little") != _MAGIC:
        raise ValueError("its index is corrupt or cut short")
    return _integers(index[-48:], 4)[0][2:]


def _block(index, start, size):
    """The keys and values of a block of the index."""
    data = index[start : start + size]
    if len(data) != size or start + size + 5 > len(index) or index[start + size] != 0:
        raise ValueError("its index is corrupt or cut short")
    stored = int.from_bytes(index[start + size + 1 : start + size + 5], "little")
    _check(index[start : start + size + 1], stored, "its index")
    end = size - 4 - 4 * int.from_bytes(data[-4:], "little")
    at, key = 0, b""
    while at < end:
        (shared, own, length), at = _integers(data, 3, at)
        if shared > len(key) or at + own + length > end:
            raise ValueError("its index is corrupt or cut short")
        key = key[:shared] + data[at : at + own]
        yield key, data[at + own : at + own + length]
        at += own + length


def _check(data, stored, what):
    crc = _crc32c(data)
    if ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF != stored:
        raise ValueError(f"{what} does not match its checksum")


def _table():
    table = np.arange(256, dtype="u4")
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ 0x82F63B78, table >> 1).astype("u4")
    return table


def _crc32c(data, lanes=2048, table=_table()):  # noqa: B008
    """The Castagnoli checksum. The data is cut in lanes that are read side by side.

    The checksum of joined parts follows from theirs: a part maps the one before bit by bit.
    """
    data = np.frombuffer(data, "u1")
    head = np.frombuffer(data[:4].tobytes().ljust(4, b"\0"), "u1") ^ np.uint8(255)
    if data.size < 4:
        crc = np.uint32(0xFFFFFFFF)
        for byte in data:
            crc = crc >> np.uint32(8) ^ table[(crc ^ byte) & np.uint32(255)]
        return int(crc) ^ 0xFFFFFFFF
    steps = -(-data.size // lanes)
    padded = np.zeros(lanes * steps, "u1")  # zeros in front change nothing
    padded[lanes * steps - data.size :] = data
    padded[lanes * steps - data.size :][:4] = head
    columns = np.ascontiguousarray(padded.reshape(lanes, steps).T)
    states = np.concatenate([np.zeros(lanes, "u4"), np.uint32(1) << np.arange(32, dtype="u4")])
    for column in columns:
        states[:lanes] ^= column
        states = states >> 8 ^ table[states & 255]
    moved = [int(state) for state in states[lanes:]]
    crc = 0
    for state in states[:lanes].tolist():
        shifted = 0
        while crc:
            bit = crc & -crc
            shifted ^= moved[bit.bit_length() - 1]
            crc ^= bit
        crc = shifted ^ state
    return crc ^ 0xFFFFFFFF
