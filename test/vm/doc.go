// SPDX-License-Identifier: Apache-2.0

// Command vm runs suites of tests in a guest whose kernel and init are not the
// host's: unified cgroup v2, systemd as PID 1, and a kernel without TCX.
//
// The guest sees the host's root file system read-only through virtiofs, below
// an overlay that lives in its memory, so programs built on the host run there
// and nothing they write comes back. One boot serves one suite. What the guest
// prints is shown as it comes; a closing line carries the result. A guest that
// prints none within its time has failed.
//
//	host                                  guest
//	build binaries, initrd, plan
//	virtiofsd, qemu            -------->  /init (this program): mounts, overlay
//	                                      plain: runs the steps below PID 1
//	                                      systemd: becomes systemd; a unit runs them
//	console, result line       <--------  step lines, result line, power off
//
// It kills the qemu and virtiofsd that it started, by process id, and they die
// with it if it is killed itself. It owns build/vm and nothing else.
package main
