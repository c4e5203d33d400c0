"""Compiles a CUDA file to PTX with NVRTC, from the PyPI wheel: no GPU, no CUDA toolkit.

Usage: nvrtc.py DIR SOURCE PTX OPTION... where DIR holds the unpacked wheel.
"""

import ctypes
import glob
import os
import sys


def main():
    directory, source, target, *options = sys.argv[1:]
    (library,) = glob.glob(os.path.join(directory, "nvidia/cuda_nvrtc/lib/libnvrtc.so.*"))
    nvrtc = ctypes.CDLL(library)

    def call(name, *arguments):
        code = getattr(nvrtc, name)(*arguments)
        if code != 0:
            nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
            sys.exit(f"{name}: {nvrtc.nvrtcGetErrorString(code).decode()}\n{log(nvrtc, program)}")

    program = ctypes.c_void_p()
    with open(source, "rb") as file:
        # By its name alone: the PTX must not depend on where it was made.
        name = os.path.basename(source).encode()
        call("nvrtcCreateProgram", ctypes.byref(program), file.read(), name, 0, None, None)
    array = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    call("nvrtcCompileProgram", program, len(options), array)
    size = ctypes.c_size_t()
    call("nvrtcGetPTXSize", program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    call("nvrtcGetPTX", program, ptx)
    with open(target, "wb") as file:
        file.write(ptx.value)


def log(nvrtc, program):
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value + 1)
    nvrtc.nvrtcGetProgramLog(program, text)
    return text.value.decode()


if __name__ == "__main__":
    main()
