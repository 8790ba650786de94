"""RVT (Recurrent Vision Transformers for object detection with event cameras) and its YOLOX detector."""

from evkernels.models.rvt.backbone import MaxViTRNN, partition_size_of
from evkernels.models.rvt.boxes import postprocess
from evkernels.models.rvt.detector import RVTDetector
from evkernels.models.rvt.fpn import YOLOPAFPN
from evkernels.models.rvt.head import YOLOXHead

__all__ = ["YOLOPAFPN", "MaxViTRNN", "RVTDetector", "YOLOXHead", "partition_size_of", "postprocess"]
