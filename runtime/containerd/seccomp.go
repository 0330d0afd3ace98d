// SPDX-License-Identifier: Apache-2.0

package containerd

import (
	"context"
	goruntime "runtime"
	"slices"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// withNativeCalls leaves only the kernel's own system call table in the seccomp
// profile. The default one repeats every rule for the 32-bit tables, which are
// attack surface that no image for this platform needs; a call through them now
// kills the caller. It also costs: runc compiles the filter for every start, 50
// of 150 ms with three tables, 4 with one.
func withNativeCalls(_ context.Context, _ oci.Client, _ *containers.Container, s *oci.Spec) error {
	if p := s.Linux.Seccomp; p != nil {
		p.Architectures = slices.DeleteFunc(p.Architectures, func(a specs.Arch) bool { return a != nativeArch })
	}
	return nil
}

// nativeArch is this platform's table. Without any in the profile, as on
// platforms not named here, the runtime takes its own.
var nativeArch = map[string]specs.Arch{
	"amd64": specs.ArchX86_64, "arm64": specs.ArchAARCH64, "riscv64": specs.ArchRISCV64, "loong64": specs.ArchLOONGARCH64, "s390x": specs.ArchS390X,
}[goruntime.GOARCH]

// Protocols of IPv4 and IPv6 are below maxProtocol, but for IPPROTO_MPTCP, whose
// packets are TCP. IPPROTO_SMC, which is AF_SMC by another name since Linux
// 6.11, is not.
const maxProtocol = 256

// withSocketFamilies leaves only those socket families in the seccomp profile
// whose packets cross the sandbox's link, or never leave the sandbox. The
// default profile allows nearly all; the kernel loads the modules of some (RDS,
// SMC, TIPC) for whoever asks, and what they send over RDMA no program sees.
// The others fail with EPERM.
//
// socketcall, where a platform has it, hides the family from the filter; no C
// library of today needs it.
func withSocketFamilies(_ context.Context, _ oci.Client, _ *containers.Container, s *oci.Spec) error {
	p := s.Linux.Seccomp
	if p == nil {
		return nil
	}
	for i := range p.Syscalls {
		p.Syscalls[i].Names = slices.DeleteFunc(p.Syscalls[i].Names, func(name string) bool {
			return name == "socket" || name == "socketpair" || name == "socketcall"
		})
	}
	p.Syscalls = slices.DeleteFunc(p.Syscalls, func(r specs.LinuxSyscall) bool { return len(r.Names) == 0 })
	// The kernel looks at 32 bits of a family, the filter at 64: equality is
	// strict, so nothing hides in the upper half.
	is := func(index uint, value uint64) specs.LinuxSeccompArg {
		return specs.LinuxSeccompArg{Index: index, Value: value, Op: specs.OpEqualTo}
	}
	allow := func(call string, args ...specs.LinuxSeccompArg) {
		p.Syscalls = append(p.Syscalls, specs.LinuxSyscall{Names: []string{call}, Action: specs.ActAllow, Args: args})
	}
	allow("socketpair", is(0, unix.AF_UNIX))
	for _, family := range []uint64{unix.AF_UNIX, unix.AF_NETLINK, unix.AF_PACKET} {
		allow("socket", is(0, family))
	}
	for _, family := range []uint64{unix.AF_INET, unix.AF_INET6} {
		allow("socket", is(0, family), specs.LinuxSeccompArg{Index: 2, Value: maxProtocol, Op: specs.OpLessThan})
		allow("socket", is(0, family), is(2, unix.IPPROTO_MPTCP))
	}
	return nil
}
