// SPDX-License-Identifier: Apache-2.0

package containerd

import (
	"context"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/runtime"
)

// Capabilities of a sandbox, of root in it and of nobody else. There is no user
// namespace yet, so that uid 0 inside is uid 0 outside and each of these is
// weighed as such.
//
// Kept, because package managers and servers in ordinary images fail without
// them, and because they act only on what the sandbox's own namespaces and
// mounts show:
//
//	CHOWN, DAC_OVERRIDE, FOWNER, FSETID   files of other users in its own root
//	SETUID, SETGID                        servers that drop root
//	KILL                                  its own processes of other users
//	NET_BIND_SERVICE                      ports below 1024 in its own network
//
// Not kept, though container engines commonly do:
//
//	MKNOD            would make nodes of other tenants' GPUs; runc's device
//	                 rules allow mknod of anything ("c *:* m"), so this
//	                 capability alone stands against it
//	NET_RAW          raw sockets evade what the datapath can parse
//	SYS_CHROOT       nests roots to confuse path checks
//	AUDIT_WRITE      writes into the host's audit log
//	SETPCAP, SETFCAP useless where no_new_privs is set
var capabilities = []string{
	"CAP_CHOWN",
	"CAP_DAC_OVERRIDE",
	"CAP_FOWNER",
	"CAP_FSETID",
	"CAP_KILL",
	"CAP_NET_BIND_SERVICE",
	"CAP_SETGID",
	"CAP_SETUID",
}

// maskedPaths come on top of containerd's own: serial numbers of the machine,
// the kernel's log, and which page belongs to whom. /sys/module stays, because
// GPU libraries look there for drivers.
var maskedPaths = []string{
	"/proc/kmsg",
	"/proc/kpagecgroup",
	"/proc/kpagecount",
	"/proc/kpageflags",
	"/sys/devices/virtual/dmi",
	"/sys/hypervisor",
	"/sys/kernel/boot_params",
	"/sys/kernel/vmcoreinfo",
}

const (
	defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

	homeEnv = "HOME="
	termEnv = "TERM=xterm" // of processes with a terminal

	cpuPeriodUsec = 100_000
	minQuotaUsec  = 1_000 // the kernel takes no less

	// Open files of a process: soft as everybody's, hard as far as this
	// process may go itself.
	softFiles = 1024
	hardFiles = 524_288

	// oomScore lets the kernel take sandboxes before the node's own daemons.
	oomScore = 500

	defaultShmBytes = 64 << 20
)

// bundle is what a spec is made of.
type bundle struct {
	spec   runtime.Spec
	image  imageInfo
	who    persona
	limits hostLimits
}

// hostLimits is what this process may hand on, and what the node can enforce.
type hostLimits struct {
	hardFiles uint64
	oomScore  int
	// missing says which of cpu, memory, pids the node has no controller for,
	// and memsw if swap cannot be limited.
	missing []string
	// unified: all on cgroup v2, where a sandbox out of memory can end whole.
	unified bool
}

// readHostLimits asks the kernel.
func readHostLimits() hostLimits {
	h := hostLimits{hardFiles: hardFiles, oomScore: oomScore}
	var lim unix.Rlimit
	// Without CAP_SYS_RESOURCE a hard limit cannot be raised.
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err == nil && lim.Max < h.hardFiles {
		h.hardFiles = lim.Max
	}
	// Nor can the score be lowered, not even to that of this process.
	if b, err := os.ReadFile("/proc/self/oom_score_adj"); err == nil {
		if own, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil {
			h.oomScore = max(h.oomScore, own)
		}
	}
	h.missing = missingControllers("/sys/fs/cgroup")
	_, err := os.Stat("/sys/fs/cgroup/cgroup.controllers")
	h.unified = err == nil
	return h
}

// missingControllers looks at the cgroup mounts of either kind.
func missingControllers(root string) []string {
	var missing []string
	if b, err := os.ReadFile(filepath.Join(root, "cgroup.controllers")); err == nil {
		have := strings.Fields(string(b))
		for _, c := range []string{"cpu", "memory", "pids"} {
			if !slices.Contains(have, c) {
				missing = append(missing, c)
			}
		}
		return missing
	}
	// A root cgroup has no limit files of its own for all of them.
	for _, c := range []struct{ name, file string }{
		{"cpu", "cpu/cpu.cfs_quota_us"},
		{"memory", "memory/memory.limit_in_bytes"},
		{"memsw", "memory/memory.memsw.limit_in_bytes"},
		{"pids", "pids/cgroup.procs"},
	} {
		if _, err := os.Stat(filepath.Join(root, c.file)); err != nil {
			missing = append(missing, c.name)
		}
	}
	return missing
}

// build makes the OCI spec.
func (b bundle) build(ctx context.Context, namespace string) (*specs.Spec, error) {
	args := b.args()
	if len(args) == 0 {
		return nil, fmt.Errorf("%w: neither the spec nor the image names a command", runtime.ErrInvalidSpec)
	}
	s := b.spec
	host := s.Hostname
	if host == "" {
		host = s.ID
	}
	cwd := s.Workdir
	if cwd == "" {
		cwd = b.image.workdir
	}
	if cwd == "" {
		cwd = "/"
	}
	resources, err := b.resources()
	if err != nil {
		return nil, err
	}
	opts := []oci.SpecOpts{
		oci.WithoutRunMount, // images bring files in /run
		oci.WithMounts(b.mounts()),
		withShmSize(b.shmBytes()),
		oci.WithProcessArgs(args...),
		withEnv(b.env()),
		oci.WithProcessCwd(cwd),
		oci.WithHostname(host),
		oci.WithLinuxNamespace(specs.LinuxNamespace{Type: specs.CgroupNamespace}),
		oci.WithLinuxNamespace(specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: s.NetnsPath}),
		oci.WithCgroup("/" + s.CgroupPath),
		withPaths,
		withProcess(s.Terminal, b.who.user, b.limits),
		withResources(resources),
		seccomp.WithDefaultProfile(), // looks at the capabilities: keep after them
		withNativeCalls,
		withSocketFamilies,
	}
	spec, err := oci.GenerateSpec(namespaces.WithNamespace(ctx, namespace), nil, &containers.Container{ID: s.ID}, opts...)
	if err != nil {
		return nil, fmt.Errorf("make OCI spec: %w", err)
	}
	return spec, nil
}

// args: the spec's command replaces the image's entrypoint and command.
func (b bundle) args() []string {
	if len(b.spec.Command) > 0 {
		return b.spec.Command
	}
	return append(slices.Clone(b.image.entrypoint), b.image.cmd...)
}

// env: later ones of the same name win. HOME is always there: runc would look
// for it in a passwd file that the tenant may have made a pipe of, and wait.
func (b bundle) env() []string {
	env := []string{defaultPath, homeEnv + b.who.home}
	if b.spec.Terminal {
		env = append(env, termEnv)
	}
	return mergeEnv(mergeEnv(env, b.image.env), b.spec.Env)
}

// mergeEnv answers base with the variables of over put in place or appended.
func mergeEnv(base, over []string) []string {
	out := slices.Clone(base)
	for _, kv := range over {
		name, _, _ := strings.Cut(kv, "=")
		at := slices.IndexFunc(out, func(have string) bool { return strings.HasPrefix(have, name+"=") })
		if at >= 0 {
			out[at] = kv
		} else {
			out = append(out, kv)
		}
	}
	return out
}

// mounts come on top of containerd's own proc, dev, devpts, shm, mqueue, sysfs.
func (b bundle) mounts() []specs.Mount {
	mounts := []specs.Mount{{
		Destination: "/sys/fs/cgroup",
		Type:        "cgroup",
		Source:      "cgroup",
		Options:     []string{"ro", "nosuid", "noexec", "nodev"},
	}}
	for _, f := range []struct{ src, dst string }{
		{b.spec.ResolvConf, "/etc/resolv.conf"},
		{b.spec.Hosts, "/etc/hosts"},
	} {
		if f.src != "" {
			mounts = append(mounts, specs.Mount{
				Destination: f.dst,
				Type:        "bind",
				Source:      f.src,
				Options:     []string{"bind", "ro", "nosuid", "noexec", "nodev"},
			})
		}
	}
	return mounts
}

// shmBytes is the size of /dev/shm. Its pages count against the memory limit,
// and programs that train models want much of it.
func (b bundle) shmBytes() int64 {
	return max(defaultShmBytes, b.spec.MemoryBytes/2)
}

// resources: the limits, less what the operator knows the node cannot enforce.
func (b bundle) resources() (*specs.LinuxResources, error) {
	s := b.spec
	res := &specs.LinuxResources{}
	for _, l := range []struct {
		controller string
		value      int64
		set        func()
	}{
		{"cpu", s.CPUMillis, func() {
			// In 64 bits: a million CPUs fit.
			quota := max(s.CPUMillis*(cpuPeriodUsec/1000), minQuotaUsec)
			period := uint64(cpuPeriodUsec)
			shares := uint64(min(max(s.CPUMillis*1024/1000, 2), 262_144))
			res.CPU = &specs.LinuxCPU{Quota: &quota, Period: &period, Shares: &shares}
		}},
		{"memory", s.MemoryBytes, func() {
			limit := s.MemoryBytes
			res.Memory = &specs.LinuxMemory{Limit: &limit}
			if !s.Partial || !slices.Contains(b.limits.missing, "memsw") {
				// Memory and swap together: none of it is swap.
				res.Memory.Swap = &limit
			}
			if b.limits.unified {
				// Not one process of it, chosen by size, while the rest goes on
				// without.
				res.Unified = map[string]string{"memory.oom.group": "1"}
			}
		}},
		{"pids", s.PIDs, func() {
			limit := s.PIDs
			res.Pids = &specs.LinuxPids{Limit: &limit}
		}},
	} {
		switch {
		case l.value <= 0:
		case !slices.Contains(b.limits.missing, l.controller):
			l.set()
		case !s.Partial:
			return nil, fmt.Errorf("%w: the node has no %s controller and the spec does not allow for it", runtime.ErrInvalidSpec, l.controller)
		}
	}
	return res, nil
}

func withEnv(env []string) oci.SpecOpts {
	return func(_ context.Context, _ oci.Client, _ *containers.Container, s *specs.Spec) error {
		s.Process.Env = env
		return nil
	}
}

func withShmSize(bytes int64) oci.SpecOpts {
	return func(_ context.Context, _ oci.Client, _ *containers.Container, s *specs.Spec) error {
		for i, m := range s.Mounts {
			if m.Destination == "/dev/shm" {
				opts := slices.DeleteFunc(slices.Clone(m.Options), func(o string) bool { return strings.HasPrefix(o, "size=") })
				opts = append(opts, fmt.Sprintf("size=%d", bytes))
				s.Mounts[i].Options = opts
			}
		}
		return nil
	}
}

// withPaths hides and protects more than containerd does.
func withPaths(_ context.Context, _ oci.Client, _ *containers.Container, s *specs.Spec) error {
	s.Linux.MaskedPaths = append(s.Linux.MaskedPaths, maskedPaths...)
	// Where hierarchies are mounted side by side, the tmpfs that holds them
	// would be writable.
	s.Linux.ReadonlyPaths = append(s.Linux.ReadonlyPaths, "/sys/fs/cgroup")
	return nil
}

func withProcess(terminal bool, user specs.User, limits hostLimits) oci.SpecOpts {
	return func(_ context.Context, _ oci.Client, _ *containers.Container, s *specs.Spec) error {
		p := s.Process
		p.Terminal = terminal
		p.User = user
		p.NoNewPrivileges = true
		score := limits.oomScore
		p.OOMScoreAdj = &score
		p.Capabilities = capabilitiesOf(user)
		p.Rlimits = []specs.POSIXRlimit{
			{Type: "RLIMIT_CORE", Soft: 0, Hard: 0},
			{Type: "RLIMIT_NOFILE", Soft: min(softFiles, limits.hardFiles), Hard: limits.hardFiles},
		}
		return nil
	}
}

// capabilitiesOf a user: root's are bounded, others have none. No user can hand
// one on.
func capabilitiesOf(user specs.User) *specs.LinuxCapabilities {
	caps := &specs.LinuxCapabilities{Bounding: slices.Clone(capabilities)}
	if user.UID == 0 {
		caps.Effective = slices.Clone(capabilities)
		caps.Permitted = slices.Clone(capabilities)
	}
	return caps
}

// withResources keeps containerd's first device rule, which denies everything.
func withResources(res *specs.LinuxResources) oci.SpecOpts {
	return func(_ context.Context, _ oci.Client, _ *containers.Container, s *specs.Spec) error {
		res.Devices = s.Linux.Resources.Devices
		s.Linux.Resources = res
		return nil
	}
}

// validate checks what can be checked without looking at the machine.
func validate(s runtime.Spec) error {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("%w: %s", runtime.ErrInvalidSpec, fmt.Sprintf(format, a...))
	}
	switch {
	case !validID(s.ID):
		return bad("id %q: wants 1 to 63 of a-z, 0-9 and -, first no -", s.ID)
	case s.Image == "":
		return bad("no image")
	case s.CgroupPath == "" || filepath.IsAbs(s.CgroupPath) || !filepath.IsLocal(s.CgroupPath):
		return bad("cgroup path %q: wants one below the cgroup root", s.CgroupPath)
	case !filepath.IsAbs(s.LogDir):
		return bad("log directory %q is not an absolute path", s.LogDir)
	case s.CPUMillis < 0 || s.MemoryBytes < 0 || s.PIDs < 0 || s.LogMaxBytes < 0 || s.LogFiles < 0:
		return bad("negative limit")
	case s.CPUMillis > math.MaxInt64/cpuPeriodUsec:
		return bad("cpu limit %d is beyond any machine", s.CPUMillis)
	case len(s.Command) > runtime.MaxArgs || len(s.Env) > runtime.MaxEnv:
		return bad("more than %d arguments or %d variables", runtime.MaxArgs, runtime.MaxEnv)
	case len(s.Hostname) > 64:
		return bad("hostname longer than 64")
	}
	for _, p := range []struct{ name, path string }{
		{"workdir", s.Workdir}, {"netns", s.NetnsPath}, {"resolv.conf", s.ResolvConf}, {"hosts", s.Hosts},
	} {
		if p.path != "" && !filepath.IsAbs(p.path) {
			return bad("%s %q is not an absolute path", p.name, p.path)
		}
	}
	total := 0
	for _, kv := range s.Env {
		if name, _, ok := strings.Cut(kv, "="); !ok || name == "" {
			return bad("variable %.40q is not NAME=value", kv)
		}
		total += len(kv) + 1
	}
	for _, a := range s.Command {
		total += len(a) + 1
	}
	if total > runtime.MaxSpecBytes {
		return bad("arguments and variables of %d bytes; at most %d", total, runtime.MaxSpecBytes)
	}
	for _, v := range slices.Concat(s.Command, s.Env, []string{s.Hostname, s.Workdir, s.User, s.LogDir}) {
		if strings.ContainsRune(v, 0) {
			return bad("a NUL byte in %.40q", v)
		}
	}
	if len(s.Command) > 0 && s.Command[0] == "" {
		return bad("empty command")
	}
	return nil
}

// validID: what containerd, runc and a file name all take.
func validID(id string) bool {
	if len(id) == 0 || len(id) > 63 || id[0] == '-' {
		return false
	}
	return strings.Trim(id, "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
}
