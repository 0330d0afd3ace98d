// SPDX-License-Identifier: Apache-2.0

package link

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/test/need"
)

const (
	envInside = "BULKHEAD_LINK_TEST_NS"   // set in the process that owns the test's namespaces
	envKillAt = "BULKHEAD_LINK_TEST_KILL" // step at which a child kills itself
	envDir    = "BULKHEAD_LINK_TEST_DIR"

	ready = "ready" // envInside of what is started once the namespaces are set up
)

// TestMain runs the tests again in a network and a mount namespace of their
// own. They are the "host" of every test, and nothing outlives the process.
func TestMain(m *testing.M) {
	switch {
	case os.Geteuid() != 0:
		os.Exit(m.Run())
	case os.Getenv(envInside) == "":
		os.Exit(runInside())
	case os.Getenv(envKillAt) != "":
		createAndDie(os.Getenv(envKillAt))
	case os.Getenv(envSoak) != "":
		soak(os.Getenv(envSoak))
	case os.Getenv(envInside) == ready: // a fuzz worker
		os.Exit(m.Run())
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		fmt.Fprintln(os.Stderr, "make mounts private:", err)
		os.Exit(1)
	}
	if err := unix.Mount("sysfs", "/sys", "sysfs", 0, ""); err != nil {
		fmt.Fprintln(os.Stderr, "mount sysfs:", err)
		os.Exit(1)
	}
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bring up lo:", err)
		os.Exit(1)
	}
	if err := os.Setenv(envInside, ready); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func runInside() int {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), envInside+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		return max(exit.ExitCode(), 1)
	case err != nil:
		fmt.Fprintln(os.Stderr, "run tests in their own namespaces:", err)
		return 1
	}
	return 0
}

var (
	pool4 = netip.MustParsePrefix("100.96.0.0/16")
	pool6 = netip.MustParsePrefix("fd62:6b68::/64")
)

func testConfig(dir string) Config { return Config{Pool4: pool4, Pool6: pool6, NetnsDir: dir} }

// open answers a manager whose links and table go with the test.
func open(t testing.TB) *Manager {
	t.Helper()
	need.Netns(t)
	m, err := Open(testConfig(filepath.Join(t.TempDir(), "netns")))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		m.fault = nil
		ids, err := m.List()
		if err != nil {
			t.Error(err)
		}
		for _, id := range ids {
			if err := m.Remove(id); err != nil {
				t.Error(err)
			}
		}
		if err := m.Purge(); err != nil {
			t.Error(err)
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

// sandboxID makes an id from a slot.
func sandboxID(slot uint32) string {
	const digits = "abcdefghijklmnopqrstuvwxyz234567"
	b := []byte("sandboxaaaaa")
	for i := len(b) - 1; i >= 7; i-- {
		b[i] = digits[slot%32]
		slot /= 32
	}
	return string(b)
}

func testLink(t testing.TB, slot uint32) Link {
	t.Helper()
	a4, err := AddrFor(pool4, slot)
	if err != nil {
		t.Fatal(err)
	}
	a6, err := AddrFor(pool6, slot)
	if err != nil {
		t.Fatal(err)
	}
	return Link{ID: sandboxID(slot), Slot: slot, Addr4: a4, Addr6: a6}
}

// launch makes a link and brings it up.
func launch(t testing.TB, m *Manager, slot uint32) Link {
	t.Helper()
	l := testLink(t, slot)
	if _, err := m.Create(context.Background(), l); err != nil {
		t.Fatal(err)
	}
	if err := m.Up(l.ID); err != nil {
		t.Fatal(err)
	}
	return l
}

// far is a namespace beyond the host's uplink.
type far struct {
	ns           *os.File
	addr4, addr6 netip.Addr // its own
	host4, host6 netip.Addr // the host's end of the uplink
}

func newFar(t testing.TB) *far {
	t.Helper()
	f := &far{
		addr4: netip.MustParseAddr("192.0.2.2"), host4: netip.MustParseAddr("192.0.2.1"),
		addr6: netip.MustParseAddr("2001:db8::2"), host6: netip.MustParseAddr("2001:db8::1"),
	}
	must(t, onThread(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		f.ns, err = os.Open(threadNetns)
		return err
	}))
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "uplink"}, PeerName: "far", PeerNamespace: netlink.NsFd(f.ns.Fd())}
	must(t, netlink.LinkAdd(veth))
	t.Cleanup(func() {
		must(t, netlink.LinkDel(veth))
		must(t, f.ns.Close())
	})
	address(t, "uplink", f.host4, f.host6)
	must(t, inNetns(f.ns, func() error {
		address(t, "far", f.addr4, f.addr6)
		// The way back for what tries to reach a sandbox unasked.
		for _, r := range []struct {
			dst netip.Prefix
			gw  netip.Addr
		}{{pool4, f.host4}, {pool6, f.host6}} {
			dst := &net.IPNet{IP: r.dst.Addr().AsSlice(), Mask: net.CIDRMask(r.dst.Bits(), r.dst.Addr().BitLen())}
			if err := netlink.RouteAdd(&netlink.Route{Dst: dst, Gw: r.gw.AsSlice()}); err != nil {
				return err
			}
		}
		return nil
	}))
	// The kernel makes an IPv6 address local in a worker.
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		local, err := HostAddrs()
		must(t, err)
		if slices.Contains(local, netip.PrefixFrom(f.host6, 128)) {
			return f
		}
		if time.Now().After(end) {
			t.Fatalf("%s does not become local", f.host6)
		}
	}
}

func address(t testing.TB, name string, addrs ...netip.Addr) {
	t.Helper()
	l, err := netlink.LinkByName(name)
	must(t, err)
	for _, a := range addrs {
		bits := 24
		if a.Is6() {
			bits = 64
		}
		must(t, netlink.AddrAdd(l, &netlink.Addr{
			IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(bits, a.BitLen())}, Flags: unix.IFA_F_NODAD,
		}))
	}
	must(t, netlink.LinkSetUp(l))
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// markAll stands in for the egress program: it marks everything from sandbox
// links before the second layer looks.
func markAll(t testing.TB) {
	t.Helper()
	c := &nftables.Conn{}
	table := c.AddTable(&nftables.Table{Name: "stand_in", Family: nftables.TableFamilyINet})
	chain := c.AddChain(&nftables.Chain{
		Name: "mark", Table: table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookPrerouting,
		Priority: nftables.ChainPriorityRef(-310),
	})
	c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte("bh")},
		&expr.Immediate{Register: 1, Data: native32(Mark | 7)},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: 1},
	}})
	must(t, c.Flush())
	t.Cleanup(func() {
		c.DelTable(table)
		must(t, c.Flush())
	})
}

func openNetns(t testing.TB, m *Manager, id string) *os.File {
	t.Helper()
	ns, err := os.Open(m.NetnsPath(id))
	must(t, err)
	t.Cleanup(func() { must(t, ns.Close()) })
	return ns
}

func dialFrom(ns *os.File, network, addr string, wait time.Duration) (c net.Conn, err error) {
	err = inNetns(ns, func() error {
		c, err = (&net.Dialer{Timeout: wait}).Dial(network, addr)
		return err
	})
	return c, err
}

// serve answers each TCP connection with the address it came from. ns nil is
// the host.
func serve(t testing.TB, ns *os.File, addr string) netip.AddrPort {
	t.Helper()
	var ln net.Listener
	listen := func() (err error) {
		ln, err = net.Listen("tcp", addr)
		return err
	}
	if ns == nil {
		must(t, listen())
	} else {
		must(t, inNetns(ns, listen))
	}
	done := make(chan struct{}) // closed when the server has left
	go func() {
		defer close(done)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
			_, _ = c.Write([]byte(host))
			_ = c.Close()
		}
	}()
	t.Cleanup(func() { _ = ln.Close(); <-done })
	return netip.MustParseAddrPort(ln.Addr().String())
}

// ask connects and reads what serve says.
func ask(ns *os.File, to netip.AddrPort, wait time.Duration) (string, error) {
	c, err := dialFrom(ns, "tcp", to.String(), wait)
	if err != nil {
		return "", err
	}
	defer c.Close()
	_ = c.SetReadDeadline(time.Now().Add(wait))
	buf := make([]byte, 64)
	n, err := c.Read(buf)
	return string(buf[:n]), err
}

// createAndDie runs in a child: it makes the link of slot 1 and kills itself
// at a step.
func createAndDie(step string) {
	m, err := Open(testConfig(os.Getenv(envDir)))
	if err == nil {
		m.fault = func(s string) error {
			if s == step {
				return unix.Kill(unix.Getpid(), unix.SIGKILL)
			}
			return nil
		}
		a4, _ := AddrFor(pool4, 1)
		a6, _ := AddrFor(pool6, 1)
		_, err = m.Create(context.Background(), Link{ID: sandboxID(1), Slot: 1, Addr4: a4, Addr6: a6})
		if err == nil {
			err = m.Remove(sandboxID(1))
		}
	}
	fmt.Fprintln(os.Stderr, "still alive:", err)
	os.Exit(1)
}

// dropTo gives the thread's namespace an address and drops what comes to it.
func dropTo(a netip.Addr) error {
	far, err := netlink.LinkByName("far")
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(far, &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}}); err != nil {
		return err
	}
	c := &nftables.Conn{}
	table := c.AddTable(&nftables.Table{Name: "silent", Family: nftables.TableFamilyIPv4})
	chain := c.AddChain(&nftables.Chain{Name: "in", Table: table, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityRaw})
	s := sideOf(a)
	c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
		s.load(s.daddr, 1), &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: a.AsSlice()}, &expr.Verdict{Kind: expr.VerdictDrop},
	}})
	return c.Flush()
}
