#!/usr/bin/env python3
"""Archives lib<NAME>.a whose functions open the real CUDA library at the first call.

usage: lazy_libraries.py OUTDIR NAME.syms...     (a symbol a line)

A program linked with them names no CUDA library as needed: it starts where no driver is. A function that is missing then answers
with an error code of its library, so that the caller sees an ordinary failure. x86-64 Linux.
"""
import pathlib
import subprocess
import sys
import tempfile

# Name: the files to try in turn, and the code of a missing function.
LIBRARIES = {
    "cuda": (["libcuda.so.1", "libcuda.so"], 100),  # CUDA_ERROR_NO_DEVICE
    "nvrtc": (["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"], 7),  # NVRTC_ERROR_BUILTIN_OPERATION_FAILURE
    "curand": (["libcurand.so.10", "libcurand.so"], 203),  # CURAND_STATUS_INITIALIZATION_FAILED
    "cublas": (["libcublas.so.13", "libcublas.so.12", "libcublas.so"], 1),  # CUBLAS_STATUS_NOT_INITIALIZED
    "cublasLt": (["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"], 1),
}

RESOLVE = r"""
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
static const char *const files[] = { %(files)s, 0 };
static const char *const names[] = { %(names)s };
extern void *lazy_%(lib)s_slots[];
static long missing(void) { return %(code)d; }
static const char *missing_text(void) { return "CUDA library lib%(lib)s not found"; }
__attribute__((visibility("hidden"))) void *lazy_%(lib)s_resolve(unsigned long i) {
    static void *handle;
    static int tried;
    if (!__atomic_load_n(&tried, __ATOMIC_ACQUIRE)) {
        void *found = 0;
        for (int k = 0; !found && files[k]; k++) found = dlopen(files[k], RTLD_NOW | RTLD_GLOBAL);
        if (found) __atomic_store_n(&handle, found, __ATOMIC_RELEASE);
        else if (getenv("LAZY_CUDA_DEBUG")) fprintf(stderr, "%%s\n", dlerror());
        __atomic_store_n(&tried, 1, __ATOMIC_RELEASE);
    }
    void *library = __atomic_load_n(&handle, __ATOMIC_ACQUIRE);
    void *function = library ? dlsym(library, names[i]) : 0;
    if (!function) function = %(text)d && __builtin_strstr(names[i], "ErrorString") ? (void *)missing_text : (void *)missing;
    __atomic_store_n(&lazy_%(lib)s_slots[i], function, __ATOMIC_RELEASE);
    return function;
}
"""

# A stub jumps through its slot. At first the slot leads here: every argument register is kept, the slot is filled.
TRAMPOLINE = """
.text
.type lazy_{lib}_common,@function
lazy_{lib}_common:
  endbr64
  push %rbp; mov %rsp,%rbp
  push %rdi; push %rsi; push %rdx; push %rcx; push %r8; push %r9; push %rax; push %r10
  sub $128,%rsp
  movups %xmm0,(%rsp); movups %xmm1,16(%rsp); movups %xmm2,32(%rsp); movups %xmm3,48(%rsp)
  movups %xmm4,64(%rsp); movups %xmm5,80(%rsp); movups %xmm6,96(%rsp); movups %xmm7,112(%rsp)
  mov %r11,%rdi
  call lazy_{lib}_resolve
  mov %rax,%r11
  movups (%rsp),%xmm0; movups 16(%rsp),%xmm1; movups 32(%rsp),%xmm2; movups 48(%rsp),%xmm3
  movups 64(%rsp),%xmm4; movups 80(%rsp),%xmm5; movups 96(%rsp),%xmm6; movups 112(%rsp),%xmm7
  add $128,%rsp
  pop %r10; pop %rax; pop %r9; pop %r8; pop %rcx; pop %rdx; pop %rsi; pop %rdi; pop %rbp
  jmp *%r11
"""


def make(out, lib, symbols):
    files, code = LIBRARIES[lib]
    assembly = [TRAMPOLINE.replace("{lib}", lib)]
    for i, name in enumerate(symbols):
        assembly.append(
            f".globl {name}\n.type {name},@function\n.p2align 4\n{name}:\n  endbr64\n  jmp *lazy_{lib}_slots+{8 * i}(%rip)\n"
            f".Lresolve{i}: mov ${i},%r11d\n  jmp lazy_{lib}_common\n.size {name},.-{name}"
        )
    assembly.append(f".data\n.p2align 3\n.globl lazy_{lib}_slots\n.hidden lazy_{lib}_slots\nlazy_{lib}_slots:")
    assembly += [f"  .quad .Lresolve{i}" for i in range(len(symbols))]
    assembly.append('.section .note.GNU-stack,"",@progbits\n')
    quoted = lambda texts: ", ".join(f'"{t}"' for t in texts)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "stubs.s").write_text("\n".join(assembly))
        c = RESOLVE % dict(lib=lib, code=code, text=int(lib == "nvrtc"), files=quoted(files), names=quoted(symbols))
        (folder / "resolve.c").write_text(c)
        for source, flags in (("stubs.s", []), ("resolve.c", ["-O2"])):
            subprocess.check_call(["cc", "-c", "-fPIC", *flags, "-o", folder / f"{source}.o", folder / source])
        archive = out / f"lib{lib}.a"
        archive.unlink(missing_ok=True)
        subprocess.check_call(["ar", "rcs", archive, folder / "stubs.s.o", folder / "resolve.c.o"])
    print(f"lib{lib}.a: {len(symbols)} functions")


if __name__ == "__main__":
    out = pathlib.Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for path in map(pathlib.Path, sys.argv[2:]):
        make(out, path.stem, sorted({line.strip() for line in path.read_text().splitlines() if line.strip()}))
