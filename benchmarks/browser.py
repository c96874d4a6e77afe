"""Each preset in a browser: @litertjs/core and onnxruntime-web in headless Chromium.

    npm install @litertjs/core onnxruntime-web        # in an empty folder
    python benchmarks/browser.py --modules FOLDER/node_modules --chromium /usr/bin/chromium

The model is exported with a fixed signature of one image, as LiteRT.js takes no unknown batch, and
with the model's own unknown batch, to see what it says. Both runtimes use WebAssembly. Writes
`benchmarks/results/browser.csv`.
"""

import argparse
import functools
import http.server
import json
import subprocess
import tempfile
import threading
from pathlib import Path

import keras
import numpy as np
from common import RESULTS, write
from keras import layers

import keras_frn

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
  const row = {name: task.name};
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
    for preset in (None, "float16", "dynamic", "int8", "int8_float_statistics", "int16x8"):
        for signature, batch in ((fixed, "1"), (None, "unknown")):
            file = f"{preset}_{batch}.tflite"
            keras_frn.export_tflite(model, folder / file, preset, data, input_signature=signature)
            tasks.append({"runtime": "@litertjs/core", "preset": preset or "float32"})
            tasks[-1] |= {"batch": batch, "file": file}
    model.predict(data[:1], verbose=0)  # Keras' ONNX export asks for a call
    model.export(folder / "model.onnx", format="onnx", verbose=False)
    tasks.append({"runtime": "onnxruntime-web", "preset": "float32", "batch": "unknown"})
    tasks[-1]["file"] = "model.onnx"
    samples = data[:SAMPLES].reshape(SAMPLES, -1).tolist()
    for number, task in enumerate(tasks):
        task |= {"name": number, "shape": [1, *SHAPE], "samples": samples}
    return tasks


def in_browser(folder, chromium):
    """What the page says of each task."""
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modules", type=Path, required=True)
    parser.add_argument("--chromium", default="chromium")
    arguments = parser.parse_args()
    version = subprocess.run([arguments.chromium, "--version"], capture_output=True, text=True)
    model = make_model()
    data = np.random.default_rng(1).normal(size=(100, *SHAPE)).astype("float32")
    expected = keras.ops.convert_to_numpy(model(data[:SAMPLES], training=False))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tasks = write_files(model, folder, data)
        (folder / "page.html").write_text(PAGE)
        (folder / "tasks.json").write_text(json.dumps(tasks))
        (folder / "modules").symlink_to(arguments.modules.resolve())
        results = in_browser(folder, arguments.chromium)
    rows = []
    for task, result in zip(tasks, results, strict=True):
        package = arguments.modules / task["runtime"] / "package.json"
        row = {key: task[key] for key in ("runtime", "preset", "batch")}
        row["version"] = json.loads(package.read_text())["version"]
        row["error"] = row["refused"] = ""
        if "outputs" in result:
            error = np.abs(np.array(result["outputs"]) - expected).max()
            row["error"] = f"{error:.2g}"
        else:
            row["refused"] = result["error"].splitlines()[0][:160]
        row["range"] = float(np.ptp(expected))
        row["browser"] = version.stdout.strip()
        rows.append(row)
        print(*(f"{key}={row[key]}" for key in ("runtime", "preset", "batch", "error", "refused")))
    write(rows, RESULTS / "browser.csv")


if __name__ == "__main__":
    main()
