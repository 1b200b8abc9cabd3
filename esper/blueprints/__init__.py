"""The built-in designs, one file a family, and the registry that takes other people's."""

from esper.blueprints.registry import build, designs_for, get, register

__all__ = ["build", "designs_for", "get", "register"]

register("residual_mlp", "esper.blueprints.residual_mlp:ResidualMLP")
register("low_rank", "esper.blueprints.low_rank:LowRank")
register("gated", "esper.blueprints.gated:Gated")
register("conv_bottleneck", "esper.blueprints.convolutional:ConvBottleneck")
register("depthwise", "esper.blueprints.convolutional:Depthwise")
register("channel_attention", "esper.blueprints.channel_attention:ChannelAttention")
register("self_attention", "esper.blueprints.self_attention:SelfAttention")
register("norm", "esper.blueprints.norm:Norm")
register("standardize", "esper.blueprints.norm:Standardize")
