"""Modules that stand in for pruned ones where slicing the layers alone would change what is computed."""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PrunedGroupNorm(nn.GroupNorm):
    """GroupNorm in whose statistics the removed channels still count, as zeros.

    Its output for the kept channels is that of the dense norm with the removed channels zeroed. With s = kept / dense
    channels and the kept channels' mean m and (biased) variance v of a norm group, the dense group's mean is s m and
    its variance is s (v + (1 - s) m^2). Input and output (batch, channels, ...); statistics in float32 at least.
    """

    def __init__(self, num_groups: int, num_channels: int, dense_channels: int, eps: float):
        super().__init__(num_groups, num_channels, eps, device="meta")
        self.dense_channels = dense_channels

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (batch, channels, ...)."""
        return self.of_padded(x) if x.is_cuda else self.of_statistics(x)

    def of_padded(self, x: Tensor) -> Tensor:
        """Normalize with zeros in place of the removed channels: four kernels, as a GPU waits for each one."""
        batch, kept = len(x), self.num_channels // self.num_groups
        dense = self.dense_channels // self.num_groups
        padded = F.pad(x.reshape(batch, self.num_groups, kept, -1), (0, 0, 0, dense - kept)).flatten(1, 2)
        normed = F.group_norm(padded, self.num_groups, eps=self.eps).view(batch, self.num_groups, dense, -1)
        weight, bias = (each.view(1, self.num_groups, kept, 1) for each in (self.weight, self.bias))
        return torch.addcmul(bias, normed[:, :, :kept], weight).reshape(x.shape).to(x.dtype)

    def of_statistics(self, x: Tensor) -> Tensor:
        """Normalize and correct the statistics: most of the work is in the kept channels alone, as a CPU likes it."""
        h = x if x.dtype == torch.float64 else x.float()
        if not (h.device.type == "cpu" and h.dim() == 4 and h.is_contiguous(memory_format=torch.channels_last)):
            h = h.contiguous()
        batch, channels = h.shape[:2]
        # The native kernel also returns its statistics, and on the CPU it is up to ten times faster than var_mean.
        normed, mean, rstd = torch.native_group_norm(h, None, None, batch, channels, h[0, 0].numel(),
                                                     self.num_groups, self.eps)
        share = self.num_channels / self.dense_channels
        variance = rstd**-2 - self.eps
        masked_rstd = (share * (variance + (1 - share) * mean**2) + self.eps).rsqrt()
        weight = self.weight.to(h.dtype).view(1, self.num_groups, -1) * masked_rstd[..., None]
        scale = weight / rstd[..., None]
        shift = weight * ((1 - share) * mean)[..., None] + self.bias.to(h.dtype).view(1, self.num_groups, -1)
        shape = (batch, channels) + (1,) * (h.dim() - 2)
        return torch.addcmul(shift.reshape(shape), normed, scale.reshape(shape)).to(x.dtype)

    def extra_repr(self) -> str:
        """Return GroupNorm's text and the dense width."""
        return f"{super().extra_repr()}, dense_channels={self.dense_channels}"


class PrunedResponseNorm(nn.Module):
    """GlobalResponseNorm in whose mean the removed channels still count, as zeros (Woo et al., 2023, ConvNeXt V2).

    Input and output (batch, height, width, channels).
    """

    def __init__(self, norm: nn.Module, dense_channels: int):
        super().__init__()
        self.gamma, self.beta, self.dense_channels = norm.gamma, norm.beta, dense_channels

    def forward(self, x: Tensor) -> Tensor:
        """Scale each channel by its energy ÷ the mean energy of all dense channels."""
        energy = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        mean = energy.sum(dim=-1, keepdim=True) / self.dense_channels
        return self.gamma * (x * (energy / (mean + 1e-6))) + self.beta + x


class HeadlessAttention(nn.Module):
    """The output of an attention whose heads are all zero: its output bias, and its residual if it has one.

    Input (batch, tokens, channels) or (batch, channels, height, width), as for the attention. A joint attention
    returns a second output for the other stream, with that stream's bias. An attention without an output projection
    returns no channels.
    """

    def __init__(self, attention: nn.Module):
        super().__init__()
        out = attention.to_out[0] if getattr(attention, "to_out", None) is not None else None
        context_out = getattr(attention, "to_add_out", None)
        self.joint = attention.added_kv_proj_dim is not None
        self.residual_connection = getattr(attention, "residual_connection", False)
        self.rescale_output_factor = getattr(attention, "rescale_output_factor", 1.0)
        self.out_features = 0 if out is None else out.out_features
        self.context_out_features = 0 if context_out is None else context_out.out_features
        self.bias = None if out is None else out.bias
        self.context_bias = None if context_out is None else context_out.bias

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor = None, *args, **kwargs):
        """Take the attention's arguments; only shapes count, and the values of hidden_states for the residual."""
        bias = hidden_states.new_zeros(self.out_features) if self.bias is None else self.bias
        if hidden_states.dim() == 4:
            out = bias[:, None, None].expand_as(hidden_states)
        else:
            out = bias.expand(*hidden_states.shape[:-1], -1)
        if self.residual_connection:
            out = out + hidden_states
        out = out / self.rescale_output_factor
        if not self.joint or encoder_hidden_states is None:
            return out
        bias = out.new_zeros(self.context_out_features) if self.context_bias is None else self.context_bias
        return out, bias.expand(*encoder_hidden_states.shape[:-1], -1).clone()  # torch's counters refuse a bare view
