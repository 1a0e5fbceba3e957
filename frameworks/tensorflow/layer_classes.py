"""Keras layers and operations, grouped by what they do to the axes of a tensor."""

from typing import Any

import keras

__all__ = [
    "BINARY",
    "CHANNEL_NORMS",
    "CONVOLUTIONS",
    "ELEMENTWISE",
    "GLOBAL_POOLING",
    "LAST_AXIS_NORMS",
    "MERGES",
    "MOVES_OF_STEPS",
    "RECURRENT",
    "REDUCTIONS",
    "RESHAPES",
    "SEQUENCE_POOLING",
    "SPATIAL",
    "UNARY",
    "is_operation",
]

L = keras.layers

ELEMENTWISE = (
    L.Activation, L.ReLU, L.LeakyReLU, L.ELU, L.Softmax, L.Dropout, L.AlphaDropout, L.SpatialDropout1D,
    L.SpatialDropout2D, L.SpatialDropout3D, L.GaussianNoise, L.GaussianDropout, L.ActivityRegularization, L.Rescaling,
    L.Identity, L.PReLU, L.Masking,
)  # fmt: skip
CHANNEL_NORMS = (L.BatchNormalization, L.GroupNormalization)
LAST_AXIS_NORMS = (L.LayerNormalization, L.RMSNormalization)
MERGES = (L.Add, L.Subtract, L.Multiply, L.Average, L.Maximum, L.Minimum)
CONVOLUTIONS = (
    L.Conv1D, L.Conv2D, L.Conv3D, L.Conv1DTranspose, L.Conv2DTranspose, L.Conv3DTranspose, L.DepthwiseConv1D,
    L.DepthwiseConv2D, L.SeparableConv1D, L.SeparableConv2D,
)  # fmt: skip
SPATIAL = (
    *CONVOLUTIONS,
    L.MaxPooling1D, L.MaxPooling2D, L.MaxPooling3D, L.AveragePooling1D, L.AveragePooling2D, L.AveragePooling3D,
    L.UpSampling1D, L.UpSampling2D, L.UpSampling3D, L.ZeroPadding1D, L.ZeroPadding2D, L.ZeroPadding3D, L.Cropping1D,
    L.Cropping2D, L.Cropping3D,
)  # fmt: skip
GLOBAL_POOLING = (
    L.GlobalAveragePooling1D, L.GlobalAveragePooling2D, L.GlobalAveragePooling3D,
    L.GlobalMaxPooling1D, L.GlobalMaxPooling2D, L.GlobalMaxPooling3D,
)  # fmt: skip
RECURRENT = (L.LSTM, L.GRU, L.SimpleRNN, L.Bidirectional)
MOVES_OF_STEPS = (L.ZeroPadding1D, L.Cropping1D, L.UpSampling1D)
"""Their PyTorch counterparts are applied to tensors with channels first, or to sequences with features last."""
SEQUENCE_POOLING = (L.GlobalAveragePooling1D, L.GlobalMaxPooling1D)

# Operations of keras.ops, by the names of their classes.
UNARY = {
    "Relu", "Relu6", "LeakyRelu", "Elu", "Selu", "Celu", "Gelu", "Silu", "Sigmoid", "HardSigmoid", "HardSilu",
    "LogSigmoid", "Softplus", "Softsign", "Softmax", "LogSoftmax", "Tanh", "Exp", "Log", "Sqrt", "Rsqrt", "Square",
    "Absolute", "Negative", "Sin", "Cos", "Clip", "Sign", "Cast", "StopGradient", "Erf", "Mish",
}  # fmt: skip
BINARY = {"Add", "Subtract", "Multiply", "TrueDivide", "Divide", "Maximum", "Minimum", "Power"}
REDUCTIONS = {"Mean", "Max", "Min", "Sum", "Amax", "Amin"}
RESHAPES = {"Reshape", "ExpandDims", "Squeeze", "Flatten"}


def is_operation(layer: Any) -> bool:
    """Whether a node of a graph is an operation of ``keras.ops`` and not a layer."""
    is_keras = type(layer).__module__.startswith("keras.")
    return is_keras and isinstance(layer, keras.Operation) and not isinstance(layer, L.Layer)
