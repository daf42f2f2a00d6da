"""PyTorch's convolution functions as sites of their weight and bias."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pegrad.rules.bias import Bias, over_images
from pegrad.rules.conv.calls import READERS, Convolution
from pegrad.rules.conv.site import ConvWeight
from pegrad.rules.site import Recorder, Rule, Site, Tap


def _rule(name: str, read: Callable[..., Convolution]) -> Rule:
    def rule(trace: Recorder, *args: Any, **kwargs: Any) -> Any:
        call = read(*args, **kwargs)
        if not trace.is_parameter(call.weight) or not trace.is_batched(call.input) or not call.numel():
            return NotImplemented
        fused = call.bias if call.bias is not None and trace.is_parameter(call.bias) else None
        images = 1 if call.unbatched else call.input.shape[0]

        def run(x: Tensor, tap: Tap) -> Tensor:
            x = x if call.unbatched else x.flatten(0, 1)
            weight, bias = call.weight.detach(), None if fused is None else fused.detach()
            if call.transposed:
                y = call.geometry.input_gradient(x, weight, call.size, bias)
            else:
                y = call.geometry.forward(x, weight, bias)
            sites: list[Site] = [ConvWeight(call.weight, name, call.geometry, call.transposed, images)]
            if fused is not None:
                sites.append(Bias(fused, f"{name} bias", over_images(images)))
            y = tap(y, x, sites)
            return y if call.unbatched else y.reshape(-1, images, *y.shape[1:])

        y = trace.record(run, call.input)
        return y if call.bias is None or fused is not None else y + call.offset(call.bias)

    return rule


RULES: dict[Any, Rule] = {function: _rule(function.__name__, read) for function, read in READERS.items()}
