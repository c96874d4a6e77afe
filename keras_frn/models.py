"""Reference networks with FRN and TLU in place of a normalization and an activation."""

from collections.abc import Callable, Sequence
from typing import Any

import keras

from .layers import TLU, FilterResponseNormalization, FilterResponseNormalizationTLU
from .typing import Constraint, LearnedEpsilon, Tensor, is_int

__all__ = ["resnet", "resnet_cifar"]

# Whatever `keras.config.image_data_format()` says: FRN is over the last axis here.
_CHANNELS_LAST = {"data_format": "channels_last"}
_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


def resnet(
    input_shape: Sequence[int | None] = (224, 224, 3),
    classes: int = 1000,
    depth: int = 50,
    width: int = 64,
    *,
    learned_epsilon: LearnedEpsilon = False,
    kernel_constraint: Constraint = None,
) -> keras.Model:
    """Pre-activation residual network with FRN and TLU, for signals, images and volumes.

    ```
    x = x + conv(frn_tlu(conv(frn_tlu(conv(frn_tlu(x))))))      bottleneck block, sizes 1, 3, 1
    ```

    The network of the paper's ImageNet experiments, ResNetV2-50, with FRN and TLU in place of
    BatchNormalization and ReLU: a convolution of size 7 and max pooling of size 3, both with stride
    2, four stages, FRN and TLU, global average pooling, logits. Convolutions have no bias.
    Projections take the output of the block's first FRN and TLU. Depths 18 and 34 have two
    convolutions of size 3 per block; the others have bottlenecks. The network is channels-last,
    whatever `keras.config` says.

    Args:
        input_shape: Tuple `(*spatial, channels)`, with one, two or three spatial sizes, None if
            unknown. Defaults to (224, 224, 3).
        classes: Int, the number of logits. Defaults to 1000.
        depth: Int, the number of layers with weights: 18, 34, 50, 101 or 152. Defaults to 50.
        width: Int, the number of channels of the first stage. Defaults to 64.
        learned_epsilon: As in `FilterResponseNormalization`. Use True if the last maps, 1/32 of
            the input, have one position. Defaults to False.
        kernel_constraint: For the convolutions, not for the logits:
            `keras_frn.constraints.ZeroMean()` helps at small batches. Defaults to None.

    Returns:
        A `keras.Model` from `(batch, *input_shape)` to the logits, `(batch, classes)`.

    Raises:
        ValueError: if an argument is out of its range.

    Example:

    ```python
    model = keras_frn.models.resnet((100, 6), classes=4, depth=18, width=16)  # a 1D network
    ```

    Reference:
        He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016,
        https://arxiv.org/abs/1603.05027

        Singh & Krishnan, CVPR 2020, https://arxiv.org/abs/1911.09737
    """
    shape = _check_shape(input_shape, ranks=(1, 2, 3))
    _check_positive(classes=classes, width=width, depth=depth)
    if depth not in _BLOCKS:
        raise ValueError(
            f"`depth` must be one of {sorted(_BLOCKS)}. Received: depth={depth}. 18 is the "
            "smallest."
        )
    rank = len(shape) - 1
    names = ("Conv", "MaxPooling", "GlobalAveragePooling")
    conv_layer, pool_layer, mean_layer = (getattr(keras.layers, f"{n}{rank}D") for n in names)
    options = {"padding": "same", "use_bias": False, "kernel_initializer": "he_normal"}
    options |= {"kernel_constraint": kernel_constraint, **_CHANNELS_LAST}

    def conv(x: Tensor, filters: int, size: int, strides: int, name: str) -> Tensor:
        return conv_layer(filters, size, strides, name=name, **options)(x)

    def frn_tlu(x: Tensor, name: str) -> Tensor:
        return FilterResponseNormalizationTLU(learned_epsilon=learned_epsilon, name=name)(x)

    inputs = keras.Input(shape)
    x = conv(inputs, width, 7, 2, "stem_conv")
    x = pool_layer(3, 2, padding="same", name="stem_pool", **_CHANNELS_LAST)(x)
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
    x = mean_layer(name="mean", **_CHANNELS_LAST)(frn_tlu(x, "last_frn"))
    logits = keras.layers.Dense(classes, name="logits")(x)
    return keras.Model(inputs, logits, name=f"resnet{depth}_frn")


def resnet_cifar(
    input_shape: Sequence[int | None] = (32, 32, 3),
    classes: int = 10,
    depth: int = 20,
    width: int = 16,
    *,
    activation: str | Callable[[Tensor], Tensor] = "swish",
    kernel_constraint: Constraint = None,
) -> keras.Model:
    """ResNet-20-FRN of the Bayesian deep learning literature.

    ```
    x = act(x + frn(conv(act(frn(conv(x))))))              the block; frn is FRN followed by TLU
    ```

    Three stages of `(depth - 2) / 6` blocks with 16, 32 and 64 channels, convolutions with bias, a
    projection at the start of a stage, global average pooling, logits. As in its source, a TLU
    follows every FRN, and then `activation`. With `activation="tlu"` there is no other activation,
    and the last TLU of a block comes after the addition: FRN and TLU in place of
    BatchNormalization and ReLU. 274,042 parameters at the defaults. The network is channels-last,
    whatever `keras.config` says.

    The default is the network `resnet20_frn_swish` of bnn_hmc, and `activation="relu"` its
    `resnet20_frn`. haiku numbers the layers; here, each number is a pair NAME_conv and NAME_frn:

    | `conv2_d`, `frn` | NAME |
    |---|---|
    | without a number | `stem` |
    | `_1`, `_2` | `stage1_block1_1`, `stage1_block1_2` |
    | `_3`, `_4` | `stage1_block2_1`, `stage1_block2_2` |
    | `_5`, `_6` | `stage1_block3_1`, `stage1_block3_2` |
    | `_7`, `_8`, `_9` | `stage2_block1_1`, `stage2_block1_2`, `stage2_block1_projection` |
    | `_10`, `_11` | `stage2_block2_1`, `stage2_block2_2` |
    | `_12`, `_13` | `stage2_block3_1`, `stage2_block3_2` |
    | `_14`, `_15`, `_16` | `stage3_block1_1`, `stage3_block1_2`, `stage3_block1_projection` |
    | `_17`, `_18` | `stage3_block2_1`, `stage3_block2_2` |
    | `_19`, `_20` | `stage3_block3_1`, `stage3_block3_2` |
    | `linear` | `logits`, a layer of this name |

    Args:
        input_shape: Tuple `(height, width, channels)`, None if a size is unknown. Defaults to
            (32, 32, 3).
        classes: Int, the number of logits. Defaults to 10.
        depth: Int, the number of layers with weights: 6 n + 2. Defaults to 20.
        width: Int, the number of channels of the first stage. Defaults to 16.
        activation: `"tlu"`, or any activation that `keras.layers.Activation` takes. Defaults to
            `"swish"`.
        kernel_constraint: As in `resnet`. Defaults to None.

    Returns:
        A `keras.Model` from `(batch, *input_shape)` to the logits, `(batch, classes)`.

    Raises:
        ValueError: if an argument is out of its range.

    Example:

    ```python
    model = keras_frn.models.resnet_cifar()
    ```

    Reference:
        Izmailov et al., "What Are Bayesian Neural Network Posteriors Really Like?", ICML 2021,
        https://arxiv.org/abs/2104.14421
    """
    shape = _check_shape(input_shape, ranks=(2,))
    _check_positive(classes=classes, width=width, depth=depth)
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(
            f"`depth` must be 6 n + 2. Received: depth={depth}. Common depths are 20, 32, 44 and "
            "56."
        )
    only_tlu = activation == "tlu"
    if not only_tlu:
        try:
            activation = keras.activations.get(activation)
        except (TypeError, ValueError) as error:
            raise ValueError(
                '`activation` must be "tlu" or an activation of Keras. Received: '
                f'activation={activation!r}. The source uses "swish".'
            ) from error

    def layer(
        x: Tensor, filters: int, size: int, strides: int, name: str, branch_end: bool = False
    ) -> Tensor:
        x = keras.layers.Conv2D(
            filters,
            size,
            strides,
            "same",
            **_CHANNELS_LAST,
            kernel_initializer="he_normal",
            kernel_constraint=kernel_constraint,
            name=f"{name}_conv",
        )(x)
        if only_tlu and branch_end:
            return FilterResponseNormalization(name=f"{name}_frn")(x)
        x = FilterResponseNormalizationTLU(name=f"{name}_frn")(x)
        return x if only_tlu or branch_end else act(x, name)

    def act(x: Tensor, name: str) -> Tensor:
        if only_tlu:
            return TLU(name=f"{name}_tlu")(x)
        return keras.layers.Activation(activation, name=f"{name}_act")(x)

    inputs = keras.Input(shape)
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
    x = keras.layers.GlobalAveragePooling2D(name="mean", **_CHANNELS_LAST)(x)
    logits = keras.layers.Dense(classes, kernel_initializer="he_normal", name="logits")(x)
    return keras.Model(inputs, logits, name=f"resnet{depth}_frn_{'tlu' if only_tlu else 'act'}")


def _check_shape(shape: Any, ranks: tuple[int, ...]) -> tuple[int | None, ...]:
    """A shape as a tuple, of so many spatial sizes and a number of channels."""
    sizes = shape if isinstance(shape, (list, tuple)) else ()
    *spatial, channels = sizes or (None,)
    are_sizes = all(size is None or _is_positive(size) for size in spatial)
    if len(spatial) not in ranks or not are_sizes or not _is_positive(channels):
        numbers_of = " to ".join(map(str, sorted({min(ranks), max(ranks)})))
        raise ValueError(
            f"`input_shape` must be a tuple of {numbers_of} spatial sizes, None if unknown, and "
            f"the number of channels. Received: input_shape={shape!r}. A color image of 32 by 32 "
            "is (32, 32, 3)."
        )
    return tuple(sizes)


def _check_positive(**arguments: Any) -> None:
    for name, value in arguments.items():
        if not _is_positive(value):
            raise ValueError(
                f"`{name}` must be an int of 1 or more. Received: {name}={value!r}. Pass a "
                "positive int."
            )


def _is_positive(value: Any) -> bool:
    return is_int(value) and value >= 1
