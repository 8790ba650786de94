"""Which alignment strategy suits what is there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recommendation:
    """A strategy, as a key of `evkernels.alignment.CONFIGS`, under its name, and why."""

    strategy: str
    name: str
    reason: str


def auto_select_alignment_strategy(
    has_paired_data: bool, data_size: int, has_e2vid: bool = False, target_performance: str = "good"
) -> Recommendation:
    """The strategy that EventGPT's rules choose, tried in this order.

    "best", paired and more than 10,000: triple-modal; paired and more than 5,000: contrastive; reconstruction weights:
    reconstruction; paired and more than 1,000: lightweight with fine-tuning; else lightweight.

    Args:
        has_paired_data, data_size: Whether events come with images, and how many.
        has_e2vid: Whether there are weights of a reconstruction network.
        target_performance: "best", "good" or "fast"; "best" alone changes the choice.
    """
    if target_performance not in ("best", "good", "fast"):
        raise ValueError(f"target_performance must be best, good or fast, got {target_performance!r}")
    pairs = data_size if has_paired_data else 0
    if target_performance == "best" and pairs > 10_000:
        return Recommendation("triple_modal", "Triple-Modal Alignment", f"{pairs} pairs, and only the best will do")
    if pairs > 5_000:
        return Recommendation("contrastive", "Contrastive Alignment", f"{pairs} pairs, more than 5000")
    if has_e2vid:
        return Recommendation("reconstruction", "Reconstruction Bridging", "reconstruction weights, no pairs needed")
    if pairs > 1_000:
        name = "Lightweight Alignment + Fine-tune"
        return Recommendation("lightweight", name, f"{pairs} pairs, more than 1000 and no more than 5000")
    return Recommendation("lightweight", "Lightweight Alignment", f"{pairs} pairs, no more than 1000")


def print_strategy_recommendation(recommendation: Recommendation) -> None:
    """One line on standard output."""
    print(f"{recommendation.name} (--strategy {recommendation.strategy}): {recommendation.reason}")
