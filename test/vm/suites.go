// SPDX-License-Identifier: Apache-2.0

package main

import "time"

// mode says what is PID 1 in the guest.
type mode string

const (
	plain   mode = "plain"   // a reaper that runs the steps
	systemd mode = "systemd" // the host's systemd; the steps run as a unit
)

// Versions of the guest kernels. Debian 12 comes with the older one; the newer
// one is in its security archive.
const (
	kernel61  = "6.1" // no TCX: the programs are on clsact
	kernel612 = "6.12"
)

// suite is one boot.
type suite struct {
	name   string
	about  string
	mode   mode
	kernel string // "" is kernel612
	all    bool   // part of `vm all`
	steps  []step
	limit  time.Duration // of the whole boot
	// memoryMiB of the guest; 0 is the flag's. Only what it touches is taken
	// from the host.
	memoryMiB int
}

func (s suite) version() string {
	if s.kernel == "" {
		return kernel612
	}
	return s.kernel
}

// step is one program. Steps run in order and all of them run.
type step struct {
	pkg   string   // package below the repository, "./cgroups"
	test  bool     // its tests, else the command itself
	args  []string // of the program; of a test "-test.run=..." and the like
	limit time.Duration
}

// network are the steps that both kernels run: TCX on one, clsact on the other.
// Of netpol/enforce those that are about attaching, about packets and about what
// the kernel does with the maps; loading the programs takes seconds for each
// test under emulation. Of netpol/link not those that break off our own steps or
// count what is left after many: the kernel has no part in them, and they take a
// fourth of the time.
var network = []step{
	{pkg: "./test/threats", test: true, args: []string{"-test.short"}, limit: 4 * time.Minute},
	{
		pkg: "./netpol/enforce", test: true, limit: 3 * time.Minute,
		args: []string{"-test.short", "-test.run=^(TestBytesEqualCapture|TestClsact.*|TestFromSandboxVerdicts|TestHardDenies|TestKilledAtAnyTime|" +
			"TestPolicyOnTheWire|TestRateOf.*|TestRawFramesFromTheSandbox|TestReopenAfterCrash|TestToSandbox|TestUpgrade|TestVerifyAndRepair)$"},
	},
	{
		pkg: "./netpol/link", test: true, limit: 3 * time.Minute,
		args: []string{"-test.skip=^(Test.*AtEveryStep|TestHalfStates|TestNothingIsLeaked|TestRemoveLeavesNothing)$"},
	},
}

// suites is the registry. Emulation is ten to twenty times slower than the
// host: list the tests that need the guest, not all that exist. The limits of
// what `all` runs must not add up to more than 27 minutes.
var suites = []suite{
	{
		name: "node", about: "cgroup v2 and the runtime on a unified hierarchy", mode: plain, all: true, limit: 6 * time.Minute,
		steps: []step{
			{pkg: "./cgroups", test: true, limit: 2 * time.Minute},
			{
				pkg: "./runtime/containerd", test: true, limit: 3 * time.Minute,
				args: []string{"-test.run=^(TestInsideForbidden|TestInsideSockets|TestLimitsAreSet|TestOutOfMemory|TestTooManyProcesses)$"},
			},
			{
				pkg: "./test/e2e", test: true, limit: 4 * time.Minute,
				args: []string{"-test.run=^(TestForkBomb|TestHelloWorld|TestLifecycle|TestMemoryLimit|TestOutOfMemoryEndsTheWholeSandbox|TestTenantLimitsHoldAgainstTwoSandboxes)$"},
			},
		},
	},
	{
		name: "network", about: "egress on a kernel with TCX", mode: plain, all: true, limit: 7 * time.Minute,
		steps: network,
	},
	{
		name: "node-6.1", about: "egress on a kernel without TCX", mode: plain, kernel: kernel61, all: true, limit: 7 * time.Minute,
		steps: network,
	},
	{
		name: "systemd", about: "the agent as a systemd unit", mode: systemd, all: true, limit: 2 * time.Minute,
		steps: []step{
			{pkg: "./test/vm/systemd", test: true, limit: 3 * time.Minute},
		},
	},
	{
		name: "demo", about: "the demo on a unified hierarchy", mode: plain, all: true, limit: 5 * time.Minute, memoryMiB: 8192,
		steps: []step{
			{pkg: "./test/demo", limit: 5 * time.Minute},
		},
	},
}
