// SPDX-License-Identifier: Apache-2.0

package cgroups

// ioShortcoming: nobody is given a share of a disk by this package, but where
// the controller is on, write-back is charged to the sandbox that caused it
// and the runtime may set limits on the leaf.
func ioShortcoming(t *Tree) string {
	if t.onV2("io") {
		return ""
	}
	if _, ok := t.onV1("blkio"); ok {
		return "io: on cgroup v1 only direct and synchronous disk traffic counts against a sandbox; write-back is charged to nobody"
	}
	return "io: no controller; disk traffic is neither limited nor told apart"
}
