// SPDX-License-Identifier: Apache-2.0

package containerd

import (
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/bulkheadhq/bulkhead/runtime"
)

var update = flag.Bool("update", false, "write the golden files")

func testBundle() bundle {
	return bundle{
		spec: runtime.Spec{
			ID: "abcdefghijkl", Image: "x", Command: []string{"train", "--fast"}, Env: []string{"A=1", "PATH=/mine"},
			Workdir: "/work", CgroupPath: "bulkhead.slice/acme/abcdefghijkl", NetnsPath: "/run/netns/abcdefghijkl",
			CPUMillis: 1500, MemoryBytes: 256 << 20, PIDs: 100, Terminal: true,
			LogDir: "/logs", ResolvConf: "/etc/bh/resolv", Hosts: "/etc/bh/hosts",
		},
		image:  imageInfo{entrypoint: []string{"/entry"}, cmd: []string{"arg"}, env: []string{"PATH=/image", "B=2"}, workdir: "/image"},
		who:    persona{user: specs.User{UID: 1000, GID: 1000, AdditionalGids: []uint32{2000}}, home: "/home/agent"},
		limits: hostLimits{hardFiles: 20_000, oomScore: 500},
	}
}

// TestSpecGolden shows every setting that confines a sandbox. The seccomp
// filter is containerd's and has a test of its own; the paths of single CPUs
// are the machine's.
func TestSpecGolden(t *testing.T) {
	for name, change := range map[string]func(*bundle){
		"full": func(*bundle) {},
		"plain": func(b *bundle) {
			b.spec = runtime.Spec{ID: "abcdefghijkl", Image: "x", CgroupPath: "bulkhead.slice/acme/abcdefghijkl", LogDir: "/logs"}
			b.who = persona{home: "/root"}
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := testBundle()
			change(&b)
			spec, err := b.build(t.Context(), "bulkhead")
			if err != nil {
				t.Fatal(err)
			}
			if spec.Linux.Seccomp == nil {
				t.Error("no seccomp filter")
			}
			spec.Linux.Seccomp = nil
			spec.Linux.MaskedPaths = slices.DeleteFunc(spec.Linux.MaskedPaths, func(p string) bool {
				return strings.HasPrefix(p, "/sys/devices/system/cpu/")
			})
			got, err := json.MarshalIndent(spec, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, '\n')
			path := filepath.Join("testdata", "spec-"+name+".json")
			if *update {
				if err := os.WriteFile(path, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), string(got)); diff != "" {
				t.Errorf("-want +got (run with -update if it is meant):\n%s", diff)
			}
		})
	}
}

// TestSeccomp: what the filter must not let through, whatever containerd makes
// of its profile.
func TestSeccomp(t *testing.T) {
	for _, uid := range []uint32{0, 1000} {
		b := testBundle()
		b.who.user.UID = uid
		spec, err := b.build(t.Context(), "bulkhead")
		if err != nil {
			t.Fatal(err)
		}
		f := spec.Linux.Seccomp
		if f.DefaultAction != specs.ActErrno {
			t.Errorf("default action: got %s", f.DefaultAction)
		}
		if len(f.Architectures) != 1 || f.Architectures[0] != nativeArch {
			t.Errorf("system call tables: got %v, want %s", f.Architectures, nativeArch)
		}
		for _, call := range []string{
			"mount", "umount2", "pivot_root", "move_mount", "fsopen", "open_tree", "unshare", "setns", "bpf",
			"perf_event_open", "add_key", "keyctl", "request_key", "init_module", "finit_module", "delete_module",
			"kexec_load", "open_by_handle_at", "io_uring_setup", "userfaultfd", "reboot", "swapon", "quotactl",
			"syslog", "iopl", "ioperm", "acct", "settimeofday", "chroot", "socketcall",
		} {
			for _, rule := range f.Syscalls {
				if slices.Contains(rule.Names, call) && rule.Action == specs.ActAllow {
					t.Errorf("uid %d: %s is allowed", uid, call)
				}
			}
		}
		for _, rule := range f.Syscalls {
			for _, call := range []string{"socket", "socketpair"} {
				if slices.Contains(rule.Names, call) && !narrow(rule) {
					t.Errorf("uid %d: %s is allowed: %+v", uid, call, rule)
				}
			}
		}
	}
}

// narrow tells whether a rule is for one call and one of the families that a
// sandbox may have.
func narrow(rule specs.LinuxSyscall) bool {
	return len(rule.Names) == 1 && len(rule.Args) > 0 && rule.Args[0].Index == 0 && rule.Args[0].Op == specs.OpEqualTo &&
		slices.Contains(families, int(rule.Args[0].Value))
}

func TestEnv(t *testing.T) {
	b := testBundle()
	if diff := cmp.Diff([]string{"PATH=/mine", "HOME=/home/agent", "TERM=xterm", "B=2", "A=1"}, b.env()); diff != "" {
		t.Error(diff)
	}
	b.spec.Terminal, b.spec.Env, b.image.env = false, nil, nil
	if diff := cmp.Diff([]string{defaultPath, "HOME=/home/agent"}, b.env()); diff != "" {
		t.Error(diff)
	}
}

func TestArgs(t *testing.T) {
	b := testBundle()
	if diff := cmp.Diff([]string{"train", "--fast"}, b.args()); diff != "" {
		t.Error(diff)
	}
	b.spec.Command = nil
	if diff := cmp.Diff([]string{"/entry", "arg"}, b.args()); diff != "" {
		t.Error(diff)
	}
	b.image = imageInfo{}
	if _, err := b.build(t.Context(), "bulkhead"); !errors.Is(err, runtime.ErrInvalidSpec) {
		t.Errorf("no command: got %v", err)
	}
}

func TestLimits(t *testing.T) {
	for _, c := range []struct {
		millis        int64
		quota, shares int64
	}{
		{1, 1000, 2}, {10, 1000, 10}, {250, 25_000, 256}, {1000, 100_000, 1024}, {256_000, 25_600_000, 262_144}, {1 << 40, 1 << 40 * 100, 262_144},
	} {
		b := testBundle()
		b.spec.CPUMillis = c.millis
		res, err := b.resources()
		if err != nil {
			t.Fatal(err)
		}
		if *res.CPU.Quota != c.quota || int64(*res.CPU.Shares) != c.shares || *res.CPU.Period != cpuPeriodUsec {
			t.Errorf("%d: got quota %d, shares %d, want %d, %d", c.millis, *res.CPU.Quota, *res.CPU.Shares, c.quota, c.shares)
		}
	}
}

// TestMissingControllers: a limit that the node cannot enforce is refused, or
// left out if the operator has said so.
func TestMissingControllers(t *testing.T) {
	b := testBundle()
	b.limits.missing = []string{"memory", "memsw"}
	if _, err := b.resources(); !errors.Is(err, runtime.ErrInvalidSpec) || !strings.Contains(err.Error(), "memory") {
		t.Errorf("got %v", err)
	}
	b.spec.Partial = true
	res, err := b.resources()
	if err != nil {
		t.Fatal(err)
	}
	if res.Memory != nil || res.CPU == nil || res.Pids == nil {
		t.Errorf("got %+v", res)
	}
	b.limits.missing = []string{"memsw"}
	if res, err = b.resources(); err != nil || res.Memory == nil || res.Memory.Swap != nil {
		t.Errorf("without swap accounting: got %+v, %v", res.Memory, err)
	}
	b.spec.Partial, b.spec.MemoryBytes = false, 0
	b.limits.missing = []string{"memory"}
	if _, err = b.resources(); err != nil {
		t.Errorf("a limit that nobody asked for: %v", err)
	}
}

func TestReadsControllers(t *testing.T) {
	root := t.TempDir()
	put := func(path string) {
		t.Helper()
		full := filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(full, []byte("cpuset cpu io pids\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	put("cpu/cpu.cfs_quota_us")
	put("memory/memory.limit_in_bytes")
	if diff := cmp.Diff([]string{"memsw", "pids"}, missingControllers(root)); diff != "" {
		t.Error(diff)
	}
	put("cgroup.controllers")
	if diff := cmp.Diff([]string{"memory"}, missingControllers(root)); diff != "" {
		t.Error(diff)
	}
}

func TestValidate(t *testing.T) {
	good := testBundle().spec
	if err := validate(good); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*runtime.Spec){
		"id empty":         func(s *runtime.Spec) { s.ID = "" },
		"id long":          func(s *runtime.Spec) { s.ID = strings.Repeat("a", 64) },
		"id upper":         func(s *runtime.Spec) { s.ID = "Abc" },
		"id dash":          func(s *runtime.Spec) { s.ID = "-abc" },
		"id slash":         func(s *runtime.Spec) { s.ID = "a/b" },
		"image":            func(s *runtime.Spec) { s.Image = "" },
		"cgroup absolute":  func(s *runtime.Spec) { s.CgroupPath = "/a" },
		"cgroup up":        func(s *runtime.Spec) { s.CgroupPath = "../a" },
		"log relative":     func(s *runtime.Spec) { s.LogDir = "logs" },
		"netns relative":   func(s *runtime.Spec) { s.NetnsPath = "x" },
		"workdir relative": func(s *runtime.Spec) { s.Workdir = "x" },
		"hosts relative":   func(s *runtime.Spec) { s.Hosts = "x" },
		"cpu":              func(s *runtime.Spec) { s.CPUMillis = 1 << 62 },
		"memory":           func(s *runtime.Spec) { s.MemoryBytes = -1 },
		"env name":         func(s *runtime.Spec) { s.Env = []string{"NOVALUE"} },
		"env NUL":          func(s *runtime.Spec) { s.Env = []string{"A=\x00"} },
		"arg NUL":          func(s *runtime.Spec) { s.Command = []string{"a", "\x00"} },
		"empty command":    func(s *runtime.Spec) { s.Command = []string{""} },
		"args many":        func(s *runtime.Spec) { s.Command = make([]string, runtime.MaxArgs+1) },
		"args large":       func(s *runtime.Spec) { s.Command = []string{strings.Repeat("x", runtime.MaxSpecBytes)} },
		"hostname":         func(s *runtime.Spec) { s.Hostname = strings.Repeat("x", 65) },
	} {
		s := good
		change(&s)
		if err := validate(s); !errors.Is(err, runtime.ErrInvalidSpec) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func TestCompleteRef(t *testing.T) {
	for in, want := range map[string]string{
		"busybox":                       "docker.io/library/busybox:latest",
		"busybox:1.36":                  "docker.io/library/busybox:1.36",
		"ghcr.io/a/b":                   "ghcr.io/a/b:latest",
		"localhost:5000/x:y":            "localhost:5000/x:y",
		"docker.io/library/busybox:1":   "docker.io/library/busybox:1",
		"registry.example.com/x/y@" + d: "registry.example.com/x/y@" + d,
	} {
		if got, err := completeRef(in); err != nil || got != want {
			t.Errorf("%s: got %s, %v, want %s", in, got, err, want)
		}
	}
	if _, err := completeRef("No Name"); err == nil {
		t.Error("a bad name is taken")
	}
}

const d = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

func TestTrimRunc(t *testing.T) {
	err := commandError(errors.New(`failed to create shim task: OCI runtime create failed: runc create failed: unable to start container process: error during container init: exec: "nosuch": executable file not found in $PATH: unknown`))
	if !errors.Is(err, runtime.ErrCommand) {
		t.Fatalf("got %v", err)
	}
	if got, want := err.Error(), `command cannot be run: exec: "nosuch": executable file not found in $PATH`; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	other := errors.New("rpc error: connection refused")
	if got := commandError(other); got != other {
		t.Errorf("got %v", got)
	}
}
