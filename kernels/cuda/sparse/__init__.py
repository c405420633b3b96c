"""`sla2::sparse_attention` and its backward on a GPU: one softmax over selected key blocks and pooled terms.

    pool.py       mean of the keys and values of each key block, and the spread of its keys
    tail.py       what the kernels share: the pooled terms of some key blocks, and which of them count
    attend.py     forward
    rows.py       backward: what each query row needs, and dq of the pooled terms
    terms.py      backward: the gradients of the pooled terms themselves
    keys.py       backward: dk and dv
    cuts.py       how they are cut
    launches.py   the forward's launches; backward_launches.py the backward's

`reference/methods.py` specifies what they compute.
"""
