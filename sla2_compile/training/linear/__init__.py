"""Linear layers in 8 bits around the sites, by torchao: the recipe's `quantize_linear`.

| place | one idea |
|---|---|
| `layers.py` | which layers the recipe means, and why others stay as they are |
| `state.py` | prepared and converted layers in their model: the switch, and the way back |
| `by_torchao.py` | how torchao makes them; the one file here that needs it |
"""
