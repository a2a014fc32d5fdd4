"""Stage 2: a prior over lines of continuous latents, conditioned on captions. Public names: see `__init__.pyi`."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
