// SPDX-License-Identifier: Apache-2.0

package link

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

func TestShapeOfALink(t *testing.T) {
	m := open(t)
	l := testLink(t, 300)
	l.MTU = 1400
	index, err := m.Create(context.Background(), l)
	must(t, err)
	host, err := netlink.LinkByName(m.HostName(l.ID))
	must(t, err)
	a := host.Attrs()
	if a.Index != index || a.MTU != 1400 || a.HardwareAddr.String() != "02:62:69:00:00:01" || a.Flags&net.FlagUp != 0 {
		t.Errorf("host end = %+v, want index %d, down", a, index)
	}
	if a.RawFlags&unix.IFF_NOARP == 0 || a.GSOMaxSize > 65536 || a.GROMaxSize > 65536 || a.NumTxQueues != 1 {
		t.Errorf("host end: flags %x, gso %d, gro %d, queues %d", a.RawFlags, a.GSOMaxSize, a.GROMaxSize, a.NumTxQueues)
	}
	must(t, m.Up(l.ID))
	must(t, m.Up(l.ID)) // again
	for path, want := range map[string]string{
		sysctl6 + m.HostName(l.ID) + "/accept_ra":                "0",
		sysctl6 + m.HostName(l.ID) + "/accept_redirects":         "0",
		sysctl4 + "conf/" + m.HostName(l.ID) + "/rp_filter":      "1",
		sysctl4 + "conf/" + m.HostName(l.ID) + "/send_redirects": "0",
		sysctl4 + "conf/" + m.HostName(l.ID) + "/forwarding":     "1",
		sysctl4 + "ip_forward":                                   "1",
		sysctl6 + "all/forwarding":                               "1",
	} {
		if got, err := readSysctl(path); err != nil || got != want {
			t.Errorf("%s = %q, %v, want %q", path, got, err, want)
		}
	}
	addrs, err := netlink.AddrList(host, netlink.FAMILY_ALL)
	must(t, err)
	if len(addrs) != 0 {
		t.Errorf("host end has addresses %v, want none", addrs)
	}
	if d := cmp.Diff([]string{
		"100.96.1.44 02:62:68:00:01:2c perm=true", "fd62:6b68::12c 02:62:68:00:01:2c perm=true",
	}, neighbours(t, index)); d != "" {
		t.Errorf("host neighbours (-want +got):\n%s", d)
	}
	must(t, inNetns(openNetns(t, m, l.ID), func() error {
		eth, err := netlink.LinkByName("eth0")
		must(t, err)
		if got, want := eth.Attrs().HardwareAddr.String(), "02:62:68:00:01:2c"; got != want {
			t.Errorf("sandbox's hardware address = %s, want %s", got, want)
		}
		addrs, err := netlink.AddrList(eth, netlink.FAMILY_ALL)
		must(t, err)
		var got []string
		for _, a := range addrs {
			got = append(got, fmt.Sprint(a.IPNet, " tentative=", a.Flags&unix.IFA_F_TENTATIVE != 0))
		}
		if d := cmp.Diff([]string{"100.96.1.44/32 tentative=false", "fd62:6b68::12c/128 tentative=false"}, got); d != "" {
			t.Errorf("sandbox's addresses (-want +got):\n%s", d)
		}
		if d := cmp.Diff([]string{
			"169.254.1.1 02:62:69:00:00:01 perm=true", "fe80::1 02:62:69:00:00:01 perm=true",
		}, neighbours(t, eth.Attrs().Index)); d != "" {
			t.Errorf("sandbox's neighbours (-want +got):\n%s", d)
		}
		lo, err := netlink.LinkByName("lo")
		must(t, err)
		if lo.Attrs().Flags&net.FlagUp == 0 {
			t.Error("lo is down inside")
		}
		for _, key := range []string{"accept_ra", "accept_dad", "accept_redirects"} {
			if got, err := readSysctl(sysctl6 + "eth0/" + key); err != nil || got != "0" {
				t.Errorf("eth0 %s = %q, %v, want 0", key, got, err)
			}
		}
		return nil
	}))
}

// neighbours answers the unicast neighbours of a link of the thread's netns.
func neighbours(t *testing.T, index int) []string {
	t.Helper()
	var all []string
	for _, fam := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		ns, err := netlink.NeighList(index, fam)
		must(t, err)
		for _, n := range ns {
			if !n.IP.IsMulticast() {
				all = append(all, fmt.Sprintf("%s %s perm=%t", n.IP, n.HardwareAddr, n.State == netlink.NUD_PERMANENT))
			}
		}
	}
	return all
}

func TestCreateAgainKeepsWhatIsRight(t *testing.T) {
	m := open(t)
	l := testLink(t, 2)
	first, err := m.Create(context.Background(), l)
	must(t, err)
	again, err := m.Create(context.Background(), l)
	must(t, err)
	if first != again {
		t.Errorf("second Create made a new link: index %d, was %d", again, first)
	}
	l.MTU = 9000 // differs: made again
	other, err := m.Create(context.Background(), l)
	must(t, err)
	if other == first {
		t.Error("Create kept a link with another MTU")
	}
	must(t, m.Up(l.ID))
	if _, err := m.Create(context.Background(), l); err != nil {
		t.Errorf("Create of a link that is up and right: %v", err)
	}
	l.MTU = 1500
	if _, err := m.Create(context.Background(), l); err == nil || !strings.Contains(err.Error(), "is up and differs") {
		t.Errorf("Create over a running link = %v, want a refusal", err)
	}
}

func TestCreateHeedsContext(t *testing.T) {
	m := open(t)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := m.Create(ctx, testLink(t, 1)); !errors.Is(err, context.Canceled) {
		t.Errorf("error = %v, want context.Canceled", err)
	}
}

func TestUnknownLink(t *testing.T) {
	m := open(t)
	for name, f := range map[string]func(string) error{"Up": m.Up, "Down": m.Down} {
		if err := f(sandboxID(9)); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s = %v, want ErrNotFound", name, err)
		}
	}
	must(t, m.Remove(sandboxID(9)))
	if err := m.Remove("../../../bin"); err == nil {
		t.Error("Remove took a path for an id")
	}
}

// left answers everything of the machine that a sandbox could leave behind.
func left(t *testing.T, m *Manager) []string {
	t.Helper()
	var all []string
	links, err := netlink.LinkList()
	must(t, err)
	for _, l := range links {
		if n := l.Attrs().Name; n != "lo" && n != "uplink" {
			all = append(all, "link "+n)
		}
	}
	files, err := os.ReadDir(m.cfg.NetnsDir)
	must(t, err)
	for _, f := range files {
		all = append(all, "file "+f.Name())
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	for _, line := range strings.Split(string(mounts), "\n") {
		if strings.Contains(line, m.cfg.NetnsDir) {
			all = append(all, "mount "+line)
		}
	}
	for _, fam := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := netlink.RouteList(nil, fam)
		must(t, err)
		for _, r := range routes {
			if r.Dst != nil && (pool4.Contains(addrOf(r.Dst.IP)) || pool6.Contains(addrOf(r.Dst.IP))) {
				all = append(all, "route "+r.Dst.String())
			}
		}
		ns, err := netlink.NeighList(0, fam)
		must(t, err)
		for _, n := range ns {
			if n.IP.IsGlobalUnicast() && n.State == netlink.NUD_PERMANENT {
				all = append(all, "neighbour "+n.IP.String())
			}
		}
	}
	c, err := dialProto(unix.NETLINK_NETFILTER)
	must(t, err)
	defer c.close()
	must(t, c.eachFlow(func(f flow) {
		if pool4.Contains(f.src) || pool6.Contains(f.src) {
			all = append(all, "flow "+f.src.String())
		}
	}))
	return all
}

func TestRemoveLeavesNothing(t *testing.T) {
	m := open(t)
	for i := range uint32(200) {
		l := launch(t, m, 1+i%3)
		must(t, m.Remove(l.ID))
		must(t, m.Remove(l.ID))
	}
	if got := left(t, m); len(got) != 0 {
		t.Errorf("after 200 sandboxes these are left: %q", got)
	}
}

func TestManyAtOnce(t *testing.T) {
	m := open(t)
	const n = 20
	run := func(f func(Link) error) {
		t.Helper()
		var g errgroup.Group
		for i := range uint32(n) {
			l := testLink(t, 1+i)
			g.Go(func() error { return f(l) })
		}
		must(t, g.Wait())
	}
	run(func(l Link) error {
		if _, err := m.Create(context.Background(), l); err != nil {
			return err
		}
		return m.Up(l.ID)
	})
	ids, err := m.List()
	must(t, err)
	if len(ids) != n || !slices.IsSorted(ids) {
		t.Errorf("List = %q, want %d sorted ids", ids, n)
	}
	run(func(l Link) error { return m.Remove(l.ID) })
	if got := left(t, m); len(got) != 0 {
		t.Errorf("left: %q", got)
	}
}

// steps are the fault points of Create, in order.
var steps = []string{"netns file", "netns", "pair", "host sysctls", "inside"}

func TestFailAtEveryStep(t *testing.T) {
	for _, step := range steps {
		t.Run(step, func(t *testing.T) {
			m := open(t)
			boom := errors.New("boom")
			reached := false
			m.fault = func(s string) error {
				if s == step {
					reached = true
					return boom
				}
				return nil
			}
			l := testLink(t, 1)
			if _, err := m.Create(context.Background(), l); !errors.Is(err, boom) {
				t.Fatalf("Create = %v, want boom", err)
			}
			if !reached {
				t.Fatal("the step was not reached")
			}
			m.fault = nil
			checkRecovers(t, m, l)
		})
	}
}

func TestKillAtEveryStep(t *testing.T) {
	for _, step := range append(steps, "unpublished", "link removed", "netns removed") {
		t.Run(step, func(t *testing.T) {
			m := open(t)
			cmd := exec.Command("/proc/self/exe")
			cmd.Env = append(os.Environ(), envKillAt+"="+step, envDir+"="+m.cfg.NetnsDir)
			out, err := cmd.CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != unix.SIGKILL {
				t.Fatalf("child ended with %v, want SIGKILL\n%s", err, out)
			}
			checkRecovers(t, m, testLink(t, 1))
		})
	}
}

// checkRecovers: what a half-made link left can be used and removed.
func checkRecovers(t *testing.T, m *Manager, l Link) {
	t.Helper()
	// Once remove it as it is, once finish it.
	must(t, m.Remove(l.ID))
	if got := left(t, m); len(got) != 0 {
		t.Errorf("left after Remove: %q", got)
	}
	_, err := m.Create(context.Background(), l)
	must(t, err)
	must(t, m.Up(l.ID))
}

func TestFinishAtEveryStep(t *testing.T) {
	f := newFar(t)
	markAll(t)
	to := serve(t, f.ns, net.JoinHostPort(f.addr4.String(), "0"))
	for i, step := range steps {
		m := open(t)
		l := testLink(t, uint32(1+i))
		m.fault = func(s string) error {
			if s == step {
				return errors.New("boom")
			}
			return nil
		}
		if _, err := m.Create(context.Background(), l); err == nil {
			t.Fatalf("Create passed step %q", step)
		}
		m.fault = nil
		_, err := m.Create(context.Background(), l)
		must(t, err)
		must(t, m.Up(l.ID))
		if _, err := ask(openNetns(t, m, l.ID), to, 5*time.Second); err != nil {
			t.Errorf("finished after %q: %v", step, err)
		}
		must(t, m.Remove(l.ID))
	}
}

func TestHalfStates(t *testing.T) {
	for name, arrange := range map[string]func(t *testing.T, m *Manager, l Link){
		"netns without link": func(t *testing.T, m *Manager, l Link) {
			launch(t, m, l.Slot)
			must(t, m.rt.do(deleteLink(m.HostName(l.ID))))
		},
		"link without netns file": func(t *testing.T, m *Manager, l Link) {
			launch(t, m, l.Slot)
			must(t, removeNetnsFile(m.NetnsPath(l.ID)))
			// The link dies with its namespace unless someone holds that.
		},
		"link alone": func(t *testing.T, m *Manager, l Link) {
			must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: m.HostName(l.ID)}, PeerName: "stray"}))
		},
		"file without mount": func(t *testing.T, m *Manager, l Link) {
			must(t, os.WriteFile(m.NetnsPath(l.ID), nil, 0o444))
		},
		"mount without file under it": func(t *testing.T, m *Manager, l Link) {
			launch(t, m, l.Slot)
			must(t, unix.Mount(threadNetns, m.NetnsPath(l.ID), "", unix.MS_BIND, "")) // two mounts
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := open(t)
			l := testLink(t, 5)
			arrange(t, m, l)
			must(t, m.Remove(l.ID))
			if got := left(t, m); len(got) != 0 {
				t.Errorf("left after Remove: %q", got)
			}
			arrange(t, m, l)
			if name == "mount without file under it" {
				return // another namespace hides ours; only removing makes sense
			}
			if _, err := m.Create(context.Background(), l); err != nil && !strings.Contains(err.Error(), "is up and differs") {
				t.Errorf("Create over it: %v", err)
			}
		})
	}
}

func TestListIgnoresOthers(t *testing.T) {
	m := open(t)
	other := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "bh0"}, PeerName: "bh1"}
	must(t, netlink.LinkAdd(other))
	t.Cleanup(func() { must(t, netlink.LinkDel(other)) })
	must(t, os.WriteFile(filepath.Join(m.cfg.NetnsDir, "notes.txt"), nil, 0o644))
	launch(t, m, 4)
	got, err := m.List()
	must(t, err)
	if d := cmp.Diff([]string{sandboxID(4)}, got); d != "" {
		t.Errorf("List (-want +got):\n%s", d)
	}
}

func BenchmarkCreate(b *testing.B) {
	m := open(b)
	links := make([]Link, 64)
	for i := range links {
		links[i] = testLink(b, uint32(i+1))
	}
	b.ResetTimer()
	for i := 0; b.Loop(); i++ {
		l := links[i%len(links)]
		if i >= len(links) {
			b.StopTimer()
			must(b, m.Remove(l.ID))
			b.StartTimer()
		}
		if _, err := m.Create(context.Background(), l); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkUp(b *testing.B) {
	m := open(b)
	l := launch(b, m, 1)
	for b.Loop() {
		b.StopTimer()
		must(b, m.Down(l.ID))
		b.StartTimer()
		must(b, m.Up(l.ID))
	}
}

func BenchmarkRemove(b *testing.B) {
	m := open(b)
	l := testLink(b, 1)
	for b.Loop() {
		b.StopTimer()
		launch(b, m, 1)
		b.StartTimer()
		must(b, m.Remove(l.ID))
	}
}
