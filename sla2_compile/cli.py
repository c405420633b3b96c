"""The command `sla2`: recipes, inspect, calibrate, export, support, demo."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from sla2_compile.recipes import DEFAULT, Recipe, recipe_names
from sla2_compile.reports.listing import show

if TYPE_CHECKING:
    from sla2_compile.reports.report import Report

app = typer.Typer(help="Sparse-linear attention for PyTorch models.", no_args_is_help=True, add_completion=False)
console = Console()


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="Show one recipe in full.")] = None) -> None:
    """List the recipes that come with the package, or show one."""
    if name is not None:
        text = yaml.safe_dump(_checked(lambda: Recipe.of(name)).model_dump(mode="json"), sort_keys=False)
        console.print(text, soft_wrap=True, markup=False)
        return
    table = Table("recipe", "topk_ratio", "compression_ratio", "blocks", "alpha", "low bit", "QAT")
    for key in recipe_names():
        r = Recipe.named(key)
        mark = f"{key} (default)" if key == DEFAULT else key if r.method in ("sla2", key) else f"{key} ({r.method})"
        alpha = r.alpha if r.method == "sla2" else "-"
        row = (r.topk_ratio, r.compression_ratio, f"{r.block_q} x {r.block_k}", alpha, r.low_bit, r.qat)
        table.add_row(mark, *map(str, row))
    show(console, table)


@app.command()
def inspect(
    target: Annotated[str, typer.Argument(metavar="MODULE:FACTORY", help="The function that builds the model.")],
    recipe: Annotated[str, typer.Option(help="Name or YAML path.")] = DEFAULT,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="field=value of the recipe. May be repeated.")
    ] = None,
    pipeline: Annotated[str, typer.Option(help="Run these passes on the exported graph and print the graph.")] = "",
    json: Annotated[bool, typer.Option(help="Print the report as JSON.")] = False,
) -> None:
    """Report what transform would do with each attention call, without changing anything.

    FACTORY is called without arguments and returns (model, example_inputs) or (model, example_inputs, kwargs).
    """
    from sla2_compile.api import inspect as inspect_model

    fields = _checked(lambda: _fields(set_ or []))
    model, inputs, kwargs = _checked(lambda: _make(target))
    if pipeline:
        found = _checked(lambda: _run_passes(model, inputs, kwargs, pipeline))
    else:
        options = {"example_inputs": inputs, "example_kwargs": kwargs, **fields}
        found = _checked(lambda: inspect_model(model, recipe, **options))
    if json:
        console.print_json(data=found.to_dict())
    else:
        show(console, found.__rich__())


@app.command()
def calibrate(
    target: Annotated[str, typer.Argument(metavar="MODULE:FACTORY", help="The function that builds the model.")],
    recipe: Annotated[str, typer.Option(help="Name or YAML path, for a model not transformed yet.")] = DEFAULT,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="field=value of the recipe. May be repeated.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Batches to train on.")] = 400,
    lr: Annotated[float, typer.Option(help="Learning rate of the router.")] = 1e-3,
    budget: Annotated[float | None, typer.Option(help="Mean share of key blocks to keep.")] = None,
    max_error: Annotated[float | None, typer.Option(help="Largest relative error of a site.")] = None,
    seed: Annotated[int, typer.Option(help="Fixes all random choices.")] = 0,
    checkpoint: Annotated[Path | None, typer.Option(help="File to resume from, and to save to.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="File for what the sites learned; the recipe is saved beside it as YAML.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Image file for losses and error curves.")] = None,
    json: Annotated[bool, typer.Option(help="Print the result as JSON.")] = False,
) -> None:
    """Train routers and alpha of a model against its own full attention (stage 1), and report the errors.

    FACTORY is called without arguments and returns (model, batches); see sla2_compile.calibrate for batches. A model
    that is not transformed yet is transformed with --recipe.
    """
    from sla2_compile.training.calibration import command

    fields = _checked(lambda: _fields(set_ or []))
    model, batches, _ = _checked(lambda: _make(target))
    options: dict[str, Any] = {"steps": steps, "lr": lr, "budget": budget, "max_error": max_error, "seed": seed}
    options |= {"checkpoint": checkpoint, "progress": not json}
    found = _checked(lambda: command.run(model, batches, recipe, fields, options, out, plot))
    if json:
        console.print_json(data=found.to_dict())
    else:
        show(console, found.__rich__())


@app.command()
def compare(
    target: Annotated[str, typer.Argument(metavar="MODULE:FACTORY", help="The function that builds the model.")],
    recipe: Annotated[str, typer.Option(help="Name or YAML path, for what the rows have in common.")] = DEFAULT,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="field=value of the recipe. May be repeated.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="sla2, proxy, proxy2, topk, vmoba, sla or vsa. May be repeated; the first four if none."),
    ] = None,
    ratio: Annotated[
        list[float] | None, typer.Option(help="A topk_ratio. May be repeated; 0.05 to 0.25 if none.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed forwards of each row.")] = 3,
    plot: Annotated[Path | None, typer.Option(help="Image file for error over time.")] = None,
    json: Annotated[bool, typer.Option(help="Print the result as JSON.")] = False,
) -> None:
    """Compare the methods on a model, untrained: the error of its output, and its time.

    FACTORY is called without arguments and returns (model, example_inputs) or (model, example_inputs, kwargs).
    """
    from sla2_compile.comparison.run import RATIOS, UNTRAINED
    from sla2_compile.comparison.run import compare as compare_methods

    fields = _checked(lambda: _fields(set_ or []))
    model, inputs, kwargs = _checked(lambda: _make(target))
    options = {"methods": method or UNTRAINED, "ratios": ratio or RATIOS, "repeats": repeats, **fields}
    found = _checked(lambda: compare_methods(model, inputs, example_kwargs=kwargs, recipe=recipe, **options))
    if plot is not None:
        found.plot(plot)
    if json:
        console.print_json(data=found.to_dict())
    else:
        show(console, found.__rich__())


@app.command()
def export(
    target: Annotated[str, typer.Argument(metavar="MODULE:FACTORY", help="The function that builds the model.")],
    path: Annotated[Path, typer.Argument(help="The file to write.")],
    recipe: Annotated[str, typer.Option(help="For a model that is not transformed: name or YAML path.")] = DEFAULT,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="field=value of the recipe. May be repeated.")
    ] = None,
    dynamic: Annotated[
        list[str] | None,
        typer.Option(
            help="Sizes that may change: INPUT:AXIS,AXIS. INPUT is a position or a keyword. May be repeated."
        ),
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, fp16, int8 or fp8.")] = "fp32",
    form: Annotated[str, typer.Option(help="portable, opaque or inlined.")] = "portable",
    opset: Annotated[int | None, typer.Option(help="Of standard operators.")] = None,
    verify: Annotated[bool, typer.Option(help="Compare the file with the model.")] = True,
) -> None:
    """Write a model with SLA2 as an ONNX file.

    FACTORY is called without arguments and returns (model, example_inputs) or (model, example_inputs, kwargs).
    """
    from sla2_compile.api import transform
    from sla2_compile.export.onnx import export_onnx
    from sla2_compile.plan import plans

    fields = _checked(lambda: _fields(set_ or []))
    model, inputs, kwargs = _checked(lambda: _make(target))
    shapes = _checked(lambda: _dynamic(dynamic or [], inputs, kwargs))
    if not any(True for _ in plans(model)):
        options = {"example_inputs": inputs, "example_kwargs": kwargs, **fields}
        model = _checked(lambda: transform(model, recipe, **options))
    chosen: dict[str, Any] = {"precision": precision, "target": form, "opset": opset, "verify": verify}
    found = _checked(lambda: export_onnx(model, inputs, path, kwargs=kwargs, dynamic_shapes=shapes, **chosen))
    console.print(str(found), soft_wrap=True, markup=False, highlight=False)


@app.command()
def support() -> None:
    """Print which kernels and number formats run a call, and what each needs, as Markdown."""
    from sla2_compile.kernels.support_table import table

    typer.echo(table())


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def demo(context: typer.Context) -> None:
    """Run the demo on a photograph. Options are passed on, as in `sla2 demo --quick`. Needs a source checkout."""
    script = Path(__file__).resolve().parent.parent / "examples" / "demo.py"
    if not script.exists():
        _stop(f"the demo must run from a source checkout, got {script.parent} without it; clone the repository")
    raise typer.Exit(subprocess.call([sys.executable, str(script), *context.args]))


def _run_passes(model: Any, inputs: Any, kwargs: Any, text: str) -> Report:
    """Export the model, run the passes on its graph, print the graph, and return the report of its calls."""
    import torch

    from sla2_compile.debug import observers
    from sla2_compile.passes.graph.printer import graph_text
    from sla2_compile.passes.pipeline import Pipeline
    from sla2_compile.reports.report import Report

    passes = Pipeline.parse(text)
    gm = torch.export.export(model, tuple(inputs), dict(kwargs)).module()
    outcomes = passes.run(gm, observers())
    console.print(graph_text(gm), markup=False, highlight=False, soft_wrap=True)
    return Report(tuple(outcomes), None, "graph", {})


def _dynamic(given: list[str], inputs: Any, kwargs: Any) -> Any:
    """Turn INPUT:AXIS,AXIS into what torch.export takes; None if nothing is dynamic."""
    if not given:
        return None
    from torch.export import Dim

    names: list[Any] = [*range(len(inputs)), *kwargs]
    shapes: dict[Any, Any] = dict.fromkeys(names)
    for text in given:
        name, _, axes = text.partition(":")
        key = int(name) if name.isdigit() else name
        try:
            sizes = {int(axis): Dim.DYNAMIC for axis in axes.split(",")}
        except ValueError:
            sizes = {}
        if key not in shapes or not sizes:
            hint = f"inputs are {', '.join(map(str, names))}; for example --dynamic 0:0,1"
            raise ValueError(f"--dynamic must be INPUT:AXIS,AXIS, got {text!r}; {hint}")
        shapes[key] = sizes
    return tuple(shapes.values())


def _fields(pairs: list[str]) -> dict[str, Any]:
    fields = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign:
            raise ValueError(f"--set must look like field=value, got {pair!r}; for example --set topk_ratio=0.1")
        fields[key.strip()] = yaml.safe_load(value)
    return fields


def _make(target: str) -> tuple[Any, Any, Any]:
    module, colon, factory = target.partition(":")
    if not colon:
        raise ValueError(f"target must be MODULE:FACTORY, got {target!r}; for example my_model:build")
    sys.path.insert(0, str(Path.cwd()))
    try:
        make = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"target must be importable from here, got {error}; check module and name") from error
    made = make()
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        kind = type(made).__name__
        raise ValueError(f"{factory} must return (model, example_inputs[, kwargs]), got {kind}; return such a tuple")
    model, inputs = made[0], made[1]
    return model, inputs, made[2] if len(made) == 3 else {}


def _checked(action: Any) -> Any:
    """Run action. On a ValueError, which is a user's mistake, print the message without a traceback and exit."""
    try:
        return action()
    except ValueError as error:
        _stop(str(error))


def _stop(message: str) -> None:
    Console(stderr=True).print(message, style="red", highlight=False, markup=False)
    raise typer.Exit(2)
