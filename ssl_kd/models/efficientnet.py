"""EfficientNet (arXiv 1905.11946) and EfficientNet-Lite, tables for `MobileNet`, as in timm.

The flavours differ in what their weights were trained with: timm's own pad as torch does and have batch norm's usual
epsilon; TensorFlow's ("tf_") pad 'SAME' and have 1e-3.
"""

import math
from dataclasses import replace
from functools import partial

import flax.linen as nn

from ssl_kd.models.mobilenet import Architecture, MobileNet, Row, Squeeze

_B0 = Architecture(
    stem=32,
    stages=(
        (Row(1, 3, 1, 1, 16, squeeze=True),),
        (Row(2, 3, 2, 6, 24, squeeze=True),),
        (Row(2, 5, 2, 6, 40, squeeze=True),),
        (Row(3, 3, 2, 6, 80, squeeze=True),),
        (Row(3, 5, 1, 6, 112, squeeze=True),),
        (Row(4, 5, 2, 6, 192, squeeze=True),),
        (Row(1, 3, 1, 6, 320, squeeze=True),),
    ),
    head=1280,
    activation=nn.silu,
    squeeze=Squeeze(lambda given, inside: round(given / 4), nn.silu, nn.sigmoid),
)


# Depth 1.1: every number of blocks, rounded up.
_B1 = replace(
    _B0, stages=tuple(tuple(replace(r, repeats=math.ceil(1.1 * r.repeats)) for r in rows) for rows in _B0.stages)
)
_LITE0 = replace(_B0, squeeze=None, activation=nn.relu6)
_tensorflow = partial(replace, epsilon=1e-3, padding="SAME")

EfficientNetB0 = partial(MobileNet, _B0)
EfficientNetB1 = partial(MobileNet, _B1)
EfficientNetLite0 = partial(MobileNet, _LITE0)
TFEfficientNetB0 = partial(MobileNet, _tensorflow(_B0))
TFEfficientNetB1 = partial(MobileNet, _tensorflow(_B1))
TFEfficientNetLite0 = partial(MobileNet, _tensorflow(_LITE0))
