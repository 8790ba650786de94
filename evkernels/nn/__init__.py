"""Drop-in modules: parameters, convolutions and calls of `evkernels.ops`, no arithmetic of their own.

State-dict keys are those of the published originals, so that their checkpoints load.
"""

from evkernels.nn.conv_gru import ConvGRUCell
from evkernels.nn.conv_lstm import ConvLSTMCell

__all__ = ["ConvGRUCell", "ConvLSTMCell"]
