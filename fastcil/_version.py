"""The version of fastcil, read by the build and by ``fastcil.__version__``."""

__version__ = "0.1.0"
