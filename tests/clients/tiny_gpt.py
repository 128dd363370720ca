"""A GPT of the usual build, as small as it can be: pre-norm blocks, learned positions, embeddings tied to the head."""

from __future__ import annotations

import inspect
import math

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  torch's own abbreviation


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        # No bias here: that of the keys has no gradient but rounding, which Adam makes whole steps from.
        self.c_attn, self.attn_proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.c_fc, self.mlp_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.c_attn(self.ln_1(x)).chunk(3, -1)
        )
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        x = x + F.dropout(self.attn_proj(mixed.transpose(1, 2).flatten(2)), self.dropout, self.training)
        return x + F.dropout(self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)))), self.dropout, self.training)


class GPT(nn.Module):
    def __init__(
        self, vocab: int, context: int = 16, width: int = 16, depth: int = 2, heads: int = 2, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.ln_f = nn.LayerNorm(width, bias=False)
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.wte.weight = self.lm_head.weight
        for name, param in self.named_parameters():
            if param.dim() >= 2:
                nn.init.normal_(param, std=0.02 / math.sqrt(2 * depth) if name.endswith("proj.weight") else 0.02)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.lm_head(self.ln_f(x)).flatten(0, 1), targets.flatten())

    def configure_optimizers(
        self,
        optimizer_class: type[torch.optim.Optimizer],
        weight_decay: float,
        learning_rate: float,
        betas: tuple[float, float],
    ) -> torch.optim.Optimizer:
        """Decay for what multiplies, none for what adds; `fused` where the class has such an argument."""
        trained = {name: param for name, param in self.named_parameters() if param.requires_grad}
        groups = [
            {"params": [p for p in trained.values() if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in trained.values() if p.dim() < 2], "weight_decay": 0.0},
        ]
        extra = {"fused": True} if "fused" in inspect.signature(optimizer_class).parameters else {}
        return optimizer_class(groups, lr=learning_rate, betas=betas, **extra)
