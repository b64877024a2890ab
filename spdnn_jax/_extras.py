"""Optional packages: imported where they are needed, with a message that names the extra which holds them."""

import importlib
from types import ModuleType


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Imports an optional module.

    Args:
        module: Dotted name, such as ``"safetensors.numpy"``.
        extra: The extra of this package that installs it.
        purpose: What the caller needs it for, as the subject of a sentence: ``"saving a plan"``.

    Returns:
        The module.

    Raises:
        ImportError: The module is not installed; the message says which extra to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        if error.name is None or error.name.split(".")[0] != package:
            raise
        raise ImportError(f"{purpose} needs {package}: pip install 'spdnn_jax[{extra}]'", name=package) from None
