"""Stage 1: images to an ordered line of continuous latents, and any prefix of it back to pixels.

Every class that a config can name is a public name of this package (`__init__.pyi` lists them), imported when it is
first used: `from stage1_tokenizer import Tokenizer` loads neither Lightning nor what draws reports. Configs and exports
record these names, so that moving a file breaks nobody's checkpoint.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
