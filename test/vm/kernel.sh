#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Unpacks Debian's 6.12 cloud kernel for the guest; installs nothing on the host.
# DIR/kernel/vmlinuz is the kernel, DIR/kernel/lib/modules its modules,
# DIR/kernel/overlay.ko the one module that the guest needs before it can see them.
#
# usage: kernel.sh DIR
set -euo pipefail

mkdir -p "${1:?usage: kernel.sh DIR}"
dir=$(cd "$1" && pwd)
work=$(mktemp -d "$dir/kernel.XXXXXX")
trap 'rm -rf "$work"' EXIT
cd "$work"

meta=linux-image-6.12-cloud-amd64
if ! apt-cache show "$meta" >/dev/null 2>&1; then
	apt-get -q update
fi
image=$(apt-cache depends "$meta" | sed -n 's/^ *Depends: \(linux-image-6\.12[^ ]*\)$/\1/p' | tail -n 1)
[ -n "$image" ] || { echo "kernel.sh: no package $meta; needs Debian 12 with its security archive" >&2; exit 1; }
# An old list may name a file that the archive no longer has.
apt-get -q download "$image" || { apt-get -q update && apt-get -q download "$image"; }

dpkg-deb -x "$image"_*.deb root
version=$(ls root/lib/modules)
depmod -b root "$version"
mv root/boot/vmlinuz-"$version" vmlinuz
xz -dc root/lib/modules/"$version"/kernel/fs/overlayfs/overlay.ko.xz >overlay.ko

rm -rf "$dir/kernel"
mkdir "$dir/kernel"
mv root/lib vmlinuz overlay.ko "$dir/kernel/"
