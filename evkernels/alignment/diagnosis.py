"""Why a draft model's features or logits part from the target's: patterns over positions, motion and vocabulary.

Thresholds are those of EventGPT's diagnosis.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def diagnose_positions(draft: Tensor, target: Tensor) -> dict[str, object]:
    """How similarity falls along sequences of hidden states [B, T, D].

    Returns:
        "by_position", mean cosines; "first", "last", "mean_relative_decline" from position to position; "pattern":
        "rapid" if it falls by more than 0.40 and by more than 15 % a position, else "gradual".
    """
    cosines = F.cosine_similarity(draft.double(), target.double(), dim=-1).mean(0)
    declines = (cosines[:-1] - cosines[1:]) / cosines[:-1].abs().clamp_min(1e-8)
    decline = declines.mean().item() if len(declines) else 0.0
    first, last = cosines[0].item(), cosines[-1].item()
    return {
        "by_position": cosines.tolist(),
        "first": first,
        "last": last,
        "mean_relative_decline": decline,
        "pattern": "rapid" if first - last > 0.40 and decline > 0.15 else "gradual",
    }


def diagnose_motion(cosines: Tensor, is_dynamic: Tensor) -> dict[str, object]:
    """The gap between static and dynamic samples: cosines [N] and a mask [N] that is True where there is motion.

    Returns:
        "static", "dynamic", "gap", and "severity": "severe" above 0.30, "medium" above 0.15, else "light".
    """
    if not is_dynamic.any() or is_dynamic.all():
        raise ValueError("is_dynamic must have samples of both kinds")
    static, dynamic = cosines[~is_dynamic].mean().item(), cosines[is_dynamic].mean().item()
    gap = static - dynamic
    severity = "severe" if gap > 0.30 else "medium" if gap > 0.15 else "light"
    return {"static": static, "dynamic": dynamic, "gap": gap, "severity": severity}


def compare_logits(draft: Tensor, target: Tensor, top: int = 10) -> dict[str, object]:
    """Logits [..., vocabulary] of both models.

    Returns:
        "overlap" of the `top` likeliest tokens, "kl" of the target's distribution from the draft's in nats, "cosine",
        and "verdict": "good" if above 0.7, below 1 and above 0.8; "bad" if below 0.4, above 3 or below 0.5; "medium".
    """
    top = min(top, draft.shape[-1])
    best = [logits.topk(top, dim=-1).indices for logits in (draft, target)]
    overlap = (best[0][..., :, None] == best[1][..., None, :]).any(-1).double().mean().item()
    log_draft, log_target = (logits.double().log_softmax(-1) for logits in (draft, target))
    kl = (log_target.exp() * (log_target - log_draft)).sum(-1).mean().item()
    cosine = F.cosine_similarity(draft.double(), target.double(), dim=-1).mean().item()
    verdict = "medium"
    if overlap > 0.7 and kl < 1 and cosine > 0.8:
        verdict = "good"
    elif overlap < 0.4 or kl > 3 or cosine < 0.5:
        verdict = "bad"
    return {"overlap": overlap, "kl": kl, "cosine": cosine, "verdict": verdict}


def diagnose_misalignment(
    acceptance_rate: float | None = None,
    positions: dict[str, object] | None = None,
    motion: dict[str, object] | None = None,
) -> dict[str, object]:
    """Weighs the evidence that features are misaligned; what is not given does not count.

    Args:
        acceptance_rate: 0 to 1: below 0.3 counts 2, below 0.5 counts 1, of 2.
        positions: Of `diagnose_positions`: a rapid decline or a first cosine below 0.4 counts 2, of 2.
        motion: Of `diagnose_motion`: a gap above 0.30 counts 3, above 0.15 counts 2, of 3.

    Returns:
        "score", "max_score", "confidence" (their ratio), "severity": "severe" above 0.7, "medium" above 0.5, "light".
    """
    score = most = 0
    if acceptance_rate is not None:
        score, most = score + (2 if acceptance_rate < 0.3 else 1 if acceptance_rate < 0.5 else 0), most + 2
    if positions is not None:
        score, most = score + 2 * (positions["pattern"] == "rapid" or positions["first"] < 0.4), most + 2
    if motion is not None:
        score, most = score + (3 if motion["gap"] > 0.30 else 2 if motion["gap"] > 0.15 else 0), most + 3
    if not most:
        raise ValueError("give at least one kind of evidence")
    confidence = score / most
    severity = "severe" if confidence > 0.7 else "medium" if confidence > 0.5 else "light"
    return {"score": score, "max_score": most, "confidence": confidence, "severity": severity}


@torch.no_grad()
def diagnose_decoder(decoder: torch.nn.Module, aligned: Tensor, target: Tensor) -> dict[str, object]:
    """What a decoder makes of aligned and of target features [B, T, D]: `compare_logits` of its outputs."""
    return compare_logits(decoder(aligned), decoder(target))
