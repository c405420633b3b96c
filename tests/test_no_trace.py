"""Planning leaves no trace: whatever a forward changes, and wherever it is held, is as it was before."""

from __future__ import annotations

import array
import gc
import itertools
import random
import threading
import weakref
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sla2_compile
from sla2_compile.modules.restoring.copy_on_write import CopyOnWrite
from sla2_compile.modules.restoring.leave_alone import left_alone
from tests import models

ANY: dict[str, Any] = {"min_seq_len": 0}
Pair = namedtuple("Pair", "ids row")


@pytest.fixture(params=["transform", "inspect", "fails"])
def plan(request):
    """Plan a model; or plan one whose forward raises at its end."""

    def run(model, *inputs, **kwargs):
        if request.param == "fails":
            model.fails = True
            with pytest.raises(ValueError, match="not today"):
                sla2_compile.transform(model, example_inputs=inputs, **ANY)
            del model.fails
        else:
            getattr(sla2_compile, request.param)(model, example_inputs=inputs, **ANY)

    return run


class Model(models.Attention):
    """Attention after a change of the model's state: `change(model, x)`."""

    def __init__(self, change, **state):
        super().__init__()
        self.change = change
        for name, value in state.items():
            setattr(self, name, value)

    def forward(self, x):
        self.change(self, x)
        x = super().forward(x)
        if "fails" in self.__dict__:
            raise RuntimeError("not today")
        return x


def test_an_ordered_dict_keeps_its_order_and_works(x, plan):
    def change(s, x):
        n = x.shape[1]
        if n not in s.table:
            s.table[n] = torch.linspace(0, 1, n)[:, None]
        while len(s.table) > 1:
            s.table.popitem(last=False)
        s.table.move_to_end(n)

    model = Model(change, table=OrderedDict())
    model(x[:, :64])
    first = model.table[64]
    plan(model, x)
    assert list(model.table) == [64]
    assert model.table[64] is first
    model(x)
    assert list(model.table) == [x.shape[1]]


class Holder:
    def __init__(self, value):
        self.value = value


class Slotted:
    __slots__ = ("late", "value")

    def __init__(self, value):
        self.value = value


def _through(reach):
    def change(s, x):
        t = reach(s)
        t.index_copy_(0, torch.tensor([1]), torch.full((1, 3), 7.0))
        t[2:] = 5.0

    return change


TENSOR = {
    "attribute": (lambda t: t, lambda s: s.held),
    "list": (lambda t: [[t]], lambda s: s.held[0][0]),
    "dict": (lambda t: {"a": {"b": t}}, lambda s: s.held["a"]["b"]),
    "namespace": (lambda t: SimpleNamespace(t=t), lambda s: s.held.t),
    "object": (lambda t: Holder([t]), lambda s: s.held.value[0]),
    "slots": (Slotted, lambda s: s.held.value),
    "closure": (lambda t: lambda: t, lambda s: s.held()),
    "parameter": (nn.Parameter, lambda s: s.held.detach()),
    "data": (nn.Parameter, lambda s: s.held.data),
    "view": (lambda t: t[:, :], lambda s: s.held.view(4, 3)),
    "numpy": (lambda t: t, lambda s: torch.from_numpy(s.held.numpy())),
    "sparse": (lambda t: t.to_sparse(), lambda s: s.held.mul_(2).to_dense()),
}


@pytest.mark.parametrize("where", TENSOR)
def test_tensors_are_put_back_wherever_they_are_held(x, plan, where):
    wrap, reach = TENSOR[where]
    t = torch.arange(12.0).view(4, 3).clone()
    model = Model(_through(reach), held=wrap(t))
    held, before = model.held, t.clone()
    plan(model, x)
    assert model.held is held
    assert torch.equal(t, before)
    if where == "sparse":
        assert torch.equal(held.to_dense(), before)


WRITES = {
    "add_": lambda t: t.add_(1),
    "out": lambda t: torch.add(t, 1, out=t),
    "foreach": lambda t: torch._foreach_mul_([t], 2.0),
    "setitem": lambda t: t.__setitem__((slice(None), 1), 3.0),
    "init": lambda t: nn.init.normal_(t),
    "renorm": lambda t: F.embedding(torch.tensor([1, 2]), t, max_norm=0.1),
    "batch norm": lambda t: F.batch_norm(torch.randn(8, 3), t[0], t[1], training=True),
    "lerp_": lambda t: t.lerp_(t + 1, 0.5),
    "resize_": lambda t: t.resize_(20, 3).zero_(),
    "transpose_": lambda t: t.t_().fill_(2),
    "set_": lambda t: t.set_(torch.zeros(2)),
    "data": lambda t: setattr(t, "data", t.data * 2),
    "dtype": lambda t: setattr(t, "data", t.data.double()),
}


@pytest.mark.parametrize("how", WRITES)
@pytest.mark.parametrize("inference", [False, True])
def test_every_way_to_write(x, how, inference):
    t = torch.arange(1.0, 13.0).view(4, 3).clone()
    before, memory = t.clone(), t.untyped_storage()._cdata

    def change(s, x):
        with torch.inference_mode(inference):
            WRITES[how](t)

    sla2_compile.inspect(Model(change), example_inputs=(x,), **ANY)
    assert torch.equal(t, before)
    assert t.dtype is before.dtype
    assert t.untyped_storage()._cdata == memory


def test_only_what_was_there_before_is_copied(x, monkeypatch):
    made = []

    class Kept(CopyOnWrite):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr("sla2_compile.modules.restoring.leave_alone.CopyOnWrite", Kept)
    t = torch.zeros(3)

    def change(s, x):
        y = torch.zeros(50) + 1
        y[3:].mul_(2)
        t.add_(y[:3])
        t.add_(1)

    sla2_compile.inspect(Model(change), example_inputs=(x,), **ANY)
    (writes,) = made
    assert [storage.nbytes() for storage, _ in writes.copies.values()] == [12]
    assert t.tolist() == [0.0] * 3


def test_a_static_cache_and_its_position(x, plan):
    def change(s, x):
        s.keys[:, s.pos : s.pos + x.shape[1]] = x
        s.pos += x.shape[1]
        s.steps.add_(1)

    model = Model(change, keys=torch.zeros(2, 220, 32), pos=20, steps=torch.zeros(()))
    plan(model, x)
    assert model.pos == 20
    assert model.steps == 0
    assert not model.keys.any()


def test_generators_do_not_advance(x, plan):
    def change(s, x):
        torch.randn(3, generator=s.own[0])
        s.python.random(), s.legacy.rand(), s.numpy.random()
        random.random(), np.random.rand(), torch.rand(3), torch.rand(1, generator=outside)

    outside = torch.Generator().manual_seed(4)
    state = {
        "own": [torch.Generator().manual_seed(3)],
        "python": random.Random(1),
        "legacy": np.random.RandomState(2),
        "numpy": np.random.default_rng(3),
    }
    model = Model(change, **state)

    def draw():
        return [
            torch.rand(1, generator=model.own[0]).item(),
            model.python.random(),
            model.legacy.rand(),
            model.numpy.random(),
            random.random(),
            np.random.rand(),
            torch.rand(1).item(),
            torch.rand(1, generator=outside).item(),
        ]

    generators = (model.own[0], outside)
    states = [g.get_state() for g in generators], [model.python.getstate(), random.getstate()]
    numpys = model.legacy.get_state(), model.numpy.bit_generator.state, np.random.get_state()
    default = torch.get_rng_state()
    expected = draw()
    for g, state in zip(generators, states[0], strict=True):
        g.set_state(state)
    model.python.setstate(states[1][0]), random.setstate(states[1][1])
    model.legacy.set_state(numpys[0]), np.random.set_state(numpys[2]), torch.set_rng_state(default)
    model.numpy.bit_generator.state = numpys[1]
    plan(model, x)
    assert draw() == expected


def _grow(y):
    y.append(3)
    y.popleft() if isinstance(y, deque) else y.pop(0)


def _slots(y):
    y.late, y.value = 1, 2


def _attributes(y):
    y.value, y.new = 5, 6


def _of_this_thread():
    y = threading.local()
    y.value = 1
    return y


OBJECTS = {
    "list": (lambda: [1, 2], _grow, list),
    "deque": (lambda: deque([1, 2], maxlen=2), _grow, list),
    "set": (lambda: {1, 2}, lambda y: y.add(3), set),
    "counter": (lambda: Counter("aab"), lambda y: y.update("b"), dict),
    "defaultdict": (lambda: defaultdict(list, a=[1]), lambda y: y["b"].append(2), dict),
    "array": (lambda: np.arange(3), lambda y: y.__setitem__(0, 9), np.ndarray.tolist),
    "bytearray": (lambda: bytearray(b"ab"), lambda y: y.extend(b"c"), bytes),
    "python array": (lambda: array.array("i", [1, 2]), lambda y: y.append(3), list),
    "count": (lambda: itertools.count(5, 2), next, repr),
    "iterator": (lambda: iter([1, 2, 3]), next, lambda y: y.__reduce__()[2]),
    "slots": (lambda: Slotted(1), _slots, lambda y: (y.value, hasattr(y, "late"))),
    "object": (lambda: Holder(1), _attributes, lambda y: dict(vars(y))),
    "namespace": (lambda: SimpleNamespace(value=1), _attributes, lambda y: dict(vars(y))),
    "of this thread": (_of_this_thread, _attributes, lambda y: dict(vars(y))),
    "dict": (lambda: OrderedDict(a=1, b=2), lambda y: y.move_to_end("a"), lambda y: list(y.items())),
}
PLACES = {
    "attribute": (lambda y: y, lambda h: h),
    "list": (lambda y: [y], lambda h: h[0]),
    "named tuple in a list": (lambda y: [Pair(y, 0)], lambda h: h[0].ids),
    "deque": (lambda y: deque([(y,)]), lambda h: h[0][0]),
    "dict": (lambda y: {"a": OrderedDict(b=y)}, lambda h: h["a"]["b"]),
    "slots": (Slotted, lambda h: h.value),
    "object that holds the model": (lambda y: Holder([nn.Identity(), y]), lambda h: h.value[1]),
    "partial": (lambda y: partial(lambda z: z, y), lambda h: h.args[0]),
    "closure": (lambda y: lambda: y, lambda h: h()),
    "module outside": (lambda y: [Model(None, held=y)], lambda h: h[0].held),
}


@pytest.mark.parametrize("kind", OBJECTS)
@pytest.mark.parametrize("place", PLACES)
def test_objects_are_put_back_wherever_they_are_held(kind, place):
    make, touch, read = OBJECTS[kind]
    wrap, reach = PLACES[place]
    held = make()
    model = Model(None, held=wrap(held))
    container, before = model.held, read(held)
    with left_alone(model, (), largest=1):
        touch(reach(model.held))
        changed = read(reach(model.held))
    assert model.held is container
    assert reach(model.held) is held
    assert read(held) == before
    assert changed != before


def test_all_kinds_of_objects_through_a_plan(x, plan):
    def change(s, x):
        for name, (_, touch, _) in OBJECTS.items():
            touch(s.held[name])

    held = {name: make() for name, (make, _, _) in OBJECTS.items()}
    before = {name: read(held[name]) for name, (_, _, read) in OBJECTS.items()}
    model = Model(change, held=dict(held))
    plan(model, x)
    assert all(model.held[name] is y for name, y in held.items())
    assert {name: read(held[name]) for name, (_, _, read) in OBJECTS.items()} == before


def test_a_bound_next_does_not_advance(x):
    model = Model(lambda s, x: s.number(), number=itertools.count(3).__next__)
    number = model.number
    sla2_compile.transform(model, example_inputs=(x,), **ANY)
    assert model.number is number
    assert number() == 3


def test_data_of_classes_is_put_back(x, plan):
    class Counting(Model):
        calls, tables = 0, {}

    def change(s, x):
        Counting.calls += 1
        Counting.tables[x.shape[1]] = x
        Counting.fresh = 1

    model = Counting(change)
    plan(model, x)
    assert Counting.calls == 0
    assert Counting.tables == {}
    assert not hasattr(Counting, "fresh")


def test_gradients_and_requires_grad_are_put_back(x, plan):
    def change(s, x):
        with torch.enable_grad():
            (s.qkv.weight.sum() + s.out_grad.sum()).backward()
        s.frozen.requires_grad_(False)

    grad = torch.ones(3)
    model = Model(change, out_grad=nn.Parameter(torch.zeros(3)), frozen=nn.Parameter(torch.zeros(3)))
    model.out_grad.grad = grad
    plan(model, x)
    assert model.qkv.weight.grad is None
    assert model.frozen.requires_grad
    assert model.out_grad.grad is grad
    assert grad.tolist() == [1.0] * 3


def test_objects_in_the_inputs_are_put_back(x):
    class Shared(Holder):
        def __deepcopy__(self, memo):
            return self

    class Cached(models.Attention):
        def forward(self, x, cache):
            cache.value[0].add_(1)
            cache.value.append(x)
            return super().forward(x)

    cache = Shared([torch.zeros(3)])
    sla2_compile.transform(Cached(), example_inputs=(x, cache), **ANY)
    assert len(cache.value) == 1
    assert not cache.value[0].any()


def test_hooks_that_count_are_put_back(x, plan):
    model = Model(lambda s, x: None)
    calls = [0]

    def hook(module, args, output):
        calls[0] += 1

    model.register_forward_hook(hook)
    plan(model, x)
    assert calls == [0]


def test_compiled_blocks_keep_their_state(x, plan):
    class Block(models.Attention):
        def __init__(self):
            super().__init__()
            self.seen = torch.zeros(3)

        @torch.compile(backend="eager")
        def forward(self, x):
            self.seen.add_(1)
            return super().forward(x)

    model = Model(lambda s, x: s.block(x), block=Block())
    plan(model, x)
    assert not model.block.seen.any()


def test_a_fake_run_leaves_no_trace(x):
    def change(s, x):
        s.steps += 1
        s.table.append(1)
        s.one.add_(1)

    model = Model(change, steps=0, table=deque(), one=torch.zeros(1))
    sla2_compile.transform(model, example_inputs=(x,), discover="fake", **ANY)
    assert (model.steps, len(model.table)) == (0, 0)
    assert not model.one.any()


@pytest.mark.parametrize("managed", [False, True])
def test_hooks_that_move_weights_keep_their_state(x, managed):
    """An object that swaps weights knows itself what is where; a library's attribute tells that there is one."""

    class Manager:
        active = False

        def __call__(self, module, args):
            self.active = True

    model, manager = models.Attention(), Manager()
    model.qkv.register_forward_pre_hook(manager)
    if managed:
        model.qkv._diffusers_hook = None
    sla2_compile.inspect(model, example_inputs=(x,), **ANY)
    assert manager.active is managed


@pytest.mark.parametrize("discover", ["real", "fake"])
def test_a_restored_model_goes_when_nobody_holds_it(discover, x):
    """What planning recorded refers to itself, but not to the model: no garbage collection is needed."""
    sla2_compile.restore(sla2_compile.transform(models.Net(depth=1), example_inputs=(x,), min_seq_len=0))
    gc.collect()
    gc.disable()
    try:
        model = sla2_compile.transform(models.Net(depth=1), example_inputs=(x,), min_seq_len=0, discover=discover)
        gone = [weakref.ref(model), *map(weakref.ref, model.parameters())]
        sla2_compile.restore(model)
        del model
        assert [ref() for ref in gone if ref() is not None] == []
    finally:
        gc.enable()
