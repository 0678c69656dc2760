"""A GPU that is not there, for Triton to compile for."""

from __future__ import annotations

import types


class Machine:
    """A GPU as Triton sees it, which compiles what is launched and launches nothing."""

    def __init__(self, capability, shared):
        self.capability, self.kernels = capability, {}
        self.utils = types.SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": shared},
            load_binary=lambda name, binary, shared, device: (None, None, 0, 0, 1024),
        )

    def get_current_target(self):
        import triton

        return triton.backends.compiler.GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return 1000 + self.capability  # Triton keeps what it compiled by this number

    def get_current_stream(self, device):
        return 0

    def launcher_cls(self, source, metadata):
        self.kernels[metadata.name] = metadata.shared
        return lambda *arguments: None
