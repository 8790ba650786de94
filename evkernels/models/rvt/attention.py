"""Attention within partitions of a map, on [N, H, W, C]: what a stage of RVT does between convolution and LSTM.

All work on the map as it is: `window_attention` reads and writes its partitions in place. Layer norms and linear maps
are PyTorch's own, but without gradients those of narrow MLPs are `residual_mlp`. A branch's scale goes into the weights
of its last linear map: a pass over the branch less forward, and three less in the gradient. State-dict keys are RVT's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evkernels import ops
from evkernels.ops import registration


class PartitionAttentionCl(nn.Module):
    """Self-attention within the partitions of a map, then an MLP, each scaled per channel and added to its input.

    Equivalent to::

        q, k, v = heads(partition(qkv(norm1(x))))
        x = x + ls1 * proj(unpartition(scaled_dot_product_attention(q, k, v)))
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
        branch = self.self_attn(self.norm1(x), self.partition_type, self.partition_size, self.ls1)
        x = _added(x, self.drop_path1(branch))
        if self._mlp_in_one_op(x):
            (linear, _), _, last = self.mlp.net
            norm = self.norm2
            parameters = (norm.weight, norm.bias, linear.weight, linear.bias, last.weight, last.bias, self.ls2.gamma)
            return ops.residual_mlp(x, *parameters, norm.eps)
        return _added(x, self.drop_path2(self.mlp(self.norm2(x), self.ls2)))

    def _mlp_in_one_op(self, x: Tensor) -> bool:
        """Whether `residual_mlp` can and is faster: without gradients, on the CPU, up to 128 channels in float32."""
        drops = self.training and (self.drop_path2.drop_prob or self.mlp.net[1].p)
        whole = isinstance(self.ls2, LayerScale) and self.mlp.net[2].bias is not None and not drops
        wins = x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[-1] <= 128
        exact = registration.matmul_precision() == "highest" and not torch.is_autocast_enabled("cpu")
        return whole and wins and exact and not torch.is_grad_enabled()


class SelfAttentionCl(nn.Module):
    """Multi-head self-attention within the partitions of a map [N, H, W, dim], see `evkernels.ops.window_attention`.

    The result is scaled by `scale`, a LayerScale or torch.nn.Identity.
    """

    def __init__(self, dim: int, dim_head: int = 32, bias: bool = True) -> None:
        super().__init__()
        if dim % dim_head:
            raise ValueError(f"dim must be a multiple of dim_head = {dim_head}, got {dim}")
        self.num_heads = dim // dim_head
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim, bias=bias)

    def forward(
        self, x: Tensor, partition_type: str, partition_size: tuple[int, int], scale: nn.Module | None = None
    ) -> Tensor:
        # On the CPU the op adds the bias on the way; a GPU's library does in its product.
        late = x.device.type == "cpu"
        qkv = F.linear(x, self.qkv.weight) if late else self.qkv(x)
        bias = self.qkv.bias if late else None
        attended = ops.window_attention(qkv, bias, self.num_heads, partition_size, partition_type)
        return _scaled(self.proj, scale, attended)


class MLP(nn.Module):
    """Linear, GELU, dropout, linear over the last dimension, scaled by a LayerScale if one is given."""

    def __init__(self, dim: int, expansion_ratio: float = 4, bias: bool = True, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.hidden = int(dim * expansion_ratio)
        # The nesting gives the published keys net.0.0 and net.2.
        self.net = nn.Sequential(
            nn.Sequential(nn.Linear(dim, self.hidden, bias=bias), nn.GELU()),
            nn.Dropout(drop_prob),
            nn.Linear(self.hidden, dim, bias=bias),
        )

    def forward(self, x: Tensor, scale: nn.Module | None = None) -> Tensor:
        (linear, _), dropout, last = self.net
        hidden = linear(x)
        hidden = F.gelu(hidden) if hidden.requires_grad else torch.ops.aten.gelu_(hidden)
        return _scaled(last, scale, dropout(hidden))


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


def _scaled(linear: nn.Linear, scale: nn.Module | None, x: Tensor) -> Tensor:
    """Is scale(linear(x)); a LayerScale multiplies the weights instead."""
    if not isinstance(scale, LayerScale):
        return linear(x)
    bias = None if linear.bias is None else scale(linear.bias)
    return F.linear(x, scale.gamma[:, None] * linear.weight, bias)


def _added(x: Tensor, branch: Tensor) -> Tensor:
    """Is x + branch; in the branch, which nobody else has, unless gradients need it."""
    return x + branch if branch.requires_grad or branch.dtype != x.dtype else branch.add_(x)
