"""Write models with TensorFlow Addons and what they compute: `python make.py FOLDER [name ...]`.

Needs an environment of its own, such as Python 3.11 with tensorflow==2.15.1 and
tensorflow-addons==0.23.0 (any TensorFlow from 2.8 to 2.15 with its Addons will do). Each model gets
a folder with every format that this TensorFlow writes, and `io.npz`: input, output, gradient of
sum(y**2) for the input, regularization loss and, for a compiled model, the next training step.
"""

import os
import shutil
import sys

import numpy as np
import tensorflow as tf
import tensorflow_addons as tfa

L = tf.keras.layers
FRN, TLU = tfa.layers.FilterResponseNormalization, tfa.layers.TLU
VERSION = tuple(int(v) for v in tf.__version__.split(".")[:2])


def block(name, channels, size=6):
    x = L.Input((size, size, channels), name=name + "_in")
    y = L.Conv2D(channels, 3, padding="same", name=name + "_conv")(x)
    y = L.BatchNormalization(name=name + "_bn")(y)
    y = FRN(learned_epsilon=True, name=name + "_frn")(y)
    return tf.keras.Model(x, TLU(name=name + "_tlu")(y), name=name)


def nested_frozen():
    """A submodel called twice, another partly frozen one, a frozen layer; Adam in mid-training."""
    x = L.Input((6, 6, 3), name="image")
    shared, second = block("shared", 3), block("second", 3)
    y = shared(shared(x))
    y = second(y)
    y = FRN(learned_epsilon=True, name="frozen_frn", trainable=False)(y)
    y = L.Conv2D(4, 1, name="frozen_conv", trainable=False)(y)
    y = L.GlobalAveragePooling2D()(y)
    model = tf.keras.Model(x, L.Dense(2, name="head")(y), name="nested_frozen")
    second.get_layer("second_bn").trainable = False
    second.get_layer("second_frn").trainable = False
    return model


def frozen_block():
    x = L.Input((5, 5, 3))
    inner = block("inner", 3, 5)
    inner.trainable = False
    y = L.Flatten()(inner(x))
    return tf.keras.Model(x, L.Dense(2)(y), name="frozen_block")


def operators():
    """What `x + y`, slices and functions of TensorFlow leave in a functional graph."""
    x = L.Input((4, 4, 3), name="x")
    y = FRN(learned_epsilon=True)(x)
    y = TLU()(y + x)
    z = tf.nn.relu(2.0 * y - 0.5) * y / 3.0 - x
    z = tf.concat([z, y, -x], axis=-1)
    z = tf.nn.sigmoid(z) + tf.nn.leaky_relu(z, 0.1) + tf.maximum(z, 0.2) + tf.nn.relu6(1.0 - z)
    z = tf.reduce_mean(z, axis=[1, 2], keepdims=True) * z
    z = z[:, 1:, ::2] + tf.square(z[:, :3, 1:3, :])
    z = tf.reshape(z, [-1, 54])
    return tf.keras.Model(x, L.Dense(2)(z[..., 3:]), name="operators")


def around():
    """Layers that Keras 3 reads differently."""
    x = L.Input((8, 8, 4), name="x")
    y = L.DepthwiseConv2D(3, padding="same")(x)
    y = L.BatchNormalization(axis=[3])(y)
    y = L.SeparableConv2D(6, 3)(y)
    y = FRN(epsilon=1e-3)(L.LeakyReLU(0.1)(y))
    y = TLU(affine=True)(L.Conv2DTranspose(5, 3)(y))
    y = L.ThresholdedReLU(0.05)(L.ELU(0.7)(L.PReLU(shared_axes=[1, 2])(y)))
    y = L.LayerNormalization(axis=[3])(y)
    y = L.TimeDistributed(L.Conv1D(4, 3, activation="hard_sigmoid"))(y)
    y = L.Reshape((8, 24))(y)
    a = L.Bidirectional(L.LSTM(3, return_sequences=True, recurrent_activation="hard_sigmoid"))(y)
    b = L.GRU(6, return_sequences=True, name="gru")(y)
    c = L.MultiHeadAttention(2, 3, name="mha")(a, b)
    y = TLU(name="tlu_sequence")(L.Concatenate()([a, b, c]))
    return tf.keras.Model(x, L.Dense(2)(L.Flatten()(y)), name="around")


def two_in_two_out():
    a, b = L.Input((4, 4, 2), name="a"), L.Input((4, 4, 2), name="b")
    y = FRN(name="frn")
    t = TLU(name="tlu")
    p, q = t(y(a)), t(y(b))
    out = {"sum": L.Dense(1, name="d1")(L.Flatten()(L.add([p, q]))), "p": L.GlobalMaxPool2D()(p)}
    return tf.keras.Model([b, a], [out["p"], out["sum"]], name="two_in_two_out")


def distributed():
    """A block with our layers applied to every frame of a clip, and a nested Sequential."""
    frame = tf.keras.Sequential(
        [L.Conv2D(4, 3, padding="same"), FRN(learned_epsilon=True), TLU(), L.GlobalAvgPool2D()],
        name="frame",
    )
    x = L.Input((3, 5, 5, 2), name="clip")
    y = L.LSTM(3)(L.TimeDistributed(frame, name="td")(x))
    return tf.keras.Model(x, L.Dense(2)(y), name="distributed")


def uniform_tau():
    return tf.keras.Sequential(
        [
            L.Input((4, 4, 3)),
            FRN(),
            TLU(name="uniform", affine=True),
            L.Conv2D(2, 3),
            TLU(name="varies"),
        ],
        name="uniform_tau",
    )


def regularized_tau():
    reg = tf.keras.regularizers
    return tf.keras.Sequential(
        [
            L.Input((4, 4, 3)),
            TLU(name="uniform_l2", tau_regularizer=reg.l2(0.1)),
            FRN(
                gamma_constraint=tf.keras.constraints.max_norm(0.7, axis=0),
                beta_constraint=tf.keras.constraints.unit_norm(axis=[1, 3]),
                gamma_regularizer=reg.l1(0.3),
            ),
            TLU(name="uniform_norm", tau_constraint=tf.keras.constraints.max_norm(0.7, axis=0)),
        ],
        name="regularized_tau",
    )


def shared_across():
    """Layers that are in two models inside."""
    conv = L.Conv2D(3, 3, padding="same", name="sc")
    frn, tlu = FRN(learned_epsilon=True, name="sf"), TLU(name="st")

    def inner(name):
        x = L.Input((5, 5, 3), name=name + "i")
        return tf.keras.Model(x, tlu(frn(conv(x))), name=name)

    x = L.Input((5, 5, 3), name="x")
    y = inner("b")(L.BatchNormalization()(inner("a")(x)))
    return tf.keras.Model(x, L.Dense(2, name="d")(L.Flatten()(y)), name="shared_across")


def states():
    x, h, c = L.Input((4, 3), name="x"), L.Input((5,), name="h"), L.Input((5,), name="c")
    y = L.LSTM(5, return_sequences=True)(x, initial_state=[h, c])
    y = L.Bidirectional(L.GRU(5))(TLU(affine=True)(y), initial_state=[h, c])
    return tf.keras.Model([x, h, c], L.Dense(2)(y), name="states")


def deferred():
    inner = tf.keras.Sequential([TLU(), L.Conv2D(2, 1)], name="in")
    model = tf.keras.Sequential(
        [L.Conv2D(3, 3), FRN(), inner, L.Flatten(), L.Dense(2)], name="deferred"
    )
    model.build((None, 5, 5, 2))
    return model


def small(name, size=4):
    return tf.keras.Sequential(
        [
            L.Input((size, size, 3)),
            L.Conv2D(4, 3, padding="same"),
            FRN(learned_epsilon=True, name="n0"),
            TLU(name="t0"),
            L.GlobalAveragePooling2D(),
            L.Dense(2),
        ],
        name=name,
    )


def half():
    tf.keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        x = L.Input((4, 4, 3))
        y = L.Conv2D(4, 3, padding="same")(x)
        y = TLU()(FRN(learned_epsilon=True, dtype="float32")(y))
        y = L.Dense(2, dtype="float32")(L.GlobalAveragePooling2D()(y))
        return tf.keras.Model(x, y, name="half")
    finally:
        tf.keras.mixed_precision.set_global_policy("float32")


KERAS_OPTIMIZERS = tf.keras.optimizers
OLD = getattr(KERAS_OPTIMIZERS, "legacy", KERAS_OPTIMIZERS)
NEW = (
    KERAS_OPTIMIZERS
    if VERSION >= (2, 11)
    else KERAS_OPTIMIZERS.experimental
    if VERSION >= (2, 9)
    else None
)
OPTIMIZERS = {
    "old_sgd": lambda: OLD.SGD(0.05, momentum=0.9, nesterov=True, decay=0.1),
    "old_adam": lambda: OLD.Adam(0.01, amsgrad=True),
    "old_rmsprop": lambda: OLD.RMSprop(0.01, momentum=0.5, centered=True),
    "old_adagrad": lambda: OLD.Adagrad(0.01),
    "old_adadelta": lambda: OLD.Adadelta(0.1),
    "old_adamax": lambda: OLD.Adamax(0.01),
    "old_ftrl": lambda: OLD.Ftrl(0.01),
    "old_nadam": lambda: OLD.Nadam(0.01),
    "addons_lamb": lambda: tfa.optimizers.LAMB(0.01),
}
if NEW:
    OPTIMIZERS.update(
        sgd=lambda: NEW.SGD(0.05, clipnorm=0.5),
        adam=lambda: NEW.Adam(
            KERAS_OPTIMIZERS.schedules.ExponentialDecay(0.01, 2, 0.5),
            amsgrad=True,
            use_ema=True,
            ema_momentum=0.9,
        ),
        adamw=lambda: NEW.AdamW(0.01, weight_decay=0.1),
        rmsprop=lambda: NEW.RMSprop(0.01, momentum=0.5, centered=True),
        adagrad=lambda: NEW.Adagrad(0.01),
        adadelta=lambda: NEW.Adadelta(0.1),
        adamax=lambda: NEW.Adamax(0.01),
        nadam=lambda: NEW.Nadam(0.01),
        ftrl=lambda: NEW.Ftrl(0.01),
    )
if VERSION >= (2, 13):
    OPTIMIZERS.update(lion=lambda: NEW.Lion(0.01), adafactor=lambda: NEW.Adafactor(0.01))

MODELS = {
    f.__name__: f
    for f in (
        nested_frozen, frozen_block, operators, around, two_in_two_out, distributed, uniform_tau,
        regularized_tau, shared_across, states, deferred, half,
    )
}  # fmt: skip


def randomize(model, rng):
    for w in model.weights:
        value = rng.normal(0.0, 0.5, w.shape)
        if "variance" in w.name:
            value = abs(value) + 0.5
        elif "gamma" in w.name:
            value = value + 1.0
        elif "kernel" in w.name:
            value = value * 0.7
        w.assign(value.astype(w.dtype.as_numpy_dtype))
    for layer in model.layers:
        if layer.name.startswith("uniform"):
            for w in layer.weights:
                w.assign(np.broadcast_to(w.numpy()[0, 0], w.shape))


def write(model, folder):
    os.makedirs(folder)
    at = lambda name: os.path.join(folder, name)  # noqa: E731

    def attempt(name, save):
        try:
            save(at(name))
        except (RuntimeError, TypeError, ValueError) as error:  # two weights of one name
            print(f"  {name}: {str(error)[:100]}")
            if os.path.isfile(at(name)):
                os.remove(at(name))

    attempt("model.h5", lambda p: model.save(p, save_format="h5"))
    attempt("legacy_weights.h5", lambda p: model.save_weights(p, save_format="h5"))
    if VERSION >= (2, 12):
        v3 = "keras" if VERSION >= (2, 13) else "keras_v3"
        attempt("model.keras", lambda p: model.save(p, save_format=v3))
        attempt("v3.weights.h5", lambda p: model.save_weights(p))
    model.save(at("saved_model/saved_model"), save_format="tf")
    shutil.make_archive(at("saved_model"), "zip", at("saved_model"))
    shutil.rmtree(at("saved_model"))
    model.save_weights(at("ckpt/ckpt"), save_format="tf")
    with open(at("model.json"), "w") as f:
        f.write(model.to_json())


def make(name, root):
    tf.keras.backend.clear_session()
    tf.keras.utils.set_random_seed(1)
    rng = np.random.default_rng(5)
    optimizer = None
    if name in MODELS:
        model = MODELS[name]()
        if name in ("nested_frozen", "half"):
            optimizer = tf.keras.optimizers.Adam(0.01)
    else:
        model = small(name)
        optimizer = OPTIMIZERS[name]()
    randomize(model, rng)
    io = {}
    xs = [rng.normal(0.0, 1.0, (4, *i.shape[1:])).astype("float32") for i in model.inputs]
    if optimizer is not None:
        metrics = ["accuracy", tf.keras.metrics.MeanAbsoluteError(name="mae")]
        model.compile(optimizer, tf.keras.losses.MeanSquaredError(), metrics=metrics)
        io["yb"] = rng.normal(0.0, 1.0, (4, *model.output_shape[1:])).astype("float32")
        for _ in range(3):
            model.train_on_batch(xs[0], io["yb"])
    inputs = [tf.constant(x) for x in xs]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        ys = tf.nest.flatten(model(inputs if len(inputs) > 1 else inputs[0]))
        total = tf.add_n([tf.reduce_sum(tf.cast(y, "float32") ** 2) for y in ys])
    for i, (x, g) in enumerate(zip(xs, tape.gradient(total, inputs))):
        io[f"x{i}"], io[f"gx{i}"] = x, np.zeros_like(x) if g is None else g.numpy()
    io.update({f"y{i}": y.numpy() for i, y in enumerate(ys)})
    io["reg_loss"] = np.float64(sum(float(v) for v in model.losses))
    io["trainable"] = np.int64(sum(int(np.prod(w.shape)) for w in model.trainable_weights))
    io["names"] = np.array([layer.name for layer in model.layers])
    write(model, os.path.join(root, name))
    if optimizer is not None:
        io["loss_next"] = np.float64(
            model.train_on_batch(xs[0], io["yb"], return_dict=True)["loss"]
        )
        io["y_next"] = model(inputs[0]).numpy()
    np.savez_compressed(os.path.join(root, name, "io.npz"), **io)


if __name__ == "__main__":
    for chosen in sys.argv[2:] or [*MODELS, *OPTIMIZERS]:
        print(chosen, flush=True)
        make(chosen, sys.argv[1])
