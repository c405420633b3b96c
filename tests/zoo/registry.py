"""Every model of the zoo, family by family."""

from __future__ import annotations

import logging
import os
import warnings

# a registry of models prints advice about configurations that nobody will train
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "critical")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
logging.getLogger("torch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module=r"(transformers|diffusers)(\..*)?")

try:
    from tests.zoo import (
        diffusers_image,
        diffusers_video,
        hand_written,
        hand_written_jit,
        torch_nn,
        transformers_text,
        transformers_vision,
    )
except ImportError as error:
    if error.name in ("transformers", "diffusers"):
        raise ImportError(f"the zoo needs {error.name}, got none; pip install 'sla2_compile[zoo]'") from error
    raise

FAMILIES = (
    diffusers_image,
    diffusers_video,
    transformers_vision,
    transformers_text,
    torch_nn,
    hand_written_jit,
    hand_written,
)

ENTRIES = [entry for family in FAMILIES for entry in family.ENTRIES]
