"""Reference networks with FRN and TLU where the sources have a normalization and an activation."""

import numbers

import keras

from .layers import TLU, FilterResponseNormalization, FilterResponseNormalizationTLU

_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


def resnet(
    input_shape=(224, 224, 3),
    classes=1000,
    depth=50,
    width=64,
    learned_epsilon=False,
    kernel_constraint=None,
):
    """Pre-activation residual network with FRN and TLU, for signals, images and volumes.

    ```
    x = x + conv(frn_tlu(conv(frn_tlu(conv(frn_tlu(x))))))      the bottleneck block: 1, 3, 1 wide
    ```

    The network of the paper's ImageNet experiments, ResNetV2-50, with FRN and TLU in place of
    BatchNormalization and ReLU: a 7 wide convolution and a 3 wide maximum of stride 2, four stages,
    FRN and TLU, the mean over all positions, logits. Convolutions have no bias. A projection reads
    what the block's first FRN and TLU give. 18 and 34 have two 3 wide convolutions in a block, the
    others are bottlenecks.

    Shape: input `(batch, *input_shape)`, channels last; output `(batch, classes)`, logits.

    Args:
        input_shape: Tuple `(*spatial, channels)`, with one, two or three spatial sizes, None where
            unknown. Defaults to (224, 224, 3).
        classes: Int, the number of logits. Defaults to 1000.
        depth: Int, the number of layers with weights: 18, 34, 50, 101 or 152. Defaults to 50.
        width: Int, the number of channels of the first stage. Defaults to 64.
        learned_epsilon: As in `FilterResponseNormalization`. Use True where the last maps, 1/32 of
            the input, have one position. Defaults to False.
        kernel_constraint: For the convolutions, not for the logits:
            `keras_frn.constraints.ZeroMean()` helps at small batches. Defaults to None.

    Raises:
        ValueError: if the shape, the depth or another number is none of these.

    Example:

    >>> model = keras_frn.models.resnet((100, 6), classes=4, depth=18, width=16)  # a 1D network

    Reference: He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016,
    https://arxiv.org/abs/1603.05027; Singh & Krishnan, CVPR 2020,
    https://arxiv.org/abs/1911.09737."""
    input_shape = tuple(input_shape)
    rank = len(input_shape) - 1
    if rank not in (1, 2, 3) or input_shape[-1] is None:
        raise ValueError(
            "`input_shape` must be one to three spatial sizes and the number of channels. "
            f"Received: input_shape={input_shape}. A series of 100 steps with 6 channels is "
            "(100, 6)."
        )
    if depth not in _BLOCKS:
        raise ValueError(
            f"`depth` must be one of {sorted(_BLOCKS)}. Received: depth={depth}. 18 is the "
            "smallest."
        )
    _check_positive(classes=classes, width=width)
    names = ("Conv", "MaxPooling", "GlobalAveragePooling")
    conv_layer, pool_layer, mean_layer = (getattr(keras.layers, f"{n}{rank}D") for n in names)
    options = {"padding": "same", "use_bias": False, "kernel_initializer": "he_normal"}
    options["kernel_constraint"] = kernel_constraint

    def conv(x, filters, size, strides, name):
        return conv_layer(filters, size, strides, name=name, **options)(x)

    def frn_tlu(x, name):
        return FilterResponseNormalizationTLU(learned_epsilon=learned_epsilon, name=name)(x)

    inputs = keras.Input(input_shape)
    x = conv(inputs, width, 7, 2, "stem_conv")
    x = pool_layer(3, 2, padding="same", name="stem_pool")(x)
    for stage, blocks in enumerate(_BLOCKS[depth]):
        filters = width * 2**stage
        for block in range(blocks):
            name = f"stage{stage + 1}_block{block + 1}"
            strides = 2 if stage > 0 and block == 0 else 1
            convs = [(filters, 3), (filters, 3)]
            if depth >= 50:
                convs = [(filters, 1), (filters, 3), (4 * filters, 1)]
            y = frn_tlu(x, f"{name}_frn1")
            out = convs[-1][0]
            if strides > 1 or x.shape[-1] != out:
                x = conv(y, out, 1, strides, f"{name}_projection")
            for number, (channels, size) in enumerate(convs, 1):
                y = y if number == 1 else frn_tlu(y, f"{name}_frn{number}")
                step = strides if number == len(convs) - 1 else 1
                y = conv(y, channels, size, step, f"{name}_conv{number}")
            x = keras.layers.Add(name=f"{name}_add")([x, y])
    x = mean_layer(name="mean")(frn_tlu(x, "last_frn"))
    logits = keras.layers.Dense(classes, name="logits")(x)
    return keras.Model(inputs, logits, name=f"resnet{depth}_frn")


def resnet_cifar(
    input_shape=(32, 32, 3),
    classes=10,
    depth=20,
    width=16,
    activation="swish",
    kernel_constraint=None,
):
    """ResNet-20-FRN of the Bayesian deep learning literature.

    ```
    x = act(x + frn(conv(act(frn(conv(x))))))              the block; frn is FRN followed by TLU
    ```

    Three stages of `(depth - 2) / 6` blocks with 16, 32 and 64 channels, convolutions with bias, a
    projection where a stage begins, the mean over all positions, logits. As in its source, every
    FRN has its TLU, and `activation` follows. With `activation="tlu"` nothing follows, no TLU
    stands in front of the addition, and a TLU stands behind it: FRN and TLU in place of
    BatchNormalization and ReLU. 274,042 parameters at the defaults.

    Shape: input `(batch, *input_shape)`, channels last; output `(batch, classes)`, logits.

    Args:
        input_shape: Tuple `(height, width, channels)`. Defaults to (32, 32, 3).
        classes: Int, the number of logits. Defaults to 10.
        depth: Int, the number of layers with weights: 6 n + 2. Defaults to 20.
        width: Int, the number of channels of the first stage. Defaults to 16.
        activation: `"tlu"`, or any activation that `keras.layers.Activation` takes. Defaults to
            `"swish"`.
        kernel_constraint: As in `resnet`. Defaults to None.

    Raises:
        ValueError: if the depth is not 6 n + 2, or another number is not a positive int.

    Example:

    >>> model = keras_frn.models.resnet_cifar()

    Reference: Izmailov et al., "What Are Bayesian Neural Network Posteriors Really Like?", ICML
    2021, https://arxiv.org/abs/2104.14421."""
    _check_positive(classes=classes, width=width, depth=depth)
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(
            f"`depth` must be 6 n + 2. Received: depth={depth}. Common depths are 20, 32, 44 and "
            "56."
        )
    only_tlu = activation == "tlu"

    def layer(x, filters, size, strides, name, branch_end=False):
        x = keras.layers.Conv2D(
            filters,
            size,
            strides,
            "same",
            kernel_initializer="he_normal",
            kernel_constraint=kernel_constraint,
            name=f"{name}_conv",
        )(x)
        if only_tlu and branch_end:
            return FilterResponseNormalization(name=f"{name}_frn")(x)
        x = FilterResponseNormalizationTLU(name=f"{name}_frn")(x)
        return x if only_tlu or branch_end else act(x, name)

    def act(x, name):
        if only_tlu:
            return TLU(name=f"{name}_tlu")(x)
        return keras.layers.Activation(activation, name=f"{name}_act")(x)

    inputs = keras.Input(tuple(input_shape))
    x = layer(inputs, width, 3, 1, "stem")
    for stage in range(3):
        filters = width * 2**stage
        for block in range((depth - 2) // 6):
            name = f"stage{stage + 1}_block{block + 1}"
            begins = stage > 0 and block == 0
            y = layer(x, filters, 3, 2 if begins else 1, f"{name}_1")
            y = layer(y, filters, 3, 1, f"{name}_2", branch_end=True)
            if begins:
                x = layer(x, filters, 1, 2, f"{name}_projection", branch_end=True)
            x = act(keras.layers.Add(name=f"{name}_add")([x, y]), name)
    x = keras.layers.GlobalAveragePooling2D(name="mean")(x)
    logits = keras.layers.Dense(classes, kernel_initializer="he_normal", name="logits")(x)
    return keras.Model(inputs, logits, name=f"resnet{depth}_frn_{'tlu' if only_tlu else 'act'}")


def _check_positive(**arguments):
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
            raise ValueError(
                f"`{name}` must be an int of 1 or more. Received: {name}={value!r}. Pass a "
                "positive int."
            )
