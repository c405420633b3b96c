"""Each model of the zoo is found, rewritten, restored, trained, compiled and exported as its entry says."""

from __future__ import annotations

import pytest

from tests.zoo import check
from tests.zoo.entry import Entry
from tests.zoo.file import PARITY, in_onnxruntime
from tests.zoo.registry import ENTRIES

EACH = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
REWRITTEN = pytest.mark.parametrize("entry", [e for e in ENTRIES if e.rewritten], ids=lambda entry: entry.name)


def test_names_are_unique():
    names = [entry.name for entry in ENTRIES]
    assert len(set(names)) == len(names) >= 25


@EACH
def test_every_call_is_accounted_for(entry: Entry):
    calls = check.calls(entry)
    assert calls.rewritten == entry.rewritten
    assert calls.left == {reason.value: count for reason, count in entry.left.items()}


@EACH
def test_planned_calls_run_as_planned(entry: Entry):
    assert check.calls(entry).fallbacks == {}


@EACH
def test_all_key_blocks_give_full_attention(entry: Entry):
    parity = check.parity(entry)
    assert parity.error <= parity.allowed


@REWRITTEN
def test_few_key_blocks_do_not(entry: Entry):
    assert check.effect(entry) > 10 * check.parity(entry).difference


@EACH
def test_restore_is_exact(entry: Entry):
    assert check.restores(entry)


@REWRITTEN
def test_gradients_reach_every_alpha(entry: Entry):
    assert check.alphas(entry) >= entry.rewritten
    assert check.without_gradient(entry) == ()


@EACH
def test_compile_keeps_the_sites(entry: Entry):
    expect(check.compiled(entry), entry, entry.compiled)


@EACH
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_keeps_the_sites(entry: Entry, strict: bool):
    expect(check.exported(entry, strict), entry, entry.strict if strict else entry.exported)


@EACH
def test_exported_program_is_transformed(entry: Entry):
    program = check.program(entry)
    assert program.rewritten == (entry.rewritten if entry.program is None else entry.program)
    assert program.parity.error <= program.parity.allowed


@EACH
def test_the_backend_takes_the_same_calls(entry: Entry):
    backend = check.backend(entry)
    assert backend.rewritten == (entry.rewritten if entry.program is None else entry.program)
    assert backend.parity.error <= backend.parity.allowed


@REWRITTEN
def test_autocast_keeps_the_sites(entry: Entry):
    assert check.under_autocast(entry) == (entry.rewritten if entry.autocast is None else entry.autocast)


@REWRITTEN
def test_the_file_gives_what_the_model_gives(entry: Entry):
    file = in_onnxruntime(entry)
    expected = entry.rewritten if entry.file is None else entry.file
    if isinstance(expected, str) and expected != "model":
        assert expected in str(file.outcome)
    else:
        assert file.outcome == expected, file.failure
    assert file.error <= PARITY


def expect(traced: check.Traced, entry: Entry, expected: int | str | None) -> None:
    """A trace has as many sites as the entry says, and gives what eager mode gives."""
    assert traced.outcome == (entry.rewritten if expected is None else expected), traced.failure
    if traced.difference is not None:
        assert traced.difference <= check.SAME
