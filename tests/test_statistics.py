"""`get_sla2_statistics`: what its errors count."""

from __future__ import annotations

import pytest
import torch

import sla2_compile
from sla2_compile.passes.sites.rules import Reason
from tests import models


def test_the_error_counts_sites_that_kept_full_attention():
    x = torch.randn(1, 256, 32)
    model = sla2_compile.transform(models.Net(depth=3), example_inputs=(x,), min_seq_len=0)
    sites = [block.sla2[0] for block in model.blocks]
    for site, calls, said in ((sites[0], 1, "1 of 3 sites: 1 x"), (sites[2], 2, "2 of 3 sites: 3 x")):
        for _ in range(calls):
            site.count(Reason.DROPOUT)
        with pytest.raises(ValueError, match=f"got full attention at {said} {Reason.DROPOUT.value}"):
            sla2_compile.get_sla2_statistics(model)
