#!/bin/sh
# Builds dataplane/bpf/vnic.bpf.o from vnic.bpf.c. With --check, builds it elsewhere and says whether the committed
# object has the same program, maps and types. Needs clang, llvm, libbpf-dev and the kernel's user headers.
set -eu

cd "$(dirname "$0")/../dataplane/bpf"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM

for tool in clang llvm-strip llvm-objcopy; do
    command -v "$tool" >/dev/null || { echo "build-bpf: $tool is missing: install clang and llvm" >&2; exit 1; }
done

# asm/types.h is in a directory of the host's architecture on Debian and Ubuntu.
# The line information would hold the folder that it was built in.
clang -O2 -g -ffile-prefix-map="$PWD"=. -Wall -Werror -target bpf -I"/usr/include/$(uname -m)-linux-gnu" -c vnic.bpf.c -o "$work/vnic.bpf.o"
# Away goes DWARF; BTF stays, which the loader needs for the maps.
llvm-strip -g "$work/vnic.bpf.o"

if [ "${1:-}" != --check ]; then
    mv "$work/vnic.bpf.o" vnic.bpf.o
    echo "build-bpf: wrote dataplane/bpf/vnic.bpf.o ($(wc -c <vnic.bpf.o) bytes)"
    exit 0
fi

# Compilers differ in string tables and line information; what runs and what is created must not.
for section in xdp.frags .maps license; do
    for side in "$work" .; do
        llvm-objcopy -O binary --only-section="$section" --set-section-flags "$section=alloc" "$side/vnic.bpf.o" "$work/section" 2>/dev/null
        cksum <"$work/section" >>"$work/sums.$(test "$side" = . && echo old || echo new)"
    done
done
if ! cmp -s "$work/sums.old" "$work/sums.new"; then
    echo "build-bpf: dataplane/bpf/vnic.bpf.o is not what vnic.bpf.c compiles to: run scripts/build-bpf.sh and commit it" >&2
    exit 1
fi
echo "build-bpf: dataplane/bpf/vnic.bpf.o is up to date"
