"""`sla2::sparse_attention` and its backward on a GPU: one softmax over selected key blocks and pooled terms.

    pool.py       mean of the keys and values of each key block, and the spread of its keys
    tail.py       what the kernels share: the pooled terms of some key blocks, and which of them count
    attend.py     forward
    rows.py       backward: what each query row needs, and dq of the pooled terms
    terms.py      backward: the gradients of the pooled terms themselves
    keys.py       backward: dk and dv
    cuts.py       how they are cut
    pooled.py     what holds the pooled terms
    launches.py   the forward's launches; backward_launches.py the backward's

Hopper has kernels of its own, in Gluon, for the calls that `kernels/support.py` calls fused:

    logs.py, attend_sm90.py                                                     forward
    row_terms.py, queries_sm90.py, terms_sm90.py, pieces.py, keys_sm90.py       backward
    cuts_sm90.py                                                                how they are cut
    sm90.py                                                                     their launches

`reference/methods.py` specifies what they compute.
"""
