"""What torch.compile leaves as it is."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcil.nn.eager import eager


def test_a_compiled_caller_runs_it_as_it_is() -> None:
    graphs, modes = [], []

    @eager
    def noise(x: Tensor) -> Tensor:
        """Draws by the number in x."""
        modes.append(torch.compiler.is_compiling())
        return torch.rand(2, generator=torch.Generator().manual_seed(int(x[0]))) * x

    def caller(x: Tensor) -> Tensor:
        y = 2 * x
        return y.sin() + noise(y)

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(caller, backend=backend)
    points = [torch.full((2,), float(k), requires_grad=True) for k in range(12)]
    for x in points:
        torch.testing.assert_close(compiled(x), caller(x), rtol=0, atol=0)
    compiled(points[3]).sum().backward()
    expected = torch.autograd.grad(caller(points[3]).sum(), points[3])[0]
    torch.testing.assert_close(points[3].grad, expected, rtol=0, atol=0)
    assert len(graphs) == 2  # before and after it, traced once
    assert not any(modes)
    assert noise.__doc__ == "Draws by the number in x."
