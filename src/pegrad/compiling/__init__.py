"""`pegrad.compile`: a private step, or any per-example function, as one graph that a compiler makes kernels of."""

from pegrad.compiling.compiled import Compiled, compile
from pegrad.compiling.function import CompileReport

__all__ = ["CompileReport", "Compiled", "compile"]
