# SPDX-License-Identifier: Apache-2.0
"""Makes `attn_implementation="nearkv"` known to transformers, whichever is imported first.

transformers takes seconds to import and is optional, so importing nearkv must not import it, and yet
`from_pretrained` has to find the name. If transformers is there already it is told at once; otherwise
a finder waits for its `modeling_utils`, steps aside, and tells it then.
"""

import functools
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
    from transformers.modeling_utils import AttentionInterface, PreTrainedModel

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    _refuse_early(PreTrainedModel)


def _refuse_early(model_class) -> None:
    """Let model classes that cannot have the attention say so.

    transformers takes any registered name for any model, and those that never ask the registry fail
    later with `KeyError: 'nearkv'`, or do not use it. There is no hook, so its check is extended.
    """
    check = model_class.get_correct_attn_implementation

    @functools.wraps(check)
    def checked(self, requested_attention, *args, **kwargs):
        if requested_attention == NAME:
            from .support import class_problem

            if problem := class_problem(type(self)):
                raise ValueError(
                    f'attn_implementation="{NAME}" is not for this model: {problem}; load it '
                    "without, and use another cache than NearStorageCache"
                )
        return check(self, requested_attention, *args, **kwargs)

    model_class.get_correct_attn_implementation = checked


def _attention(*args, **kwargs):
    from .attention import attention_forward

    return attention_forward(*args, **kwargs)


def _mask(*args, **kwargs):
    from .attention import mask_function

    return mask_function(*args, **kwargs)
