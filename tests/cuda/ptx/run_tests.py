"""Runs the emulator's GoogleTests on the PTX that nvcc emitted: run_tests.py LIBRARY PTX [options] [GoogleTest flags].

LIBRARY is nvcc's object, fake_cudart.cpp and the tests, linked together. `test_ptx.py` builds it and calls this.
"""

import argparse
import ctypes
import sys
import traceback
from pathlib import Path

import numpy as np
import ptxsim

Address, Size = ctypes.c_uint64, ctypes.c_size_t
Launch = ctypes.CFUNCTYPE(
    ctypes.c_void_p,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    Size,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_int,
    ctypes.c_uint,
    ctypes.c_int64,
)
AddBuffer = ctypes.CFUNCTYPE(None, Address, Address, ctypes.c_char_p, ctypes.c_bool)
RemoveBuffer = ctypes.CFUNCTYPE(None, Address)


RANDOM_ORDER = 2  # simt::Order::Random


class Callbacks(ctypes.Structure):
    _fields_ = (("launch", Launch), ("add_buffer", AddBuffer), ("remove_buffer", RemoveBuffer))


class Device:
    """What fake_cudart.cpp talks to."""

    def __init__(self, library: ctypes.CDLL, machine: ptxsim.Machine, rules: bool = True) -> None:
        self.machine, self.rules = machine, rules
        self.launches = 0
        self._message = b""
        self._callbacks = Callbacks(Launch(self._launch), AddBuffer(self._add), RemoveBuffer(machine.memory.remove))
        library.fake_cudart_connect(ctypes.byref(self._callbacks))

    def _add(self, address: int, size: int, name: bytes, initialised: bool) -> None:
        self.machine.memory.add(address, size, name.decode(), initialised)

    def _launch(
        self,
        name: bytes,
        dims: list[int],
        dynamic_shared: int,
        arguments: list[int],
        order: int,
        seed: int,
        first_block: int,
    ) -> int:
        machine, message = self.machine, ""
        self.launches += 1
        machine.memory.open = True  # tests may also use memory that they did not register, unchecked
        # The emulator's orders of threads: a fixed one, or a random one, which here comes with inexact approximations.
        machine.schedule, machine.approx_ulp = ("warps", 2) if order == RANDOM_ORDER else ("lockstep", 0)
        machine.random = np.random.default_rng(seed)
        try:
            grid, block = tuple(dims[:3]), tuple(dims[3:6])
            parameters = machine.module.kernels[name.decode()].parameters
            values = [ctypes.string_at(arguments[n], size) for n, (_, _, size) in enumerate(parameters)]
            machine.only_blocks = list(range(first_block, grid[0])) if first_block else None
            machine.launch(name.decode(), grid, block, dynamic_shared, values)
            if self.rules:
                message = "\n".join(machine.findings)
        except Exception:  # into C++ goes a message
            message = traceback.format_exc()
        machine.clear_findings()
        self._message = message.encode()
        return ctypes.cast(ctypes.c_char_p(self._message), ctypes.c_void_p).value or 0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("library", type=Path)
    parser.add_argument("ptx", type=Path)
    parser.add_argument("--ignore-rules", action="store_true", help="compare values only")
    options, flags = parser.parse_known_args()
    library = ctypes.CDLL(str(options.library.resolve()))
    module = ptxsim.Module(options.ptx.read_text())
    machine = ptxsim.Machine(module)
    device = Device(library, machine, not options.ignore_rules)
    arguments = [str(options.library), *flags]
    status = library.main(len(arguments), (ctypes.c_char_p * len(arguments))(*(a.encode() for a in arguments)))
    print(f"{device.launches} launches interpreted")
    return status or (device.launches == 0)


if __name__ == "__main__":
    sys.exit(main())
