"""On the path of launched jobs: DeepSpeed compiles no shared-memory kernel, which takes a minute or two and changes no result."""

import importlib.abc
import importlib.util
import sys


class _Ops(importlib.abc.MetaPathFinder):
    """Lets deepspeed.ops be found by others, and edits its table once it is loaded."""

    def find_spec(self, name, path=None, target=None):
        if name != "deepspeed.ops":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def edited(module):
            run(module)
            module.__compatible_ops__["deepspeed_shm_comm"] = False

        spec.loader.exec_module = edited
        return spec


sys.meta_path.insert(0, _Ops())
