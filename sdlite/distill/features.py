"""Feature taps: named block outputs, recorded while the block `with Taps(...)` lasts."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sdlite.errors import InputError


def block_taps(unet: Any) -> dict[str, str]:
    """tap name -> module name: the outputs of every down, middle and up block, counted from the outside so that students match."""
    down, up = len(unet.down_blocks), len(unet.up_blocks)
    taps = {f"down{i}": f"down_blocks.{i}" for i in range(down)}
    if unet.mid_block is not None:
        taps["mid"] = "mid_block"
    return taps | {f"up{up - 1 - i}": f"up_blocks.{i}" for i in range(up)}


class Taps:
    """Hooks on `modules` (tap name -> module name) of a network; `features` holds the last forward's outputs, (B, C, h, w) each."""

    def __init__(self, network: nn.Module, modules: dict[str, str]):
        known = dict(network.named_modules())
        if missing := [m for m in modules.values() if m not in known]:
            raise InputError(f"no module {missing} to tap; taps must name modules of the network.")
        self.modules = {tap: known[name] for tap, name in modules.items()}
        self.features: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Taps:
        for tap, module in self.modules.items():
            self._handles.append(module.register_forward_hook(self._keep(tap)))
        return self

    def _keep(self, tap: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.features[tap] = output[0] if isinstance(output, tuple) else output

        return hook

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
