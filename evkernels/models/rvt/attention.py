"""Attention within partitions of a map, on [N, H, W, C]: what a stage of RVT does between convolution and LSTM.

All of it is PyTorch's own: layer norms, linear maps and scaled_dot_product_attention. State-dict keys are RVT's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PartitionAttentionCl(nn.Module):
    """Self-attention within the partitions of a map, then an MLP, each scaled per channel and added to its input.

    Equivalent to::

        x = x + ls1 * unpartition(self_attn(partition(norm1(x))))
        x = x + ls2 * mlp(norm2(x))

    Args:
        dim: Channels of x, a multiple of `dim_head`.
        partition_type: "window": blocks of `partition_size` neighbouring pixels. "grid": `partition_size` pixels at
            equal distances over the whole map.
        partition_size: Rows and columns of a partition.
        dim_head: Channels of a head.
        mlp_ratio: Hidden over outer channels of the MLP.
        attention_bias, mlp_bias: Whether their linear maps have biases.
        drop_mlp: Dropout inside the MLP.
        drop_path: Probability to leave out a residual branch of a sample in training.
        ls_init_value: Initial scale of both branches; 0 for none.
        norm_eps: Of the layer norms.
        skip_first_norm: x is normalised already, so there is no norm1.

    Forward: x [N, H, W, dim], H and W multiples of the partition's, to the same shape. State dict: `norm1`, `norm2`
    and `self_attn.{qkv,proj}`, `mlp.net.0.0`, `mlp.net.2` with weight and bias, `ls1.gamma`, `ls2.gamma`.
    Source: Gehrig and Scaramuzza 2023 (arXiv:2212.05598), after MaxViT (arXiv:2204.01697) without its relative
    position bias.
    """

    def __init__(
        self,
        dim: int,
        partition_type: str,
        partition_size: tuple[int, int],
        *,
        dim_head: int = 32,
        mlp_ratio: float = 4,
        attention_bias: bool = True,
        mlp_bias: bool = True,
        drop_mlp: float = 0.0,
        drop_path: float = 0.0,
        ls_init_value: float = 1e-5,
        norm_eps: float = 1e-5,
        skip_first_norm: bool = False,
    ) -> None:
        super().__init__()
        if partition_type not in ("window", "grid"):
            raise ValueError(f"partition_type must be 'window' or 'grid', got {partition_type!r}")
        self.partition_type = partition_type
        self.partition_size = tuple(partition_size)
        self.norm1 = nn.Identity() if skip_first_norm else nn.LayerNorm(dim, norm_eps)
        self.self_attn = SelfAttentionCl(dim, dim_head, attention_bias)
        self.ls1 = LayerScale(dim, ls_init_value) if ls_init_value > 0 else nn.Identity()
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, norm_eps)
        self.mlp = MLP(dim, mlp_ratio, mlp_bias, drop_mlp)
        self.ls2 = LayerScale(dim, ls_init_value) if ls_init_value > 0 else nn.Identity()
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        tokens = partition(self.norm1(x), self.partition_type, self.partition_size)
        attended = self.drop_path1(self.ls1(self.self_attn(tokens)).reshape(len(x), -1, x.shape[3]))
        x = add_partitioned(x, attended, self.partition_type, self.partition_size)
        branch = self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        # Without gradients in memory that is there: fresh memory costs as much as the addition.
        return x + branch if branch.requires_grad else branch.add_(x)


class SelfAttentionCl(nn.Module):
    """Multi-head self-attention over tokens [..., L, dim]; `qkv` gives query, key and value head by head."""

    def __init__(self, dim: int, dim_head: int = 32, bias: bool = True) -> None:
        super().__init__()
        if dim % dim_head:
            raise ValueError(f"dim must be a multiple of dim_head = {dim_head}, got {dim}")
        self.num_heads = dim // dim_head
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (self.num_heads, -1)).transpose(-2, -3).chunk(3, dim=-1)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2))


class MLP(nn.Module):
    """Linear, GELU, dropout, linear over the last dimension."""

    def __init__(self, dim: int, expansion_ratio: float = 4, bias: bool = True, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.hidden = int(dim * expansion_ratio)
        # The nesting gives the published keys net.0.0 and net.2.
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(dim, self.hidden, bias=bias), nn.GELU()),
            nn.Dropout(drop_prob),
            nn.Linear(self.hidden, dim, bias=bias),
        )

    def forward(self, x: Tensor) -> Tensor:
        (linear, _), dropout, last = self.net
        hidden = linear(x)
        hidden = F.gelu(hidden) if hidden.requires_grad else torch.ops.aten.gelu_(hidden)
        return last(dropout(hidden))


class LayerScale(nn.Module):
    """x * gamma, a learned factor per channel (last dimension)."""

    def __init__(self, dim: int, init_values: float = 1e-5) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """In training, zero for whole samples with probability `drop_prob`, the others scaled by 1 / (1 - drop_prob)."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        if not 0 <= drop_prob < 1:
            raise ValueError(f"drop_path must be at least 0 and below 1, got {drop_prob}")
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.drop_prob):
            return x
        return x * F.dropout(x.new_ones(len(x), *[1] * (x.dim() - 1)), self.drop_prob)

    def extra_repr(self) -> str:
        return f"{self.drop_prob}"


def partition(x: Tensor, partition_type: str, size: tuple[int, int]) -> Tensor:
    """[N, H, W, C] to tokens [N * partitions, rows * columns, C]."""
    height, width = x.shape[1:3]
    rows, columns = size
    if height % rows or width % columns:
        raise ValueError(f"H, W must be multiples of the partition's {rows}, {columns}, got {height}, {width}")
    if partition_type == "window":
        x = x.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).permute(0, 1, 3, 2, 4, 5)
    else:
        x = x.unflatten(2, (columns, -1)).unflatten(1, (rows, -1)).permute(0, 2, 4, 1, 3, 5)
    return x.flatten(3, 4).flatten(0, 2)


def add_partitioned(x: Tensor, tokens: Tensor, partition_type: str, size: tuple[int, int]) -> Tensor:
    """Adds to x [N, H, W, C] the tokens [N, partitions * rows * columns, C], back in their places."""
    height, width = x.shape[1:3]
    rows, columns = size
    tokens = tokens.unflatten(1, (height // rows, width // columns, rows, columns))
    if partition_type == "window":
        x, tokens = x.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)), tokens.permute(0, 1, 3, 2, 4, 5)
    else:
        x, tokens = x.unflatten(2, (columns, -1)).unflatten(1, (rows, -1)), tokens.permute(0, 3, 1, 4, 2, 5)
    # Adding through these views saves the copy that would bring the tokens into the order of x.
    return (x + tokens).flatten(3, 4).flatten(1, 2)
