"""Networks built from `evkernels.nn`."""

from evkernels.models.cista_tc import CistaTC
from evkernels.models.e2vid import E2VIDRecurrent
from evkernels.models.econvlstm import EConvlstm
from evkernels.models.efficient_conv_lstm import EfficientConvLSTM
from evkernels.models.encoding_health import EncodingHealth
from evkernels.models.event_encoder import EventEncoder, EventPredictor
from evkernels.models.firenet import FireNet
from evkernels.models.rvt import MaxViTRNN, RVTDetector
from evkernels.models.visioncore import VisionCore

__all__ = [
    "CistaTC",
    "E2VIDRecurrent",
    "EConvlstm",
    "EfficientConvLSTM",
    "EncodingHealth",
    "EventEncoder",
    "EventPredictor",
    "FireNet",
    "MaxViTRNN",
    "RVTDetector",
    "VisionCore",
]
