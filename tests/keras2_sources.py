"""Run by test_weights_from_elsewhere.py: saves networks of Keras 2 into the current folder, with
layers that have the formula, the weights and the configs of those of other packages."""

import os

import numpy as np


def build_resnet(layers, model, frn, tlu):
    """Two residual blocks, the second with a projection, in Keras 2 or 3."""

    def conv_frn(x, filters, size=3, strides=1):
        return frn()(layers.Conv2D(filters, size, strides, padding="same")(x))

    inputs = x = layers.Input((8, 8, 3))
    for filters, strides in ((3, 1), (6, 2)):
        y = layers.ReLU()(conv_frn(x, filters, 3, strides))
        y = conv_frn(y, filters)
        if strides > 1:
            x = conv_frn(x, filters, 1, strides)
        x = tlu()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    return model(inputs, layers.Dense(2)(x))


def main():
    import tensorflow as tf
    import tf_keras
    from tf_keras import layers

    class Layer(layers.Layer):
        def add(self, names, shape):
            for name in names:
                ends = (0.5, 1.5) if name == "gamma" else (-0.5, 0.5)
                start = tf_keras.initializers.RandomUniform(*ends)
                setattr(self, name, self.add_weight(name, shape, initializer=start))

    def normalize(x, epsilon):
        return x * tf.math.rsqrt(tf.reduce_mean(x * x, [1, 2], keepdims=True) + epsilon)

    class Cold(Layer):
        def build(self, shape):
            self.add(("tau", "beta", "gamma"), (1, 1, 1, shape[-1]))

        def call(self, x):
            return tf.maximum(self.gamma * normalize(x, 1e-6) + self.beta, self.tau)

    class ColdTLU(Layer):
        def build(self, shape):
            self.add(["tau"], (1, 1, 1, shape[-1]))

        def call(self, x):
            return tf.maximum(x, self.tau)

    class FRN(Layer):
        def build(self, shape):
            self.add(("tau", "gamma", "beta"), shape[-1:])

        def call(self, x):
            return tf.maximum(self.gamma * normalize(x, 1e-6) + self.beta, self.tau)

        def get_config(self):
            starts = dict.fromkeys(["tau_initializer", "beta_initializer"], "zeros")
            return {**super().get_config(), "axis": -1, "epsilon": 1e-6, **starts}

    class FilterResponseNormalization(Layer):
        def __init__(self, activate=True, **options):
            super().__init__(**options)
            self.activate = activate

        def build(self, shape):
            self.add(("gamma", "beta", "tau") if self.activate else ("gamma", "beta"), shape[-1:])

        def call(self, x):
            x = self.gamma * normalize(x, 1e-6) + self.beta
            return tf.maximum(x, self.tau) if self.activate else x

        def get_config(self):
            options = {"center": True, "scale": True, "tau_initializer": "zeros"}
            return {**super().get_config(), "activate": self.activate, "epsilon": 1e-6, **options}

    class TLU(Layer):
        def build(self, shape):
            self.add(["tau"], shape[-1:])

        def call(self, x):
            return tf.maximum(x, self.tau)

    tf_keras.utils.set_random_seed(0)
    start = [layers.Input((16, 16, 3)), layers.Conv2D(4, 3, padding="same", use_bias=False)]
    toolkit = [FilterResponseNormalization(), FilterResponseNormalization(activate=False), TLU()]
    for name, found in (("philipperemy", [FRN()]), ("pytoolkit", toolkit)):
        model = tf_keras.Sequential([*start, *found])
        model.save(f"{name}.h5")
        np.savez(f"{name}.npz", *model.get_weights())
    tf_keras.mixed_precision.set_global_policy("float64")
    cold = build_resnet(layers, tf_keras.Model, Cold, ColdTLU)
    np.savez("weights_0.npz", **{f"weights_{i:050d}": w for i, w in enumerate(cold.get_weights())})
    x = np.random.default_rng(0).normal(size=(3, 8, 8, 3))
    np.savez("io.npz", x=x, y=cold(x))


if __name__ == "__main__":
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    main()
