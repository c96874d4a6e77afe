"""Run by test_addons_subclasses.py: saves subclassed models of Keras 2 into the current folder."""

import os

os.environ["TF_USE_LEGACY_KERAS"] = "1"

import numpy as np
import tensorflow as tf
import tf_keras
from tf_keras import layers


class FilterResponseNormalization(layers.Layer):
    """The formula and the weights of the layer of TensorFlow Addons."""

    def __init__(self, learned_epsilon=False, **options):
        super().__init__(**options)
        self.use_learned_epsilon = learned_epsilon

    def build(self, shape):
        ends, shape = tf_keras.initializers.RandomUniform(0.5, 1.5), (1, 1, 1, shape[-1])
        if self.use_learned_epsilon:
            self.learned_epsilon = self.add_weight("learned_epsilon", (1,), initializer=ends)
        self.gamma = self.add_weight("gamma", shape, initializer=ends)
        self.beta = self.add_weight("beta", shape, initializer=ends)

    def call(self, x):
        epsilon = 1e-6 + (tf.abs(self.learned_epsilon) if self.use_learned_epsilon else 0.0)
        nu2 = tf.reduce_mean(x * x, [1, 2], keepdims=True)
        return x * tf.math.rsqrt(nu2 + epsilon) * self.gamma + self.beta


class TLU(layers.Layer):
    def build(self, shape):
        self.tau = self.add_weight("tau", shape[1:], initializer="random_normal")

    def call(self, x):
        return tf.maximum(x, self.tau)


class Block(layers.Layer):
    def __init__(self, filters):
        super().__init__()
        self.conv = layers.Conv2D(filters, 3, padding="same")
        self.rest = [FilterResponseNormalization(), layers.ReLU(), TLU()]

    def call(self, x):
        x = self.conv(x)
        for layer in self.rest:
            x = layer(x)
        return x


class Net(tf_keras.Model):
    def __init__(self):
        super().__init__()
        self.stem = layers.Conv2D(4, 3)
        self.frn = FilterResponseNormalization(learned_epsilon=True)
        self.tlu = TLU()
        self.blocks = [Block(4), Block(6)]
        self.pool = layers.GlobalAveragePooling2D()
        self.tail = tf_keras.Sequential([layers.ReLU(), layers.Dense(5)])
        self.heads = {"a": layers.Dense(3), "b": layers.Dense(2)}

    def call(self, x):
        x = self.tlu(self.frn(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        x = self.tail(self.pool(x))
        return tf.concat([self.heads["a"](x), self.heads["b"](x)], -1)


class Flat(tf_keras.Model):
    def __init__(self):
        super().__init__()
        self.stem = layers.Conv2D(4, 3)
        self.frn = FilterResponseNormalization()
        self.tlu = TLU()

    def call(self, x):
        return self.tlu(self.frn(self.stem(x)))


class Gan(tf_keras.Model):
    def __init__(self, generator, critic):
        super().__init__()
        self.generator = generator
        self.nets = {"critic": critic}

    def call(self, x):
        return self.nets["critic"](self.generator(x))


class Both(tf_keras.Model):
    """A layer under two names, one in a private attribute, and two models."""

    def __init__(self):
        super().__init__()
        self.second = layers.Dense(4)
        self.all = []
        self.all += [layers.Dense(4), self.second]
        self._last = layers.Dense(4)
        self.generator = tf_keras.Sequential([layers.Input((4,)), layers.Dense(3)])
        self.discriminator = tf_keras.Sequential([layers.Input((3,)), layers.Dense(4)])

    def call(self, x):
        for layer in (*self.all, self._last, self.generator, self.discriminator):
            x = layer(x)
        return x


class Mixed(tf_keras.Model):
    """A weight of its own, numbered layers of which one is frozen, lists in tuples, vectors of a
    metric and of an optimizer."""

    def __init__(self):
        super().__init__()
        start = tf_keras.initializers.RandomUniform(0.5, 1.5)
        self.scale = self.add_weight("scale", (4,), initializer=start)
        norms = [
            layers.BatchNormalization(gamma_initializer=start, moving_variance_initializer=start)
            for _ in range(2)
        ]
        first, second = FilterResponseNormalization(), FilterResponseNormalization()
        inner = [layers.Conv2D(4, 3), first, norms[0], second, norms[1]]
        self.body = tf_keras.Sequential(inner)
        first.trainable = False
        self.pair = (layers.Dense(4), [layers.Dense(4), [layers.Dense(4)]])
        self.auc = tf_keras.metrics.AUC()

    def call(self, x):
        x = tf.reduce_mean(self.body(x) * self.scale, [1, 2])
        return self.pair[1][1][0](self.pair[1][0](self.pair[0](x)))


class Heads(tf_keras.Model):
    """Layers of equal shapes in a dict, whose keys are not in the order of the alphabet."""

    def __init__(self):
        super().__init__()
        self.heads = {"b": layers.Dense(3), "a": layers.Dense(3), "inner": {"d": layers.Dense(3)}}
        self._layers_after = [layers.Dense(3)]

    def call(self, x):
        a, b = self.heads["a"](x), self.heads["b"](x)
        return self._layers_after[0](self.heads["inner"]["d"](a - 2.0 * b))


class Lost(tf_keras.Model):
    """Two weights of one name, of which a checkpoint keeps one."""

    def __init__(self):
        super().__init__()
        self.w = self.add_weight("w", (3,), initializer="random_normal")
        self.b = self.add_weight("w", (3,), initializer="random_normal")

    def call(self, x):
        return x * self.w + self.b


tf_keras.utils.set_random_seed(0)
x = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype("float32")
net, other, flat = Net(), Net(), Flat()
for model in (net, other, flat):
    model(x)
net.compile("adam", "mse", run_eagerly=True)
net.train_on_batch(x, np.zeros((4, 5), "float32"))
net.save_weights("net/ckpt")
net.save_weights("net.h5")
net.save_weights("net.weights.h5")
net.save("net.keras")
net.save("saved_model")
flat.save_weights("flat/ckpt")
flat.save_weights("flat.h5")
flat.save_weights("flat.weights.h5")
flat.save("flat_saved_model")
critic = tf_keras.Sequential([tf_keras.Input((5,)), layers.Dense(1)])
parts = {"generator": net, "discriminator": critic, "optimizer": net.optimizer}
tf.train.Checkpoint(**parts).save("gan/ckpt")
tf.train.Checkpoint(model=net).write("model/ckpt")
averaged = tf.train.Checkpoint(model=net, ema=other, flat=flat)
tf.train.CheckpointManager(averaged, "manager", 3).save()
gan = Gan(net, critic)
gan(x)
gan.save_weights("gan.weights.h5")
tf.train.Checkpoint(gan=gan, gan_2=gan).write("deep/ckpt")
ema = tf.train.Checkpoint(generator=other)
tf.train.Checkpoint(trainer=tf.train.Checkpoint(gan=gan, ema=ema)).write("deeper/ckpt")
both = Both()
expected = both(x[:, 0, 0])
both.save_weights("both/ckpt")
both.save_weights("both.weights.h5")
both.save_weights("both.h5")
mixed = Mixed()
mixed(x)
mixed.d_optimizer = tf_keras.optimizers.Adam()
mixed.d_optimizer.build(mixed.trainable_variables)
for name in ("mixed/ckpt", "mixed.h5", "mixed.weights.h5"):
    mixed.save_weights(name)
heads, lost = Heads(), Lost()
others = {"heads": heads(x[:, 0, 0]), "lost": lost(x)}
for name in ("heads/ckpt", "heads.h5", "heads.weights.h5"):
    heads.save_weights(name)
lost.save_weights("lost/ckpt")


def branches(*names):
    """Two convolutions of one shape, which the names alone tell apart."""
    inputs = layers.Input((8, 8, 3))
    found = [layers.Conv2D(3, 3, name=name)(inputs) for name in names]
    return tf_keras.Model(inputs, layers.Subtract()(found))


two = branches("a", "b")
for name in ("two/ckpt", "two.h5"):
    two.save_weights(name)
# The layer that was made first, and so has the first number, comes last.
first, second = layers.Dense(8, name="dense"), layers.Dense(8, name="dense_1")
inputs = layers.Input((8,))
turned = tf_keras.Model(inputs, first(second(inputs)))
turned.save("turned.keras")
first._name, second._name = second.name, first.name
with open("turned.json", "w") as file:
    file.write(turned.to_json())
turned.save_weights("turned/ckpt")
np.savez(
    "io.npz",
    turned=turned(x[:, 0, :, 0]),
    **others,
    mixed=mixed(x),
    x=x,
    net=net(x),
    other=other(x),
    flat=flat(x),
    both=expected,
)
