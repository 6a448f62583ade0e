"""Small models of the kinds that are trained: with skip connections, attention, convolutions and tied weights."""

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HEADS, TOKENS, VOCABULARY = 8, 2, 6, 11


class SkipMLP(nn.Module):
    """An MLP with skip connections and a gated block."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 6), nn.Linear(6, WIDTH)
        self.norm, self.gated, self.back = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10), nn.Linear(5, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs (b, 3)."""
        x = self.first(x)
        x = x + self.down(self.up(x).relu())
        x = x + self.back(functional.glu(self.gated(self.norm(x))))
        return self.head(x.tanh())


class Attention(nn.Module):
    """Self-attention from linear layers."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs like x (b, tokens, width)."""
        q, k, v = (each(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.o(mixed.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    """A block of a transformer: attention, then two layers for each token."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(WIDTH), Attention(causal), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs like x (b, tokens, width)."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A language model, its embedding tied to its head if so wished."""

    def __init__(self, tied: bool = False, blocks: int = 2) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList(Block(causal=True) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return scores (b, tokens, vocabulary)."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class ViT(nn.Module):
    """A classifier of images (b, 1, 4, 4): patches, a class token or the mean of all tokens."""

    def __init__(self, class_token: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH) / 10) if class_token else None
        self.positions = nn.Parameter(torch.randn(1, 4 + class_token, WIDTH) / 10)
        self.block, self.norm, self.head = Block(causal=False), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, images: Tensor) -> Tensor:
        """Return scores (b, 3)."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = self.norm(self.block(x + self.positions))
        return self.head(x.mean(1) if self.token is None else x[:, 0])


class ResNet(nn.Module):
    """A classifier of images (b, 2, 6, 6): a residual block with a convolution in its skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv1, self.norm1 = nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.skip, self.norm3 = nn.Conv2d(4, 6, 1, stride=2, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        """Return scores (b, 3)."""
        x = self.norm0(self.stem(images)).relu()
        inner = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        x = (inner + self.norm3(self.skip(x))).relu()
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Upsampling(nn.Module):
    """From images (b, 2, 4, 4) to images (b, 2, 8, 8): down, up by a transposed convolution, a skip connection."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.down = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=groups)
        self.side, self.out = nn.Conv2d(2, 6, 1), nn.ConvTranspose2d(6, 2, 2, stride=2)

    def forward(self, images: Tensor) -> Tensor:
        """Return images (b, 2, 8, 8)."""
        return self.out((self.up(self.down(images).relu()) + self.side(images)).tanh())
