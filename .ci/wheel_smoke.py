"""Run by an installed wheel, away from the checkout: transform, run, report, compile, restore."""

import torch
from torch import nn
from torch.nn import functional as F

import sla2_compile


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


model, x = Attention(), torch.randn(2, 1024, 64)
expected = model(x)
sla2_compile.transform(model, "balanced", example_inputs=(x,))
assert len(sla2_compile.report(model).rewrites) == 1
got = model(x)
assert torch.isfinite(got).all()
assert not torch.equal(got, expected)
assert torch.equal(sla2_compile.restore(model)(x), expected)
compiled = torch.compile(model, backend="sla2", options={"inner_backend": "aot_eager"})
torch.testing.assert_close(compiled(x), got)
print("wheel works")
