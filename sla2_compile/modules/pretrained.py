"""Load what sites learned from the folder that `from_pretrained` loaded their model from.

transformers and diffusers build a model before it has sites, and drop the sites' values in a checkpoint. The model
keeps the name of its folder, so sites that it gets later start from the values saved there.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sla2_compile.modules.frames import plain
from sla2_compile.modules.redirect import CHILD
from sla2_compile.passes.sites.progress import KEY
from sla2_compile.passes.sites.site import Site

log = logging.getLogger("sla2_compile")


def begin_as_saved(model: nn.Module, sites: Mapping[str, Site]) -> None:
    """Give sites the values saved for them in their model's folder; sites without saved values keep theirs.

    Args:
        model: made by `from_pretrained`, or a module that holds such models; for others nothing is loaded.
        sites: by their name in model, before they are installed.

    Warns:
        UserWarning: values in a folder match no site by name and shape, and stay unused.
    """
    names = {plain(name): module for name, module in model.named_modules() if _folder(module) is not None}
    for name, module in names.items():
        # the parts of a transformers model share its configuration
        if any(name != outer and f"{name}.".startswith(f"{outer}." if outer else "") for outer in names):
            continue
        folder, prefix = _folder(module), f"{name}." if name else ""
        inside = {key.removeprefix(prefix): site for key, site in sites.items() if key.startswith(prefix)}
        if folder is not None and inside:
            _fill(inside, _saved(folder), folder)


def _folder(module: nn.Module) -> Path | None:
    """The local folder that a module was loaded from, or its folder in the hub's cache; None if there is none."""
    # the names in transformers and diffusers; vars() does not run properties of other libraries' classes
    config = vars(module).get("config", vars(module).get("_internal_dict"))
    name = getattr(config, "_name_or_path", None)
    if not isinstance(name, (str, Path)) or not str(name):
        return None
    if Path(name).is_dir():
        return Path(name)
    commit = getattr(config, "_commit_hash", None)
    if commit is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(str(name), "config.json", revision=commit)
    return Path(file).parent if isinstance(file, str) else None


def _saved(folder: Path) -> dict[str, Tensor]:
    """All tensors of sites in the safetensors files of a folder, by name."""
    found: dict[str, Tensor] = {}
    # a file without a variant in its name comes before those with one
    for file in sorted(folder.glob("*.safetensors"), key=lambda file: (len(file.name), file.name)):
        from safetensors import safe_open

        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (no dict)
                if CHILD in key.split(".") and key not in found:
                    found[key] = tensors.get_tensor(key)
    return found


@torch.no_grad()
def _fill(sites: Mapping[str, Site], saved: dict[str, Tensor], folder: Path) -> None:
    unused, taken = {key for key in saved if not key.endswith(KEY)}, 0
    for name, site in sites.items():
        for key, parameter in site.named_parameters(name):
            source = _same(key, saved)
            if source is not None and saved[source].shape == parameter.shape and not parameter.is_meta:
                parameter.copy_(saved[source])
                unused.discard(source)
                taken += 1
        source = _same(f"{name}.{KEY}", saved)
        if source is not None:
            site.take_progress(saved[source])
    if taken:
        log.info("%d parameters of sites begin with what %s holds", taken, folder)
    if unused:
        some = ", ".join(sorted(unused)[:3]) + (", ..." if len(unused) > 3 else "")
        warnings.warn(
            f"{folder} holds {len(unused)} parameters that sites learned, and no site takes them: {some}; transform "
            "the model with the recipe that it was saved with, or set them by load_state_dict",
            stacklevel=2,
        )


def _same(key: str, saved: Mapping[str, Tensor]) -> str | None:
    """The name of key in a checkpoint of this model, of a model around it or of a part of it; None if not unique."""
    if key in saved:
        return key
    near = [name for name in saved if name.endswith(f".{key}") or key.endswith(f".{name}")]
    return near[0] if len(near) == 1 else None
