"""Optional libraries: imported at the call that needs them, with an error that names the extra to install."""

import importlib
from types import ModuleType


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional library.

    Args:
        module: Name to import, dots allowed.
        extra: Extra of this package that brings it.
        purpose: What needs it, the subject of the error message.

    Returns:
        The module.

    Raises:
        ImportError: if it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        message = f"{purpose} needs the library {module} ({error}); install it with: pip install 'evkernels[{extra}]'"
        raise ImportError(message) from error
