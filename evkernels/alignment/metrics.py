"""How well aligned features are, and how many of them a speculative decoder would accept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from evkernels import ops

THRESHOLDS = (0.80, 0.85, 0.90, 0.95)


@dataclass
class AlignmentMetrics:
    """Results of an evaluation; `acceptance_rate` is the estimate of `diagnose_alignment_quality`."""

    feature_similarity: float
    acceptance_rate: float
    retrieval_recall_at_1: float
    retrieval_recall_at_5: float
    retrieval_recall_at_10: float
    kl_divergence: float | None = None
    training_loss: float | None = None


def evaluate_retrieval(event: Tensor, target: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """Recall "R@k" of finding each row's own target by cosine, of features [N, D]; see `ops.retrieval_recall`.

    Raises:
        ValueError: if a k is larger than N.
    """
    return {f"R@{k}": value for k, value in zip(ks, ops.retrieval_recall(event, target, ks).tolist(), strict=True)}


def evaluate_alignment_comprehensive(
    aligned: Tensor,
    target: Tensor,
    event_embedding: Tensor | None = None,
    target_embedding: Tensor | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Results "mse" and "cosine_similarity" of normalised features [N, D], and retrieval in both directions.

    "R@k" is events looking for their target, "reverse_R@k" the other way, among the embeddings where a module compares
    them (its `embed`), or else among the features themselves. A k above N is left out.
    """
    ks = [k for k in ks if k <= len(aligned)]
    mse, cosine = ops.normalized_mse_cosine(aligned, target)
    event = aligned if event_embedding is None else event_embedding
    target = target if target_embedding is None else target_embedding
    reverse = {f"reverse_{name}": value for name, value in evaluate_retrieval(target, event, ks).items()}
    return {"mse": mse.item(), "cosine_similarity": cosine.item(), **evaluate_retrieval(event, target, ks), **reverse}


def estimated_acceptance_rate(mean_cosine: float) -> float:
    """min(0.8, 1.1 * mean cosine), EventGPT's rule of thumb: an estimate, not a measurement."""
    return min(0.8, 1.1 * mean_cosine)


def diagnose_alignment_quality(aligned: Tensor, target: Tensor) -> dict[str, object]:
    """A first look at features [N, D]: the estimated rate, how fast acceptance decays, and a verdict.

    Returns:
        "mean_cosine", "estimated_acceptance_rate", "decay" ("slow" above a cosine of 0.7, "medium" above 0.5, "fast"),
        "quality" ("excellent", "medium" or "poor") and "alignment_needed" ("strong" below 0.3, "medium" below 0.6,
        "light").
    """
    cosine = ops.normalized_mse_cosine(aligned, target)[1].item()
    rate = estimated_acceptance_rate(cosine)
    quality = "excellent" if cosine > 0.7 and rate > 0.65 else "medium" if cosine > 0.5 and rate > 0.5 else "poor"
    return {
        "mean_cosine": cosine,
        "estimated_acceptance_rate": rate,
        "decay": "slow" if cosine > 0.7 else "medium" if cosine > 0.5 else "fast",
        "quality": quality,
        "alignment_needed": "strong" if cosine < 0.3 else "medium" if cosine < 0.6 else "light",
    }


def measure_feature_acceptance(
    draft: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
    gamma: int | None = None,
) -> dict[str, float]:
    """How many hidden states a verifier that compares by cosine would accept.

    Args:
        draft, target: Hidden states [B, T, D] of the draft and of the target model.
        mask: Valid positions [B, T], bool; None for all.
        thresholds: Cosines above which a position is accepted.
        gamma: Positions drafted at a time, for the speculative rate; None: T.

    Returns:
        "cosine", the mean over valid positions; for every threshold t "accept@t", the share of valid positions above
        it, "consecutive@t", the mean over sequences of the number of accepted positions before the first that is not
        (at most the sequence's length), and "speculative_rate@t", that over gamma, counting the first gamma alone.

    Raises:
        ValueError: if shapes disagree or no position is valid.
    """
    valid = _valid(draft, target, mask)
    cosines = F.cosine_similarity(draft.double(), target.double(), dim=-1)
    gamma = gamma or draft.shape[1]
    result = {"cosine": cosines[valid].mean().item()}
    for threshold in thresholds:
        accepted = (cosines > threshold) & valid
        consecutive = accepted.long().cumprod(1)
        result[f"accept@{threshold:.2f}"] = accepted[valid].double().mean().item()
        result[f"consecutive@{threshold:.2f}"] = consecutive.sum(1).double().mean().item()
        result[f"speculative_rate@{threshold:.2f}"] = consecutive[:, :gamma].sum(1).double().mean().item() / gamma
    return result


def measure_token_acceptance(
    draft_logits: Tensor, target_logits: Tensor, mask: Tensor | None = None, top: int = 5
) -> dict[str, float]:
    """How often both models' logits [B, T, vocabulary] choose the same token at valid positions.

    Returns:
        "token_match" of the likeliest tokens, "top5_match" (or another `top`): the draft's token among the target's
        likeliest, "consecutive_match": the mean number of matches before the first miss.
    """
    valid = _valid(draft_logits, target_logits, mask)
    draft, best = draft_logits.argmax(-1), target_logits.topk(min(top, target_logits.shape[-1]), dim=-1).indices
    match = (draft == target_logits.argmax(-1)) & valid
    return {
        "token_match": match[valid].double().mean().item(),
        f"top{top}_match": (best == draft[..., None]).any(-1)[valid].double().mean().item(),
        "consecutive_match": match.long().cumprod(1).sum(1).double().mean().item(),
    }


def _valid(draft: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    if draft.dim() != 3 or draft.shape != target.shape:
        raise ValueError(f"both must be [B, T, D] of one shape, got {tuple(draft.shape)} and {tuple(target.shape)}")
    valid = torch.ones(draft.shape[:2], dtype=torch.bool, device=draft.device) if mask is None else mask.bool()
    if valid.shape != draft.shape[:2]:
        raise ValueError(f"mask must be [B, T] = {tuple(draft.shape[:2])}, got {tuple(valid.shape)}")
    if not valid.any():
        raise ValueError("mask must have a valid position")
    return valid
