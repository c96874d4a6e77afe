"""The snippets of docs/weights-from-elsewhere.md, on files as each source writes them."""

import importlib
import importlib.util
import pickle
import re
import shutil
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import keras
import numpy as np
import pytest
from keras2_sources import build_resnet
from markdown_blocks import ROOT
from reference import frn_tlu

import keras_frn
from keras_frn import models

pytestmark = pytest.mark.once
PAGE = (ROOT / "docs" / "weights-from-elsewhere.md").read_text()
INTRODUCTION, *SECTIONS = re.split(r"^## ", PAGE, flags=re.MULTILINE)
SECTIONS = {section.partition("\n")[0]: section for section in SECTIONS}
# Of the largest output. float32 has 6e-8, and ResNet-20 some hundred roundings in a row.
TOLERANCE = 1e-5


def code_of(text):
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return block


def check(source, x, expected, *changes, **names):
    """The snippet gives what its source gives. With a change that the page warns of it does not."""
    limit = TOLERANCE * np.max(np.abs(expected))
    for old, new in (("", ""), *changes):
        code = code_of(SECTIONS[source])
        assert old in code
        scope = dict(names)
        exec(code_of(INTRODUCTION) + code.replace(old, new), scope)
        error = np.max(np.abs(scope["model"].predict(x.astype("float32"), verbose=0) - expected))
        assert error > 10 * limit if old else error <= limit, (old, error / limit)


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def x(rng):
    return rng.normal(size=(3, 16, 16, 3))


def test_each_section_is_tested_and_short():
    tests = Path(__file__).read_text()
    for source, section in SECTIONS.items():
        assert f'"{source}"' in tests
        lines = [line for line in code_of(section).splitlines() if line]
        assert len(lines) <= 10, source


def convolve(x, kernel):
    """A convolution 3 wide of stride 1 with "same" padding, in float64."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
    return np.einsum("nhwcij,ijco->nhwo", windows, kernel.astype("float64"))


def parameters(rng, *names, shape):
    return {
        name: (rng.normal(size=shape) * 0.3 + (name in ("gamma", "weight"))).astype("float32")
        for name in names
    }


# Networks of packages that have a wheel, which need JAX or PyTorch


@pytest.mark.each_backend
def test_bnn_hmc(rng):
    hk = pytest.importorskip("haiku", reason="pip install dm-haiku")
    jax = pytest.importorskip("jax")

    class Frn(hk.Module):
        def __init__(self):
            super().__init__(name="frn")

        def __call__(self, x):
            tau, beta, gamma = (
                hk.get_parameter(name, (1, 1, 1, x.shape[-1]), init=jax.numpy.zeros)
                for name in ("tau", "beta", "gamma")
            )
            nu2 = jax.numpy.mean(x * x, (1, 2), keepdims=True)
            return jax.numpy.maximum(gamma * x * jax.lax.rsqrt(nu2 + 1e-6) + beta, tau)

    def layer(x, filters, size=3, stride=1):
        return Frn()(hk.Conv2D(filters, size, stride, padding="SAME")(x))

    def network(x):
        x = jax.nn.silu(layer(x, 16))
        for filters in (16, 32, 64):
            for block in range(3):
                begins = filters > 16 and block == 0
                y = jax.nn.silu(layer(x, filters, 3, 1 + begins))
                y = layer(y, filters)
                if begins:
                    x = layer(x, filters, 1, 2)
                x = jax.nn.silu(x + y)
        return hk.Linear(10)(jax.numpy.mean(x, (1, 2)))

    x = rng.normal(size=(2, 32, 32, 3)).astype("float32")
    net = hk.without_apply_rng(hk.transform(network))
    params = {}
    for module, arrays in jax.eval_shape(net.init, jax.random.key(0), x).items():
        params[module] = {}
        for name, array in arrays.items():
            value = rng.normal(size=array.shape) * (2 / max(1, np.prod(array.shape[:-1]))) ** 0.5
            params[module][name] = value.astype("float32")
    Path("model_step_0.pt").write_bytes(pickle.dumps({"params": params}))
    expected = np.asarray(jax.jit(net.apply)(params, x))
    check("bnn_hmc", x, expected)


def test_resnet_cifar_has_the_layer_names_of_the_table():
    rows = re.findall(r"^ *\| (.*) \| (.*) \|$", models.resnet_cifar.__doc__, re.MULTILINE)
    numbers, names = zip(*rows[1:-1], strict=True)
    names = re.findall(r"`(\w+)`", ",".join(names))
    assert re.findall(r"_(\d+)", ",".join(numbers)) == [str(i) for i in range(1, 21)]
    found = [v.name[:-5] for v in models.resnet_cifar().layers if v.name.endswith("_conv")]
    assert names == sorted(found, key=lambda name: (name != "stem", name))  # as the snippet


def import_alone(module, monkeypatch):
    """A module of a package, without what the package itself imports: data sets, training."""
    for package in accumulate(module.split(".")[:-1], "{}.{}".format):
        spec = importlib.util.find_spec(package)
        if spec is None:
            pytest.skip(f"pip install --no-deps {package.replace('_', '-')}")
        monkeypatch.setitem(sys.modules, package, importlib.util.module_from_spec(spec))
    return importlib.import_module(module)


def save_torch(norm, stride, rng, x):
    """Saves a network of PyTorch, and returns its outputs, channels last, in float64."""
    torch = pytest.importorskip("torch")
    conv = torch.nn.Conv2d(3, 8, 3, stride, padding=1, bias=False)
    net = torch.nn.ModuleDict({"conv": conv, "frn": norm})
    with torch.no_grad():
        conv.weight *= 0.05  # a mean square of 1e-3, where epsilon counts
        for parameter in norm.parameters():
            parameter += torch.tensor(0.1 * rng.normal(size=parameter.shape))
    torch.save(net.state_dict(), "net.pt")
    net.double()
    y = norm(conv(torch.tensor(x.transpose(0, 3, 1, 2))))
    return y.detach().numpy().transpose(0, 2, 3, 1)


@pytest.mark.each_backend
def test_timm(rng, x, monkeypatch):
    timm = import_alone("timm.layers.filter_response_norm", monkeypatch)
    expected = save_torch(timm.FilterResponseNormTlu2d(8), 2, rng, x)
    changes = [
        ("epsilon=1e-5", ""),
        ("padding, conv", "keras.layers.ZeroPadding2D(((0, 1), (0, 1))), conv"),
    ]
    check("timm", x, expected, *changes)


@pytest.mark.each_backend
def test_torch_uncertainty(rng, x, monkeypatch):
    module = import_alone("torch_uncertainty.layers.filter_response_norm", monkeypatch)
    expected = save_torch(module.FilterResponseNorm2d(8), 1, rng, x)
    check("torch-uncertainty", x, expected)


# Twins of the formula


@pytest.mark.each_backend
def test_tattaka(rng, x):
    torch = pytest.importorskip("torch")
    kernel = rng.normal(size=(3, 3, 3, 8)).astype("float32")
    p = parameters(rng, "gamma", "beta", "eps", "tau", shape=8)
    p["eps"] *= 0.01  # of both signs
    state = {f"frn.{name}": array.reshape(1, 8, 1, 1) for name, array in p.items()}
    state["conv.weight"] = kernel.transpose(3, 2, 0, 1).copy()
    torch.save({name: torch.tensor(array) for name, array in state.items()}, "net.pt")
    columns = convolve(x, kernel).transpose(0, 2, 1, 3).reshape(-1, 16, 8)
    y = frn_tlu(columns, p["gamma"], p["beta"], p["tau"], epsilon=1e-6 + np.abs(p["eps"]))
    expected = y.reshape(3, 16, 16, 8).transpose(0, 2, 1, 3)
    check("tattaka", x, expected, ("conv, *columns", "conv, frn"))


def test_xseg(rng, x):
    p = parameters(rng, "frn/weight", "frn/bias", "frn/eps", "tlu/tau", "conv/bias", shape=32)
    p["frn/eps"] = np.array([-1e-4], "float32")
    p["conv/weight"] = (0.003 * rng.normal(size=(3, 3, 3, 32))).astype("float32")
    p["conv/bias"] *= 0.01
    arrays = {f"conv01/{name}:0": array for name, array in p.items()}
    Path("XSeg_256.npy").write_bytes(pickle.dumps(arrays, 4))
    y = convolve(x, p["conv/weight"]) + p["conv/bias"]
    expected = frn_tlu(y, p["frn/weight"], p["frn/bias"], p["tlu/tau"], epsilon=1e-4)
    check("XSeg", x, expected, ("epsilon=0, ", ""))


@pytest.fixture(scope="module")
def keras2(tmp_path_factory):
    pytest.importorskip("tf_keras", reason="of the [test] extra")
    folder = tmp_path_factory.mktemp("keras2")
    script = Path(__file__).with_name("keras2_sources.py")
    subprocess.run([sys.executable, script], cwd=folder, check=True, capture_output=True)
    return folder


def test_cold_posterior_bnn(keras2):
    shutil.copy(keras2 / "weights_0.npz", ".")
    io = np.load(keras2 / "io.npz")

    def build_resnet_v1():
        frn, tlu = keras_frn.FilterResponseNormalizationTLU, keras_frn.TLU
        return build_resnet(keras.layers, keras.Model, frn, tlu)

    reverse = ("reversed(own)", "own")
    check("cold_posterior_bnn", io["x"], io["y"], reverse, build_resnet_v1=build_resnet_v1)


@pytest.mark.filterwarnings("ignore:`path` has arrays of FRN layers that are not those of Addons")
def test_pytoolkit(keras2, x):
    shutil.copy(keras2 / "pytoolkit.h5", "old.h5")
    kernel, gamma, beta, tau, *last = np.load(keras2 / "pytoolkit.npz").values()
    y = frn_tlu(frn_tlu(convolve(x, kernel), gamma, beta, tau), *last)
    check("pytoolkit", x, y)


@pytest.mark.filterwarnings("ignore:`path` has arrays of FRN layers that are not those of Addons")
def test_philipperemy(keras2, x):
    shutil.copy(keras2 / "philipperemy.h5", "old.h5")
    kernel, tau, gamma, beta = np.load(keras2 / "philipperemy.npz").values()
    y = frn_tlu(convolve(x, kernel), gamma, beta, tau)
    check("philipperemy", x, y)
