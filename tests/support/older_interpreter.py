"""Makes the interpreters of older Triton releases compute what the newest one, and a GPU, computes.

3.6 takes no tensor as a loop bound with numpy 2.4, to which an array of one element is no number any more. In 3.6 and
3.7 `tl.maximum` and `tl.minimum` of NaN and a number are NaN; on a GPU, unless asked otherwise, they are the number.
"""

import numpy as np
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder


def _patch_lang_tensor(tensor, scope, stock=interpreter._patch_lang_tensor):
    stock(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def install() -> None:
    """Patches the interpreter of this process; where it is new enough, to no effect."""
    interpreter._patch_lang_tensor = _patch_lang_tensor
    InterpreterBuilder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    InterpreterBuilder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
