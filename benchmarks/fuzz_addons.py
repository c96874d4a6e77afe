"""Thousands of damaged and hostile files for `load_addons_model`: how many are refused, and how.

    python benchmarks/fuzz_addons.py [--files 5000] [--seed 0] [--csv fuzz_addons.csv]

Every file is opened in a process of its own kind, which is started again where it dies. A file
passes if it loads, or raises ValueError, within the time limit, and leaves nothing behind. Prints a
table of kind of file, kind of damage and outcome, with the longest time and the peak memory.
"""

import argparse
import collections
import copy
import csv
import io
import json
import os
import random
import resource
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

MODELS = Path(__file__).parent.parent / "tests" / "addons_models"
LIMIT_S, LIMIT_BYTES = 60, 12 * 2**30
NAMES = (
    "Lambda", "TFSMLayer", "TorchModuleWrapper", "JaxLayer", "function", "__lambda__", "Functional",
    "Sequential", "Model", "InputLayer", "TLU", "Addons>TLU", "Addons>WeightNormalization",
    "FilterResponseNormalization", "TFOpLambda", "SlicingOpLambda", "TimeDistributed", "RNN",
    "Bidirectional", "Normalization", "StringLookup", "TextVectorization", "Policy", "os.system",
    "builtins>eval", "subprocess>Popen", "keras_frn>_Stored", "__tuple__", "__numpy__", "Dense",
)  # fmt: skip
VALUES = (
    None, True, False, 0, -1, 1, 2, 3, 7, 10**5, 10**9, 10**12, 2**63, 10**30, -(10**9), 0.5, -2.5,
    1e300, float("nan"), float("inf"), "", "x", "../../../../etc/passwd", "/etc/passwd", "relu",
    "hard_sigmoid", "float64", "mixed_float16", "same", [], {}, [None], [0], [-1], [10**9] * 3,
    [1, 2], [[]], {"class_name": "Lambda", "config": {"function": ["code", None, None]}},
    {"class_name": "__lambda__", "config": {"code": "AAAA"}},
    {"class_name": "function", "config": "os.system"},
    {"class_name": "__tuple__", "items": [None, 10**9, 10**9, 10**9]},
)  # fmt: skip


def places(value, found=None):
    """(container, key) of everything inside a JSON value."""
    found = [] if found is None else found
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        found.append((value, key))
        if isinstance(inner, (dict, list)):
            places(inner, found)
    return found


def mutate_config(config, rng):
    """The config with a few of its values exchanged, removed or multiplied."""
    config = copy.deepcopy(config)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        found = places(config)
        if not found:
            break
        container, key = rng.choice(found)
        how = rng.randrange(7)
        if how == 0:
            del container[key]
        elif how == 1:
            other, name = rng.choice(found)
            if name in other if isinstance(other, dict) else name < len(other):
                container[key] = copy.deepcopy(other[name])
        elif how == 2:
            for _ in range(rng.choice((10, 300))):
                container[key] = [container[key]]
        elif how == 3 and isinstance(container, list):
            container[key:key] = [copy.deepcopy(container[key]) for _ in range(rng.choice((1, 50)))]
        elif how == 4:
            named = [(c, k) for c, k in found if k in ("class_name", "function", "module")]
            if named:
                container, key = rng.choice(named)
                container[key] = rng.choice(NAMES)
        elif isinstance(container[key], (int, float)) and how == 5:
            container[key] = container[key] * rng.choice((10, 1000, 10**9, -1, 0.5))
        else:
            container[key] = copy.deepcopy(rng.choice(VALUES))
    return config


def mutate_bytes(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        at = rng.randrange(len(data)) if data else 0
        size = min(rng.choice((1, 2, 4, 8, 64, 1024)), max(len(data) - at, 0))
        how = rng.randrange(6)
        if how == 0:
            data = data[:at]
        elif how == 1:
            data[at : at + size] = bytes(size)
        elif how == 2:
            data[at : at + size] = b"\xff" * size
        elif how == 3:
            data[at : at + size] = rng.randbytes(size)
        elif how == 4 and size:
            data[at] ^= 1 << rng.randrange(8)
        else:
            start = rng.randrange(len(data) + 1)
            data[at:at] = data[start : start + size]
    return bytes(data)


def rezip(data, change):
    """The archive with `change(name, bytes)` in place of each member."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", 8) as new:
        for info in old.infolist():
            changed = change(info.filename, old.read(info))
            if changed is not None:
                new.writestr(info.filename, changed)
    return out.getvalue()


def in_h5(data, change):
    import h5py

    file = io.BytesIO(data)
    with h5py.File(file, "r+") as root:
        change(root)
    return file.getvalue()


def mutate_h5(root, rng):
    """Links out of the file, data elsewhere, other shapes and types, cycles, missing parts."""
    import h5py
    import numpy as np

    groups, arrays = [root], []
    root.visititems(lambda _, v: (groups if isinstance(v, h5py.Group) else arrays).append(v))
    how = rng.randrange(12)
    if how < 8 and arrays:
        victim = rng.choice(arrays)
        name, group, shape = victim.name, victim.parent, victim.shape
        del root[name]
        if how == 0:
            root[name] = h5py.SoftLink("/nowhere")
        elif how == 1:
            root[name] = h5py.ExternalLink("/etc/passwd", "/")
        elif how == 2:
            root.create_dataset(name, (64,), "u1", external=[("/etc/passwd", 0, 64)])
        elif how == 3:
            layout = h5py.VirtualLayout((4,), "f4")
            layout[:] = h5py.VirtualSource("/etc/passwd", "x", (4,))
            root.create_virtual_dataset(name, layout)
        elif how == 4:
            huge = rng.choice([(10**6, 10**6), (2**40,), (10**4, 10**4, 50)])
            root.create_dataset(name, huge, "f4", chunks=True, compression="gzip")
        elif how == 5:
            root.create_dataset(name, data=np.array([b"text", b"more"], "S9"))
        elif how == 6:
            root.create_dataset(name, data=np.zeros(tuple(reversed(shape)), "f8"))
        elif how == 7:
            root[name] = group
    elif how == 8:
        group = rng.choice(groups)
        for key in list(group.attrs):
            group.attrs[key] = np.array([b"../" * rng.randrange(1, 9), b"", b"x:0"], "S64")
    elif how == 9:
        group = rng.choice(groups)
        if group.name != "/":
            del root[group.name]
    elif how == 10:
        group = rng.choice(groups)
        names = [n for n in ("layers", "_layer_checkpoint_dependencies", "vars") if n not in group]
        if names:
            group[rng.choice(names)] = root
    else:
        group = rng.choice(groups)
        for key in list(group.attrs):
            group.attrs[key] = rng.choice([0, -1.5, "", "nothing", b"\xff\xfe" * 9])


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 & -(crc & 1))
    return crc ^ 0xFFFFFFFF


def mutate_index(data, rng):
    """A checkpoint index with damage that its checksum does not show."""
    end = data[-48:]
    number = shift = 0
    for byte in end:
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            break
    block = bytearray(data[: number - 4])
    for _ in range(rng.choice((1, 1, 2, 4))):
        block[rng.randrange(len(block) - 1)] = rng.choice((0, 1, 127, 255, rng.randrange(256)))
    crc = crc32c(bytes(block))
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return bytes(block) + struct.pack("<I", masked) + data[number:]


def mutate_metadata(data, rng):
    """keras_metadata.pb with another config in it."""

    def varint(value):
        out = b""
        while value > 127:
            out, value = out + bytes([value & 127 | 128]), value >> 7
        return out + bytes([value])

    start = data.index(b'{"name"')
    config, _ = json.JSONDecoder().raw_decode(data[start:].decode("utf-8", "ignore"))
    text = json.dumps(mutate_config(config, rng)).encode()
    node = b"\x1a\x04root" + b"\x2a" + varint(len(text)) + text
    return b"\x0a" + varint(len(node)) + node


def hostile(folder):
    """Files that were written to hurt: (name, path)."""
    config = json.loads((MODELS / "frn_default" / "model.json").read_text())
    keras = (MODELS / "frn_default" / "model.keras").read_bytes()
    saved = (MODELS / "frn_default" / "saved_model.zip").read_bytes()
    files = {}

    def with_config(value):
        return rezip(keras, lambda n, d: json.dumps(value).encode() if n == "config.json" else d)

    files["zip bomb"] = rezip(keras, lambda n, d: bytes(2**28) if n == "config.json" else d)
    files["zip bomb of weights"] = rezip(saved, lambda n, d: bytes(2**28) if ".data-" in n else d)
    files["deep json.json"] = b'{"a":' * 200_000
    files["deep brackets"] = rezip(keras, lambda n, d: b"[" * 10**6 if n == "config.json" else d)
    traversal = io.BytesIO(saved)
    with zipfile.ZipFile(traversal, "a") as archive:
        for name in ("../escaped", "/tmp/escaped", "saved_model/../../escaped"):
            archive.writestr(name, "escaped")
        archive.writestr("../saved_model/variables/variables.data-00001-of-00002", "escaped")
    files["path traversal.zip"] = traversal.getvalue()
    inner = {"class_name": "InputLayer", "name": "i", "inbound_nodes": []}
    inner["config"] = {"batch_input_shape": [None, 2], "name": "i"}
    model = {"class_name": "Activation", "config": {"activation": "relu", "name": "a"}}
    for depth in range(40):
        # Every model calls the one inside twice: 2**40 calls in a few kilobytes.
        first = int(depth > 0)
        calls = [[["i", 0, 0, {}]], [["a", first, 0, {}]]]
        layer = {**model, "name": "a", "inbound_nodes": calls}
        layer["config"] = {**layer["config"], "name": "a"}
        model = {"class_name": "Functional", "config": {"name": "m", "layers": [inner, layer]}}
        model["config"].update(input_layers=[["i", 0, 0]], output_layers=[["a", first + 1, 0]])
    files["exponential calls"] = with_config(model)
    wide = copy.deepcopy(config)
    wide["config"]["layers"] = [
        {"class_name": "InputLayer", "config": {"batch_input_shape": [None, 10**5], "name": "i"}},
        {"class_name": "Dense", "config": {"units": 10**7, "name": "d"}},
    ]
    files["wide layer"] = with_config(wide)
    long = copy.deepcopy(wide)
    long["config"]["layers"] = [
        {"class_name": "InputLayer", "config": {"batch_input_shape": [1, 10**8, 2], "name": "i"}},
        {"class_name": "TimeDistributed", "config": {"name": "t", "layer": {
            "class_name": "Activation", "config": {"activation": "relu"}}}},
    ]  # fmt: skip
    files["endless steps"] = with_config(long)
    stats = copy.deepcopy(wide)
    stats["config"]["layers"] = [
        {"class_name": "InputLayer", "config": {"batch_input_shape": [None, 9], "name": "i"}},
        {"class_name": "RepeatVector", "config": {"n": 10**10, "name": "r"}},
        {"class_name": "Normalization", "config": {"axis": [1, 2], "name": "n"}},
    ]
    files["huge statistics"] = with_config(stats)
    for name, data in files.items():
        path = os.path.join(folder, name)
        with open(path, "wb") as file:
            file.write(data)
        yield "hostile", name, path
    path = os.path.join(folder, "elsewhere")
    shutil.copytree(MODELS / "frn_default" / "ckpt", path)
    with open(os.path.join(path, "checkpoint"), "w") as file:
        file.write('model_checkpoint_path: "/etc/passwd"\n')
    yield "hostile", "checkpoint elsewhere", path


def mutated(folder, count, seed):
    """`count` files: (kind of file, kind of damage, path)."""
    rng = random.Random(seed)
    models = sorted(p for p in MODELS.iterdir() if (p / "model.h5").is_file())
    for number in range(count):
        model = rng.choice(models)
        kinds = {
            "model.h5": ("bytes", "config", "structure"),
            "model.keras": ("bytes", "config", "structure", "weights"),
            "saved_model.zip": ("bytes", "config", "index", "weights"),
            "model.json": ("bytes", "config"),
            "ckpt": ("bytes", "index"),
        }
        kind = rng.choice([name for name in kinds if (model / name).exists()])
        how = rng.choice(kinds[kind])
        path = os.path.join(folder, f"{number}--{model.name}--{kind}")
        if kind == "ckpt":
            shutil.copytree(model / kind, path)
            name = rng.choice(os.listdir(path)) if how == "bytes" else "ckpt.index"
            victim = Path(path, name)
            change = mutate_bytes if how == "bytes" else mutate_index
            victim.write_bytes(change(victim.read_bytes(), rng))
            yield "checkpoint", how, path
            continue
        data = (model / kind).read_bytes()
        if how == "bytes":
            data = mutate_bytes(data, rng)
        elif kind == "model.json":
            data = json.dumps(mutate_config(json.loads(data), rng)).encode()
        elif kind == "model.h5":

            def change(root, how=how):
                if how == "structure":
                    return mutate_h5(root, rng)
                key = rng.choice([k for k in root.attrs if k.endswith("_config")])
                config = mutate_config(json.loads(root.attrs[key]), rng)
                root.attrs[key] = json.dumps(config)

            data = in_h5(data, change)
        else:

            def change(name, old, how=how):
                if how == "config" and name == "config.json":
                    return json.dumps(mutate_config(json.loads(old), rng)).encode()
                if how == "config" and name.endswith("keras_metadata.pb"):
                    return mutate_metadata(old, rng)
                if how == "index" and name.endswith(".index"):
                    return mutate_index(old, rng)
                if how == "structure" and name.endswith(".h5"):
                    return in_h5(old, lambda root: mutate_h5(root, rng))
                if how == "weights" and (".data-" in name or name.endswith(".h5")):
                    return mutate_bytes(old, rng)
                return old

            data = rezip(data, change)
        with open(path, "wb") as file:
            file.write(data)
        yield kind, how, path


def worker():
    """Opens the paths on stdin and answers each with a line of JSON."""
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import keras

    from keras_frn.addons import load_addons_model

    for model in ("model.h5", "saved_model.zip"):  # imports and first calls are not the file's
        load_addons_model(MODELS / "frn_default" / model)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answers.write(json.dumps("ready") + "\n")
    answers.flush()
    for number, line in enumerate(sys.stdin):
        path = json.loads(line)
        model = path.split("--")[1] if "--" in path else "frn_default"
        begin, message = time.perf_counter(), ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if os.path.isdir(path):
                    load_addons_model(MODELS / model / "model.json", weights=path)
                elif path.endswith("model.json"):
                    load_addons_model(path, weights=MODELS / model / "ckpt")
                else:
                    load_addons_model(path)
            outcome = "loaded"
        except ValueError as error:
            outcome, message = "ValueError", str(error)
        except BaseException as error:
            outcome, message = type(error).__name__, str(error)[:300]
        seconds = time.perf_counter() - begin
        left = len(os.listdir(tempfile.gettempdir()))
        if number % 50 == 0:
            keras.utils.clear_session()
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) // 1024
        answers.write(json.dumps([outcome, message, seconds, left, peak]) + "\n")
        answers.flush()


class Worker:
    """A process that opens files, started again when it is lost."""

    def __init__(self, temporary):
        self.temporary = temporary
        self.process = None

    def open(self, path):
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={
                    **os.environ,
                    "TMPDIR": self.temporary,
                    "TF_CPP_MIN_LOG_LEVEL": "3",
                    "CUDA_VISIBLE_DEVICES": "",
                },
            )
            self.process.stdout.readline()
        self.process.stdin.write(json.dumps(path) + "\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], LIMIT_S)
        line = self.process.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        self.close()
        for name in os.listdir(self.temporary):
            shutil.rmtree(os.path.join(self.temporary, name))
        return ["crash" if ready else "timeout", "", LIMIT_S, 0, 0]

    def close(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def study(count, seed, report=print):
    """Rows of (file, damage, outcome, message, seconds, files left, peak MB)."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as temporary:
        process = Worker(temporary)
        try:
            files = [*hostile(folder)] if seed == 0 else []
            for sources in (files, mutated(folder, count, seed)):
                for kind, how, path in sources:
                    rows.append([kind, how, *process.open(path)])
                    outcome = rows[-1][2]
                    if outcome not in ("loaded", "ValueError"):
                        kept = os.path.join(tempfile.gettempdir(), f"fuzz-{len(rows)}-{outcome}")
                        shutil.rmtree(kept, ignore_errors=True)
                        shutil.move(path, kept)
                        report(f"{outcome}: {kind}, {how}, kept as {kept}: {rows[-1][3][:200]}")
                    elif os.path.isdir(path):
                        shutil.rmtree(path)
                    else:
                        os.remove(path)
                    if len(rows) % 500 == 0:
                        report(f"{len(rows)} files")
        finally:
            process.close()
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", default="fuzz_addons.csv")
    parser.add_argument("--worker", action="store_true")
    options = parser.parse_args()
    if options.worker:
        return worker()
    sys.setrecursionlimit(20_000)  # for the configs that are nested on purpose
    rows = study(options.files, options.seed, lambda line: print(line, flush=True))
    table = collections.defaultdict(list)
    for kind, how, outcome, _, seconds, left, peak in rows:
        table[kind, how if kind != "hostile" else "", outcome].append((seconds, left, peak))
    lines = [("file", "damage", "outcome", "count", "longest s", "files left")]
    for key, values in sorted(table.items()):
        longest, left = max(v[0] for v in values), sum(v[1] for v in values)
        lines.append((*key, len(values), f"{longest:.2f}", left))
    for line in lines:
        print("".join(f"{cell!s:18}" for cell in line))
    bad = sum(row[2] not in ("loaded", "ValueError") or row[5] > 0 for row in rows)
    peak = max(row[6] for row in rows)
    print(f"{len(rows)} files, {bad} neither loaded nor refused with ValueError")
    print(f"longest {max(row[4] for row in rows):.2f} s, memory at most {peak} MB above the start")
    with open(options.csv, "w", newline="") as file:
        csv.writer(file).writerows(lines)
    return bad


if __name__ == "__main__":
    sys.exit(bool(main()))
