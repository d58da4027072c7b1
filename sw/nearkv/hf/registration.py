# SPDX-License-Identifier: Apache-2.0
"""Makes `attn_implementation="nearkv"` known to transformers, whichever is imported first.

transformers takes seconds to import and is optional, so importing nearkv must not import it, and yet
`from_pretrained` has to find the name. If transformers is there already it is told at once; otherwise
a finder waits for its `modeling_utils`, steps aside, and tells it then.
"""

import importlib.abc
from importlib.machinery import PathFinder
import sys

NAME = "nearkv"
_WAIT_FOR = "transformers.modeling_utils"


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname != _WAIT_FOR:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                _register()

            spec.loader.exec_module = exec_module
        return spec


def install() -> None:
    """Register now, or as soon as transformers is imported."""
    if _WAIT_FOR in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def _attention(*args, **kwargs):
    from .attention import attention_forward

    return attention_forward(*args, **kwargs)


def _mask(*args, **kwargs):
    from .attention import mask_function

    return mask_function(*args, **kwargs)
