#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Unpacks one of Debian 12's cloud kernels for the guest; installs nothing on
# the host. VERSION is 6.12, or 6.1, which knows no TCX.
# DIR/kernel-VERSION/vmlinuz is the kernel, lib/modules beside it its modules,
# early/ those that the guest needs before it can see them, in their order.
#
# usage: kernel.sh DIR VERSION
set -euo pipefail

usage() { echo "usage: kernel.sh DIR 6.1|6.12" >&2; exit 2; }
[ $# -eq 2 ] || usage
version=$2
case $version in
6.12) meta=linux-image-6.12-cloud-amd64 ;;
6.1) meta=linux-image-cloud-amd64 ;;
*) usage ;;
esac
mkdir -p "$1"
dir=$(cd "$1" && pwd)
work=$(mktemp -d "$dir/kernel.XXXXXX")
trap 'rm -rf "$work"' EXIT
cd "$work"

if ! apt-cache show "$meta" >/dev/null 2>&1; then
	apt-get -q update
fi
image=$(apt-cache depends "$meta" | sed -n "s/^ *Depends: \(linux-image-${version/./\\.}\.[^ ]*\)\$/\1/p" | tail -n 1)
[ -n "$image" ] || { echo "kernel.sh: no kernel $version behind $meta; needs Debian 12 with its security archive" >&2; exit 1; }
# An old list may name a file that the archive no longer has.
apt-get -q download "$image" || { apt-get -q update && apt-get -q download "$image"; }

dpkg-deb -x "$image"_*.deb root
release=$(ls root/lib/modules)
depmod -b root "$release"
mv root/boot/vmlinuz-"$release" vmlinuz
mkdir early
n=10
while read -r _ module _; do
	name=$(basename "${module%.xz}")
	ls early | grep -q -- "-$name\$" && continue
	case $module in
	*.xz) xz -dc "$module" ;;
	*) cat "$module" ;;
	esac >"early/$n-$name"
	n=$((n + 1))
done < <(modprobe -d "$PWD/root" -S "$release" --show-depends -a virtio_pci virtiofs overlay | grep '^insmod')
[ "$n" -gt 10 ] || { echo "kernel.sh: kernel $release has no module of those that the guest begins with" >&2; exit 1; }

rm -rf "$dir/kernel-$version"
mkdir "$dir/kernel-$version"
mv root/lib vmlinuz early "$dir/kernel-$version/"
