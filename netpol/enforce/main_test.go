// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/netpol"
	"github.com/bulkheadhq/bulkhead/test/need"
)

// TestMain fails the binary if a test left pins mounted or descriptors of the
// kernel's BPF objects open.
func TestMain(m *testing.M) {
	if dir := os.Getenv(victimDir); dir != "" {
		fmt.Fprintln(os.Stderr, victim(dir, os.Getenv(victimLinks)))
		os.Exit(1)
	}
	code := m.Run()
	for _, leak := range append(leakedMounts(), leakedDescriptors()...) {
		fmt.Fprintln(os.Stderr, "leaked:", leak)
		code = max(code, 1)
	}
	os.Exit(code)
}

var pinDirs struct {
	sync.Mutex
	list []string
}

func leakedMounts() (out []string) {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return []string{err.Error()}
	}
	pinDirs.Lock()
	defer pinDirs.Unlock()
	for _, dir := range pinDirs.list {
		if strings.Contains(string(mounts), " "+dir+" ") {
			out = append(out, dir)
		}
	}
	return out
}

func leakedDescriptors() (out []string) {
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return []string{err.Error()}
	}
	for _, fd := range fds {
		to, err := os.Readlink(filepath.Join("/proc/self/fd", fd.Name()))
		if err == nil && strings.HasPrefix(to, "anon_inode:bpf") {
			out = append(out, to)
		}
	}
	return out
}

const (
	testID   = "aaaaaaaaaaaa"
	testSlot = 1
)

var (
	pool4 = netip.MustParsePrefix("100.96.0.0/16")
	pool6 = netip.MustParsePrefix("fd62:6b68::/64")
)

// pinDir answers a directory that is unmounted and removed at the end.
func pinDir(t testing.TB) string {
	t.Helper()
	need.BPF(t)
	dir := filepath.Join(t.TempDir(), "bpf")
	pinDirs.Lock()
	pinDirs.list = append(pinDirs.list, dir)
	pinDirs.Unlock()
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil && err != unix.EINVAL && err != unix.ENOENT {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}

func testConfig(t testing.TB) Config {
	return Config{PinDir: pinDir(t), MaxSandboxes: 64, Pools: []netip.Prefix{pool4, pool6}}
}

// open opens an enforcer that is purged at the end.
func open(t testing.TB, cfg Config) *Enforcer {
	t.Helper()
	e, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Purge(); err != nil && err != ErrClosed {
			t.Errorf("purge: %v", err)
		}
	})
	return e
}

// sandbox describes slot n with link ifindex.
func sandbox(n uint32, ifindex int, p netpol.Program) Sandbox {
	id := []byte(testID)
	for i, v := len(id)-1, n-1; v > 0; i, v = i-1, v/26 {
		id[i] = 'a' + byte(v%26)
	}
	return Sandbox{
		ID: string(id), Slot: n, Ifindex: ifindex, Program: p, PolicyRev: 1,
		MAC:   net.HardwareAddr{0x02, 0x62, 0x68, byte(n >> 16), byte(n >> 8), byte(n)},
		Addrs: []netip.Addr{addr4(n), addr6(n)},
	}
}

func addr4(n uint32) netip.Addr {
	return netip.AddrFrom4([4]byte{100, 96, byte(n >> 8), byte(n)})
}

func addr6(n uint32) netip.Addr {
	a := pool6.Addr().As16()
	a[14], a[15] = byte(n>>8), byte(n)
	return netip.AddrFrom16(a)
}

// place does all of Attach but the links: the programs run by test runs, whose
// packets are on the loopback device, link 1.
func place(t testing.TB, e *Enforcer, sb Sandbox) {
	t.Helper()
	s := &e.slots[sb.Slot]
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, err := range []error{
		e.check(sb), e.takeSlot(s, sb), e.setPolicy(s, sb.Slot, sb.Program, sb.PolicyRev, sb.Learned), e.bind(sb),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// compile compiles one policy, given as rules in YAML.
func compile(t testing.TB, rules string) netpol.Program {
	t.Helper()
	p, err := netpol.Parse("test.yaml", []byte("kind: EgressPolicy\nname: test\nrules:\n"+rules))
	if err != nil {
		t.Fatal(err)
	}
	prog, err := netpol.Compile([]netpol.Layer{{Tenant: "acme", Policy: p}})
	if err != nil {
		t.Fatal(err)
	}
	return prog
}

const (
	allowAll4 = "- {name: all4, action: allow, to: [{cidr: 0.0.0.0/0}], ports: [1-65535/tcp, 1-65535/udp]}\n"
	allowAll6 = "- {name: all6, action: allow, to: [{cidr: '::/0'}], ports: [1-65535/tcp, 1-65535/udp]}\n"
	allowAll  = allowAll4 + allowAll6
)

// settle waits until nothing is retired and enough spares are ready, and answers
// how many policies could be made.
func settle(t testing.TB, e *Enforcer) (n int) {
	t.Helper()
	eventually(t, func() string {
		e.pool.making.Lock()
		defer e.pool.making.Unlock()
		if e.pool.wanting() {
			return "policies are still being made"
		}
		e.pool.mu.Lock()
		defer e.pool.mu.Unlock()
		n = len(e.pool.free) + len(e.pool.spares)
		return ""
	})
	return n
}

// pinCPU keeps the test on one CPU until the answer is called.
func pinCPU(t testing.TB) (free func()) {
	t.Helper()
	runtime.LockOSThread()
	var was, one unix.CPUSet
	ok(t, unix.SchedGetaffinity(0, &was))
	for cpu := range 1024 {
		if was.IsSet(cpu) {
			one.Set(cpu)
			break
		}
	}
	ok(t, unix.SchedSetaffinity(0, &one))
	return func() {
		_ = unix.SchedSetaffinity(0, &was)
		runtime.UnlockOSThread()
	}
}

// drops answers packets by reason.
func drops(t testing.TB, e *Enforcer, slot uint32) map[string]uint64 {
	t.Helper()
	list, err := e.drops(slot)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]uint64{}
	for _, d := range list {
		out[d.Reason] = d.Packets
	}
	return out
}

func counters(t testing.TB, e *Enforcer, slot uint32) Counters {
	t.Helper()
	c, err := e.Counters(slot)
	if err != nil {
		t.Fatal(err)
	}
	return c
}
