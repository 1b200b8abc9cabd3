"""Self-attention over the positions of a sequence (https://arxiv.org/abs/1706.03762)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from esper.blueprints.parts import Down, SiteModule, is_channels_last, zero_up
from esper.contracts import SiteSignature


class SelfAttention(SiteModule):
    """``act + out(attention(qkv(inp)))`` on (N, T, C), without a mask and without positions."""

    needs = "an output of rank 3 with channels last and samples first"

    def __init__(self, site: SiteSignature, *, heads: int = 4, head_dim: int = 8) -> None:
        super().__init__(site)
        self.heads = heads
        self.qkv = Down(site, 3 * heads * head_dim)
        self.out = zero_up(site, heads * head_dim)

    @staticmethod
    def fits(site: SiteSignature) -> bool:
        return len(site.act_shape) == 3 and is_channels_last(site) and site.batch_dim == 0

    def forward(self, inp: Tensor, act: Tensor) -> Tensor:
        q, k, v = (self._heads(x) for x in self.qkv(inp, act).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = act + self.out(attended.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        """(N, T, heads * head_dim) to (N, heads, T, head_dim)."""
        return torch.unflatten(x, 2, (self.heads, -1)).transpose(1, 2)
