// SPDX-License-Identifier: Apache-2.0

package threats

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	ebpflink "github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/netpol"
	"github.com/bulkheadhq/bulkhead/netpol/enforce"
)

// openRule opens other4 and other6.
const openRule = "- {name: open, action: allow, to: [{cidr: 203.0.113.0/24}, {cidr: '2001:db8:1::/48'}], ports: [any/udp, any/tcp]}\n"

// flood sends packets of an attack until the returned function is called,
// which answers how many.
func (b *box) flood(t testing.TB, frames ...[]byte) (stop func() int) {
	t.Helper()
	quit, done := make(chan struct{}), make(chan int, 1) // closed by stop; one number
	go func() {
		for n := 0; ; n++ {
			select {
			case <-quit:
				done <- n
				return
			default:
			}
			for _, f := range frames {
				// A link that is down or gone refuses it.
				_ = unix.Sendto(b.raw, f, unix.MSG_DONTWAIT, &unix.SockaddrLinklayer{Ifindex: b.inside, Halen: 6})
			}
			time.Sleep(20 * time.Microsecond)
		}
	}()
	return func() int { close(quit); return <-done }
}

// A process that sends from its first instruction on, while the link comes up.
// The same with whole sandboxes is test/e2e's.
func TestSendingBeforeThePolicy(t *testing.T) {
	n := theWorld(t)
	bad := one(packet{dst: other4, port: 7777})
	n.control(t, attack{"at once", "no_rule", bad, false})
	for range 20 {
		l, sb := n.plan(t, compile(t, ""))
		b := n.create(t, l)
		sb.Ifindex = b.link
		k := newToken()
		n.await(k)
		stop := b.flood(t, bad(b, k)...)
		err := errors.Join(n.enforce.Attach(context.Background(), sb), n.links.Up(b.id))
		if err == nil {
			b.dropped(t, "no_rule", nil, 1) // waits until the flood meets the program
		}
		time.Sleep(settle)
		sent := stop()
		dropped := b.drops(t)["no_rule"]
		if err := errors.Join(err, n.links.Down(b.id), n.enforce.Detach(b.id, b.slot)); err != nil {
			t.Fatal(err)
		}
		if sent == 0 || dropped == 0 {
			t.Fatalf("control: %d packets sent, %d met the program", sent, dropped)
		}
		if got := n.count(k); got != 0 {
			t.Fatalf("%d packets arrived before the policy was there", got)
		}
		n.forget(k)
	}
}

// cutOff takes the programs off a sandbox's link behind the agent's back, as a
// careless tool would.
func (b *box) cutOff(t testing.TB) {
	t.Helper()
	var pins []string
	err := filepath.WalkDir(filepath.Join(b.node.dir, "bpf"), func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && strings.Contains(path, b.id) {
			pins = append(pins, path)
		}
		return err
	})
	must(t, err)
	for _, p := range pins {
		must(t, os.Remove(p)) // what holds a TCX link
	}
	l, err := netlink.LinkByName(b.host)
	must(t, err)
	clsact := &netlink.GenericQdisc{
		QdiscType:  "clsact",
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: l.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT},
	}
	if err := netlink.QdiscDel(clsact); err == nil {
		return
	}
	// The kernel detaches a TCX link some time after its last pin has gone.
	eventually(t, func() string {
		for _, at := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
			q, err := ebpflink.QueryPrograms(ebpflink.QueryOptions{Target: b.link, Attach: at})
			if err != nil || len(q.Programs) != 0 {
				return fmt.Sprintf("a program stays on %s: %v, %v", b.host, q, err)
			}
		}
		return ""
	})
}

func TestProgramTakenOff(t *testing.T) {
	n := theWorld(t)
	b := n.sandbox(t, openRule)
	datagram := attack{"unmarked", "", one(packet{dst: other4, port: 7777}), false}
	n.control(t, datagram)
	k := newToken()
	n.await(k)
	defer n.forget(k)
	b.send(t, datagram.frames(b, k)...)
	if n.waitFor(k, 1, patience) == 0 {
		t.Fatal("control: the packet does not arrive with the program")
	}
	must(t, n.enforce.Verify(b.id, b.slot, b.link))

	b.cutOff(t)
	if err := n.enforce.Verify(b.id, b.slot, b.link); !errors.Is(err, enforce.ErrNotEnforced) {
		t.Errorf("verify: got %v, want ErrNotEnforced", err)
	}
	before, _, err := n.links.SecondLayerDrops()
	must(t, err)
	k2 := newToken()
	n.await(k2)
	defer n.forget(k2)
	b.send(t, datagram.frames(b, k2)...)
	eventually(t, func() string {
		now, _, err := n.links.SecondLayerDrops()
		must(t, err)
		if now != before+1 {
			return fmt.Sprintf("the second layer dropped %d packets, want 1", now-before)
		}
		return ""
	})
	if n.waitFor(k2, 1, settle) != 0 {
		t.Error("a packet without a mark arrived")
	}
	// Without either layer it would: the attack is real.
	must(t, n.links.Purge())
	k3 := newToken()
	n.await(k3)
	defer n.forget(k3)
	b.send(t, datagram.frames(b, k3)...)
	if n.waitFor(k3, 1, patience) == 0 {
		t.Error("control: the packet does not arrive without both layers")
	}
	n.reopenLinks(t)

	// The agent's repair.
	sb := enforce.Sandbox{
		ID: b.id, Slot: b.slot, Ifindex: b.link, MAC: b.mac, Addrs: []netip.Addr{b.addr4, b.addr6}, Program: compile(t, openRule), PolicyRev: 2,
	}
	must(t, n.enforce.Attach(context.Background(), sb))
	must(t, n.enforce.Verify(b.id, b.slot, b.link))
	b.pass(t)
}

// The mark that an allowed packet carries is not the sandbox's to set.
func TestForgedMark(t *testing.T) {
	n := theWorld(t)
	b := n.sandbox(t, "")
	b.cutOff(t)
	marked := func(from *box, k token) error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		return errors.Join(
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, 0x62680000|int(b.slot)),
			unix.Sendto(fd, k[:], 0, &unix.SockaddrInet4{Port: 7777, Addr: other4.As4()}),
			unix.Close(fd),
		)
	}
	try := func(from *box, arrives bool) {
		k := newToken()
		n.await(k)
		defer n.forget(k)
		must(t, in(from.ns, func() error { return marked(from, k) }))
		if arrives && n.waitFor(k, 1, patience) == 0 {
			t.Error("control: the packet does not arrive")
		}
		if !arrives && n.waitFor(k, 1, 2*settle) != 0 {
			t.Error("a packet whose mark the sandbox set arrived")
		}
	}
	try(n.open, true)
	try(b, false)
}

// The agent finds a program that is not the one it attached.
func TestStaleAttachment(t *testing.T) {
	n := theWorld(t)
	b, other := n.sandbox(t, ""), n.sandbox(t, openRule)
	bad := attack{"denied", "no_rule", one(packet{dst: other4, port: 7777}), false}
	b.repel(t, bad)
	for name, err := range map[string]error{
		"as it is":       n.enforce.Verify(b.id, b.slot, b.link),
		"the other link": n.enforce.Verify(b.id, b.slot, other.link),
		"the other slot": n.enforce.Verify(b.id, other.slot, b.link),
		"the other id":   n.enforce.Verify(other.id, b.slot, b.link),
	} {
		if ok := err == nil; ok != (name == "as it is") {
			t.Errorf("verify, %s: %v", name, err)
		}
	}
	b.cutOff(t)
	if err := n.enforce.Verify(b.id, b.slot, b.link); !errors.Is(err, enforce.ErrNotEnforced) {
		t.Errorf("verify without programs: got %v, want ErrNotEnforced", err)
	}
	if err := n.enforce.Verify(other.id, other.slot, other.link); err != nil {
		t.Errorf("verify of the neighbour: %v", err)
	}
}

// Two sandboxes whose names look alike; and names that are paths.
func TestPinNames(t *testing.T) {
	n := theWorld(t)
	opened, closed := n.sandbox(t, openRule), n.sandbox(t, "")
	if a, b := opened.id, closed.id; a[:len(a)-1] != b[:len(b)-1] {
		t.Fatalf("ids %s and %s differ in more than the last character", a, b)
	}
	k := newToken()
	n.await(k)
	defer n.forget(k)
	datagram := one(packet{dst: other4, port: 7777})
	opened.send(t, datagram(opened, k)...)
	if n.waitFor(k, 1, patience) == 0 {
		t.Error("control: the neighbour's policy does not open it")
	}
	closed.repel(t, attack{"by the neighbour's policy", "no_rule", datagram, false})
	_, sb := n.plan(t, netpol.Program{})
	sb.Ifindex = closed.link
	for _, id := range []string{"", ".", "..", "../x", "a/b", "/abs", "a\x00b", "A", "a b", "seventeencharacters", "ä"} {
		sb.ID = id
		if err := n.enforce.Attach(context.Background(), sb); err == nil {
			t.Errorf("id %q was accepted", id)
		}
	}
	must(t, n.enforce.Verify(closed.id, closed.slot, closed.link))
}

// A policy that does not fit is refused whole, and the old one stays. The
// names of hit counters run out first.
func TestMapFull(t *testing.T) {
	n := theWorld(t)
	var boxes []*box
	for range 10 {
		boxes = append(boxes, n.sandbox(t, ""))
	}
	bad := attack{"denied", "no_rule", one(packet{dst: other4, port: 7777}), false}
	for round, b := range boxes {
		b.repel(t, bad)
		err := n.enforce.SetPolicy(b.id, b.slot, manyRules(t, round), 2, nil)
		if err == nil {
			arrives(t, n, b, packet{dst: other4, port: 7777}) // the control: what the policy opens
			continue
		}
		if round == 0 {
			t.Fatalf("the first policy does not fit: %v", err)
		}
		b.repel(t, bad)
		must(t, n.enforce.Verify(b.id, b.slot, b.link))
		b.setPolicy(t, netpol.Program{}, 3) // needs no room
		return
	}
	t.Fatal("control: the table never filled")
}

// manyRules opens other4 under as many rules as a chain may have.
func manyRules(t testing.TB, round int) netpol.Program {
	t.Helper()
	var rules strings.Builder
	rules.WriteString(openRule)
	for i := range netpol.MaxRules - 2 {
		fmt.Fprintf(&rules, "- {name: r%d-%d, action: allow, to: [{cidr: 10.%d.%d.0/24}], ports: [443/tcp]}\n", round, i, i/256, i%256)
	}
	return compile(t, rules.String())
}
