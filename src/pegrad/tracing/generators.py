"""The states of torch's generators, which a loss that runs twice must find as they were."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Generators:
    """Where torch's generators, the CPU's and the GPUs', have got to."""

    cpu: Tensor
    cuda: list[Tensor]

    @classmethod
    def now(cls) -> "Generators":
        """Note where they are."""
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])

    def restore(self) -> None:
        """Put them back to where they were."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)

    def moved(self) -> bool:
        """Tell whether random numbers have been drawn since."""
        now = Generators.now()
        if len(now.cuda) != len(self.cuda):  # CUDA has been started since
            return True
        return not all(map(torch.equal, (self.cpu, *self.cuda), (now.cpu, *now.cuda)))
