"""Each preset in a browser: @litertjs/core and onnxruntime-web in headless Chromium.

    npm install @litertjs/core onnxruntime-web        # in an empty folder
    python benchmarks/browser.py --modules FOLDER/node_modules --chromium /usr/bin/chromium

The model is exported with a fixed signature of one image, as LiteRT.js takes no unknown batch, and
with the model's own unknown batch, to see what it says. Both runtimes use WebAssembly. Writes
`benchmarks/results/browser.csv`. With `--seeds 100`, instead, the first 100 random models of
`export_fuzz.py` are exported with a fixed signature, and each file is compared with LiteRT in
Python; writes `benchmarks/results/browser_models.csv`.
"""

import argparse
import collections
import functools
import http.server
import json
import subprocess
import tempfile
import threading
from pathlib import Path

import export_fuzz
import keras
import numpy as np
from common import RESULTS, write
from keras import layers

import keras_frn
from keras_frn.export.presets import PRESETS

SHAPE, SAMPLES = (16, 16, 3), 8
PAGE = """<!doctype html><script type="importmap">{"imports": {
"@litertjs/core": "/modules/@litertjs/core/dist/index.js",
"@litertjs/wasm-utils": "/modules/@litertjs/wasm-utils/dist/index.js"}}</script>
<script type="module">
const tasks = await (await fetch("/tasks.json")).json();
const rows = [];
let litert, ort;
async function run({runtime, file, shape, samples}) {
  if (runtime === "@litertjs/core") {
    if (!litert) {
      litert = await import("@litertjs/core");
      await litert.loadLiteRt("/modules/@litertjs/core/wasm/");
    }
    const model = await litert.loadAndCompile("/" + file, {accelerator: "wasm"});
    const outputs = [];
    for (const sample of samples) {
      const input = new litert.Tensor(new Float32Array(sample), shape);
      const [output] = await model.run(input);
      outputs.push(Array.from(output.toTypedArray()));
    }
    return outputs;
  }
  if (!ort) {
    ort = await import("/modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs");
    ort.env.wasm.wasmPaths = "/modules/onnxruntime-web/dist/";
    ort.env.wasm.numThreads = 1;
  }
  const session = await ort.InferenceSession.create("/" + file);
  const outputs = [];
  for (const sample of samples) {
    const input = new ort.Tensor("float32", new Float32Array(sample), shape);
    const found = await session.run({[session.inputNames[0]]: input});
    outputs.push(Array.from(found[session.outputNames[0]].data));
  }
  return outputs;
}
for (const task of tasks) {
  const row = {};
  try { row.outputs = await run(task); } catch (error) { row.error = String(error); }
  rows.push(row);
}
await fetch("/result", {method: "POST", body: JSON.stringify(rows)});
</script>"""


class Server(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, and the place where the page leaves its result."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.result = json.loads(body)
        self.send_response(204)
        self.end_headers()
        self.server.is_done.set()

    def log_message(self, *_):
        pass


def make_model():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input(SHAPE),
            layers.Conv2D(16, 3, use_bias=False),
            keras_frn.FilterResponseNormalizationTLU(),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, padding="same", use_bias=False),
            keras_frn.FilterResponseNormalization(),
            keras_frn.TLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10),
        ]
    )
    rng = np.random.default_rng(0)
    model.set_weights([w + 0.1 * rng.normal(size=w.shape) for w in model.get_weights()])
    return model


def write_files(model, folder, data):
    """The tasks of the page, one for each file."""
    tasks = []
    fixed = [keras.InputSpec(shape=(1, *SHAPE))]
    for preset in PRESETS:
        for signature, batch in ((fixed, "1"), (None, "unknown")):
            file = f"{preset}_{batch}.tflite"
            keras_frn.export_tflite(
                model,
                folder / file,
                quantization=preset,
                calibration_data=data,
                input_signature=signature,
            )
            tasks.append({"runtime": "@litertjs/core", "preset": preset or "float32"})
            tasks[-1] |= {"batch": batch, "file": file}
    model.predict(data[:1], verbose=0)  # Keras' ONNX export asks for a call
    model.export(folder / "model.onnx", format="onnx", verbose=False)
    tasks.append({"runtime": "onnxruntime-web", "preset": "float32", "batch": "unknown"})
    tasks[-1]["file"] = "model.onnx"
    return tasks


def in_browser(folder, tasks, x, modules, chromium):
    """What the page says of each task: the outputs for the samples in x, or an error."""
    samples = {"shape": [1, *x.shape[1:]], "samples": x.reshape(len(x), -1).tolist()}
    (folder / "page.html").write_text(PAGE)
    (folder / "tasks.json").write_text(json.dumps([task | samples for task in tasks]))
    (folder / "modules").symlink_to(modules.resolve())
    handler = functools.partial(Server, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.is_done = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        address = f"http://127.0.0.1:{server.server_port}/page.html"
        command = [chromium, *options, f"--user-data-dir={profile}", address]
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            if not server.is_done.wait(300):
                raise TimeoutError("the page has not answered within 300 seconds")
        finally:
            browser.terminate()
            browser.wait()
            server.shutdown()
    return server.result


def refusal(result):
    """Why the page has no outputs, in a line, or nothing."""
    return result.get("error", "").partition("\n")[0][:160]


def one_model(modules, chromium):
    """Each preset and batch of one model, and its ONNX file."""
    model = make_model()
    data = np.random.default_rng(1).normal(size=(100, *SHAPE)).astype("float32")
    expected = keras.ops.convert_to_numpy(model(data[:SAMPLES], training=False))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tasks = write_files(model, folder, data)
        results = in_browser(folder, tasks, data[:SAMPLES], modules, chromium)
    rows = []
    for task, result in zip(tasks, results, strict=True):
        row = {key: task[key] for key in ("runtime", "preset", "batch")}
        row["version"] = package_version(modules / task["runtime"])
        row |= {"error": "", "refused": refusal(result)}
        if not row["refused"]:
            error = np.abs(np.array(result["outputs"]) - expected).max()
            row["error"] = f"{error:.2g}"
        row["range"] = float(np.ptp(expected))
        rows.append(row)
        print(*(f"{key}={row[key]}" for key in ("runtime", "preset", "batch", "error", "refused")))
    return rows


def write_fixed(model, folder, data):
    """The tasks of a random model's files of a fixed batch, one for each preset that it has."""
    tasks = []
    for preset in PRESETS:
        file = f"{preset}.tflite"
        said = export_fuzz.export(model, folder / file, preset, data, integer_io=False)
        if (folder / file).exists():
            tasks.append({"runtime": "@litertjs/core", "preset": preset or "float32"})
            tasks[-1] |= {"warned": bool(said), "file": file}
    return tasks


def random_models(seeds, modules, chromium):
    """Each preset of random models with a fixed signature; errors as shares of the range."""
    rows = []
    for seed in range(seeds):
        keras.backend.clear_session()
        model, samples = export_fuzz.random_model(seed)
        data, unseen = samples(64), samples(SAMPLES)
        try:
            expected = keras.ops.convert_to_numpy(model(unseen, training=False))
        except ValueError:  # Keras infers a wrong shape for some layers in a row
            continue
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            tasks = write_fixed(model, folder, data)
            results = in_browser(folder, tasks, unseen, modules, chromium)
            for task, result in zip(tasks, results, strict=True):
                row = {"seed": seed, "preset": task["preset"], "warned": task["warned"]}
                row |= {"from the model": "", "from LiteRT": "", "refused": refusal(result)}
                if not row["refused"]:
                    outputs = np.array(result["outputs"]).reshape(expected.shape)
                    litert = export_fuzz.run(folder / task["file"], unseen)
                    row["from the model"] = f"{export_fuzz.share(outputs, expected):.2g}"
                    row["from LiteRT"] = f"{export_fuzz.share(outputs, litert):.2g}"
                rows.append(row)
        print(seed, *(row for row in rows if row["seed"] == seed), sep="\n  ", flush=True)
    for preset, number in collections.Counter(row["preset"] for row in rows).items():
        ran = [row for row in rows if row["preset"] == preset and not row["refused"]]
        worst = max(float(row["from LiteRT"]) for row in ran)
        print(f"{preset}: {len(ran)} of {number} files ran, at most {worst} from LiteRT")
    return rows


def package_version(folder):
    return json.loads((folder / "package.json").read_text())["version"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modules", type=Path, required=True)
    parser.add_argument("--chromium", default="chromium")
    parser.add_argument("--seeds", type=int)
    arguments = parser.parse_args()
    version = subprocess.run([arguments.chromium, "--version"], capture_output=True, text=True)
    if arguments.seeds:
        rows = random_models(arguments.seeds, arguments.modules, arguments.chromium)
        path = RESULTS / "browser_models.csv"
    else:
        rows = one_model(arguments.modules, arguments.chromium)
        path = RESULTS / "browser.csv"
    write([{**row, "browser": version.stdout.strip()} for row in rows], path)


if __name__ == "__main__":
    main()
