"""Alignment of event features to the feature space of an image encoder, such as CLIP's.

Four strategies: contrastive, lightweight, triple-modal and reconstruction bridging, with names, fields and defaults of
EventGPT's feature alignment (`docs/alignment.md`); the losses run on `ops.contrastive_loss` and
`ops.normalized_mse_cosine`, retrieval on `ops.retrieval_recall`.
"""

from evkernels.alignment.base import BaseAlignmentModule, hard_negative_loss, hardest_negatives
from evkernels.alignment.checkpoints import load_checkpoint, load_original_checkpoint, save_checkpoint
from evkernels.alignment.config import (
    CONFIGS,
    AlignmentConfig,
    ContrastiveAlignmentConfig,
    LightweightAlignmentConfig,
    ReconstructionBridgingConfig,
    TripleModalAlignmentConfig,
)
from evkernels.alignment.contrastive import ContrastiveAlignmentModule
from evkernels.alignment.data import AlignmentDataset, save_features
from evkernels.alignment.diagnosis import (
    compare_logits,
    diagnose_decoder,
    diagnose_misalignment,
    diagnose_motion,
    diagnose_positions,
)
from evkernels.alignment.distributed import all_gather_with_gradient, distributed_contrastive_loss
from evkernels.alignment.encoders import load_image_encoder
from evkernels.alignment.lightweight import LightweightAlignmentModule
from evkernels.alignment.metrics import (
    AlignmentMetrics,
    diagnose_alignment_quality,
    evaluate_alignment_comprehensive,
    evaluate_retrieval,
    measure_feature_acceptance,
    measure_token_acceptance,
)
from evkernels.alignment.reconstruction import ReconstructionBridgingModule, RefinedReconstructionBridgingModule
from evkernels.alignment.selection import (
    Recommendation,
    auto_select_alignment_strategy,
    print_strategy_recommendation,
)
from evkernels.alignment.trainer import (
    AlignmentTrainer,
    ContrastiveAlignmentTrainer,
    LightweightAlignmentTrainer,
    TripleModalAlignmentTrainer,
    downstream_loss,
)
from evkernels.alignment.triple_modal import TripleModalAlignmentModule

__all__ = [
    "CONFIGS",
    "AlignmentConfig",
    "AlignmentDataset",
    "AlignmentMetrics",
    "AlignmentTrainer",
    "BaseAlignmentModule",
    "ContrastiveAlignmentConfig",
    "ContrastiveAlignmentModule",
    "ContrastiveAlignmentTrainer",
    "LightweightAlignmentConfig",
    "LightweightAlignmentModule",
    "LightweightAlignmentTrainer",
    "Recommendation",
    "ReconstructionBridgingConfig",
    "ReconstructionBridgingModule",
    "RefinedReconstructionBridgingModule",
    "TripleModalAlignmentConfig",
    "TripleModalAlignmentModule",
    "TripleModalAlignmentTrainer",
    "all_gather_with_gradient",
    "auto_select_alignment_strategy",
    "compare_logits",
    "diagnose_alignment_quality",
    "diagnose_decoder",
    "diagnose_misalignment",
    "diagnose_motion",
    "diagnose_positions",
    "distributed_contrastive_loss",
    "downstream_loss",
    "evaluate_alignment_comprehensive",
    "evaluate_retrieval",
    "hard_negative_loss",
    "hardest_negatives",
    "load_checkpoint",
    "load_image_encoder",
    "load_original_checkpoint",
    "measure_feature_acceptance",
    "measure_token_acceptance",
    "print_strategy_recommendation",
    "save_checkpoint",
    "save_features",
]
