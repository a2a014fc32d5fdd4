"""Two trunks side by side: what a pretrained network knows beside what another learns from pixels.

A frozen classifier knows what is in a picture and has dropped where its edges are; a small trunk of one's own has the
edges and learns few words from some thousand pictures. An encoder's queries read the patches of both.

Letters: B batch, N patches, D width.
"""

import torch
from torch import Tensor, nn

from stage1_tokenizer.encoder import Trunk
from stage1_tokenizer.layers import LayerNorm


class JoinedTrunks(Trunk):
    """images (B,3,H,W) -> patches (B,N1+N2,D): those of `first`, then those of `second`, each normalised by itself.

    Raises ValueError for trunks of different image sizes or widths.
    """

    def __init__(self, first: Trunk, second: Trunk):
        super().__init__()
        for name in ("image_size", "width"):
            a, b = getattr(first, name), getattr(second, name)
            if a != b:
                raise ValueError(f"the first trunk's {name} is {a}, the second's {b}; make them equal.")
        self.first, self.second = first, second
        self.norms = nn.ModuleList(LayerNorm(first.width) for _ in range(2))
        self.image_size, self.width = first.image_size, first.width
        self.num_patches = first.num_patches + second.num_patches

    def forward(self, images: Tensor) -> Tensor:
        self.check(images)
        each = (trunk(images) for trunk in (self.first, self.second))
        return torch.cat([norm(x) for norm, x in zip(self.norms, each, strict=True)], 1)  # (B,N,D)
