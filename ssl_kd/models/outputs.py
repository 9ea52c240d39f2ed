"""What every module of a forward returns, in order: for finding where numbers stop being numbers."""

import contextlib
from collections import Counter
from collections.abc import Generator
from typing import Any

import flax.linen as nn
from flax.core.tracers import current_trace


@contextlib.contextmanager
def module_outputs() -> Generator[list[tuple[str, Any]]]:
    """Lists (name, output) of the calls of `Networks`' modules made inside, an inner module's before its outer one's.

    A name is the path, as 'student/backbone/Conv_0', and of a module called before '… (call 2)'. What happens within a
    transformation of its own, as in a block that is recomputed (`remat`), stays there: the block's output is listed.
    """
    outputs: list[tuple[str, Any]] = []
    calls: Counter[str] = Counter()
    outside = current_trace()

    def intercept(function, args, kwargs, context):
        out = function(*args, **kwargs)
        # A property of an unbound module comes here too, and has no path.
        if context.method_name == "__call__" and current_trace() == outside:
            name = "/".join(context.module.path)
            calls[name] += 1
            outputs.append((name if calls[name] == 1 else f"{name} (call {calls[name]})", out))
        return out

    with nn.intercept_methods(intercept):
        yield outputs
