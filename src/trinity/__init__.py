"""Trinity: own a frontier-style sparse language model.

import trinity
m = trinity.load("path/to/model")
m.generate("def fibonacci(n):", max_new_tokens=64).text
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trinity.engine.loaded import load

__all__ = ["load"]


def __getattr__(name: str) -> object:
    """The public names, imported when first used so that `import trinity` stays light."""
    if name == "load":
        from trinity.engine.loaded import load

        return load
    raise AttributeError(f"module 'trinity' has no attribute '{name}'")
