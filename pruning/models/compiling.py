"""torch.compile for a denoiser, with a count that tells whether its calls really run compiled.

torch's compiler keeps every compiled version of a module's code. When a limit is reached (8 versions by default),
the compiler runs the code uncompiled and says so in a log only. Shapes change with every rate of a removing method,
so a sweep would reach the limit after a few rates.
"""
from __future__ import annotations

from contextlib import contextmanager
from typing import Callable, Iterator, List


class CompiledCalls:
    """How many compiled graphs a denoiser has run."""

    def __init__(self):
        self.graphs = 0
        self.observed: List[int] = []

    def observe(self, call: Callable[[], object]) -> None:
        """Run `call`, which calls the denoiser equally often each time, and note how many compiled graphs ran."""
        before = self.graphs
        call()
        self.observed.append(self.graphs - before)

    @property
    def compiled(self) -> bool:
        """Whether everything observed ran compiled: at least one graph, and as many as the first time."""
        return self.observed[0] > 0 and len(set(self.observed)) == 1


def forget_compiled() -> None:
    """Drop all compiled code, so that the limit counts the versions of the next denoisers alone."""
    import torch
    torch._dynamo.reset()


def compile_denoiser(denoiser, backend: str = "inductor") -> CompiledCalls:
    """Compile a denoiser in place at its next call, and return the count of the compiled graphs that it runs."""
    import torch
    compile_graph, calls = torch._dynamo.lookup_backend(backend), CompiledCalls()

    def compile_counted(graph, inputs):
        compiled = compile_graph(graph, inputs)

        def run(*args):
            calls.graphs += 1
            return compiled(*args)
        return run

    denoiser.compile(backend=compile_counted)
    return calls


@contextmanager
def uncompiled(denoiser) -> Iterator[None]:
    """Inside the block, calls of a denoiser run uncompiled: compiled code skips hooks that were set after it."""
    compiled, denoiser._compiled_call_impl = denoiser._compiled_call_impl, None
    try:
        yield
    finally:
        denoiser._compiled_call_impl = compiled
