// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/netpol"
)

// clsactConfig is that of a kernel before 6.6.
func clsactConfig(t testing.TB) Config {
	cfg := testConfig(t)
	cfg.forceClsact = true
	return cfg
}

// hookings are the two ways to put programs on links. What must hold whichever
// the kernel has is tested under both; where it has no TCX both are clsact.
func hookings(t *testing.T, do func(t *testing.T, cfg Config)) {
	t.Run("tcx", func(t *testing.T) { do(t, testConfig(t)) })
	t.Run("clsact", func(t *testing.T) { do(t, clsactConfig(t)) })
}

func TestClsactIsForced(t *testing.T) {
	e := open(t, clsactConfig(t))
	if _, is := e.hooking.(clsact); !is {
		t.Errorf("got %T", e.hooking)
	}
}

// filters answers what hangs at both hooks of a link, and whether it has a
// clsact qdisc.
func filters(t testing.TB, ns nsHandle, index int) (in, out []netlink.Filter, qdisc bool) {
	t.Helper()
	h := handle(t, ns)
	l, err := h.LinkByIndex(index)
	ok(t, err)
	qdiscs, err := h.QdiscList(l)
	ok(t, err)
	for _, q := range qdiscs {
		if q.Type() != "clsact" {
			continue
		}
		qdisc = true
		in, err = h.FilterList(l, netlink.HANDLE_MIN_INGRESS)
		ok(t, err)
		out, err = h.FilterList(l, netlink.HANDLE_MIN_EGRESS)
		ok(t, err)
	}
	return in, out, qdisc
}

// attached answers how many programs a link runs at both hooks.
func attached(t testing.TB, ns nsHandle, index int) int {
	t.Helper()
	ingress, egress, _ := filters(t, ns, index)
	n := len(ingress) + len(egress)
	for _, hook := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
		ok(t, in(ns, func() error {
			got, err := link.QueryPrograms(link.QueryOptions{Target: index, Attach: hook})
			if errors.Is(err, unix.EINVAL) || errors.Is(err, ebpf.ErrNotSupported) {
				return nil // no TCX, nothing there
			}
			if err == nil {
				n += len(got.Programs)
			}
			return err
		}))
	}
	return n
}

// Real packets, both directions and families: allowed, cut by a new policy,
// denied to hard denies, and none after Detach.
func TestTraffic(t *testing.T) {
	hookings(t, func(t *testing.T, cfg Config) {
		w := newWorld(t)
		e := open(t, cfg)
		sb := sandbox(testSlot, w.link, compile(t, allowAll))
		for _, a := range []netip.Addr{up4, up6} {
			w.serve(t, a, 443, func(c net.Conn) {
				buf := make([]byte, 100)
				for {
					n, err := c.Read(buf)
					if err != nil {
						return
					}
					if _, err := c.Write(buf[:n]); err != nil {
						return
					}
				}
			})
		}
		w.attach(t, e, sb)
		echo := func(c net.Conn) error {
			buf := make([]byte, 4)
			if _, err := c.Write([]byte("ping")); err != nil {
				return err
			}
			_, err := c.Read(buf)
			return err
		}
		var conns []net.Conn
		for _, a := range []netip.Addr{up4, up6} {
			c, err := w.dial("tcp", a, 443)
			if err != nil {
				t.Fatalf("dial %s: %v; drops %v", a, err, drops(t, e, testSlot))
			}
			t.Cleanup(func() { c.Close() })
			ok(t, echo(c))
			conns = append(conns, c)
		}
		c := counters(t, e, testSlot)
		if c.EgressPackets == 0 || c.IngressPackets == 0 {
			t.Errorf("counted %+v", c)
		}
		if c, err := w.dialWithin(300*time.Millisecond, "tcp", addr4(9), 443); err == nil {
			c.Close()
			t.Error("reached another sandbox's address")
		}
		if drops(t, e, testSlot)["sandbox"] == 0 {
			t.Errorf("drops: %v", drops(t, e, testSlot))
		}

		ok(t, e.SetPolicy(sb.ID, testSlot, compile(t, allowAll4), 2, nil))
		ok(t, echo(conns[0]))
		_, err := conns[1].Write([]byte("cut"))
		ok(t, err)
		eventually(t, func() string {
			if got := drops(t, e, testSlot); got["no_rule"] == 0 {
				return fmt.Sprintf("the connection is not cut: %v", got)
			}
			return ""
		})
		ok(t, in(w.host, func() error { return e.Verify(sb.ID, testSlot, w.link) }))

		// Nothing changes while another process takes over.
		ok(t, e.Close())
		ok(t, echo(conns[0]))
		e = open(t, cfg)
		ok(t, in(w.host, func() error { return e.Verify(sb.ID, testSlot, w.link) }))
		ok(t, echo(conns[0]))

		w.down(t)
		ok(t, in(w.host, func() error { return e.Detach(sb.ID, testSlot) }))
		if in, out, qdisc := filters(t, w.host, w.link); len(in)+len(out) > 0 || qdisc {
			t.Errorf("left: %d and %d filters, qdisc %v", len(in), len(out), qdisc)
		}
		if _, err := os.Stat(e.linkDir(sb.ID)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("pins are left: %v", err)
		}
		if ids, err := e.List(); err != nil || len(ids) != 0 {
			t.Errorf("list: %v, %v", ids, err)
		}
	})
}

// foreignFilter is somebody else's filter that lets everything pass.
func foreignFilter(t testing.TB, index int, parent, handle uint32, priority uint16) *netlink.BpfFilter {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
	ok(t, err)
	t.Cleanup(func() { p.Close() })
	return &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: index, Parent: parent, Handle: handle, Priority: priority, Protocol: unix.ETH_P_ALL},
		Fd:          p.FD(), Name: "foreign", DirectAction: true,
	}
}

// Verify tells what has become of the filters, and Attach puts it right.
func TestClsactVerifyAndRepair(t *testing.T) {
	ns, index := links(t, 2)
	e := open(t, clsactConfig(t))
	sb := sandbox(1, index[0], compile(t, allowAll))
	h := handle(t, ns)
	verify := func() error { return in(ns, func() error { return e.Verify(sb.ID, 1, sb.Ifindex) }) }
	attach := func() { t.Helper(); ok(t, in(ns, func() error { return e.Attach(context.Background(), sb) })) }
	attach()
	ok(t, verify())
	attach()
	ok(t, verify())
	ours := e.hooks()[0].filter(index[0])
	l, err := h.LinkByIndex(index[0])
	ok(t, err)
	qdisc := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: index[0], Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}
	for _, c := range []struct {
		name  string
		spoil func()
		after func() // what stays and is not ours to remove
	}{
		{"filter removed", func() { ok(t, h.FilterDel(ours)) }, nil},
		{"qdisc removed", func() { ok(t, h.QdiscDel(qdisc)) }, nil},
		{"program replaced", func() { ok(t, h.FilterReplace(foreignFilter(t, index[0], ours.Parent, ours.Handle, ours.Priority))) }, nil},
		{"not direct", func() {
			f := e.hooks()[0].filter(index[0])
			f.DirectAction = false
			ok(t, h.FilterDel(ours))
			ok(t, h.FilterAdd(f))
		}, nil},
		{"another one in front", func() { ok(t, h.FilterAdd(foreignFilter(t, index[0], ours.Parent, 7, ours.Priority))) }, func() {
			ok(t, h.FilterDel(foreignFilter(t, index[0], ours.Parent, 7, ours.Priority)))
		}},
		{"our program elsewhere", func() {
			f := e.hooks()[0].filter(index[0])
			f.Handle = 7
			ok(t, h.FilterDel(ours))
			ok(t, h.FilterAdd(f))
		}, func() { ok(t, h.FilterDel(foreignFilter(t, index[0], ours.Parent, 7, ours.Priority))) }},
		{"pin removed", func() { ok(t, os.Remove(filepath.Join(e.linkDir(sb.ID), fmt.Sprint("egress_", index[0])))) }, nil},
		{"moved to another link", func() { sb.Ifindex = index[1] }, func() {
			if in, out, qdisc := filters(t, ns, index[0]); len(in)+len(out) > 0 || qdisc {
				t.Errorf("the old link keeps %d and %d filters, qdisc %v", len(in), len(out), qdisc)
			}
			sb.Ifindex = index[0]
			attach()
		}},
	} {
		c.spoil()
		if err := verify(); !errors.Is(err, ErrNotEnforced) {
			t.Errorf("%s: verify: got %v, want ErrNotEnforced", c.name, err)
		}
		attach()
		if err := verify(); err != nil {
			t.Errorf("%s: verify after repair: %v", c.name, err)
		}
		if c.after != nil {
			c.after()
		}
	}

	// One that comes after ours changes nothing, and stays.
	later := foreignFilter(t, index[0], ours.Parent, 1, 2)
	ok(t, h.FilterAdd(later))
	ok(t, verify())
	if _, is := e.hooking.(clsact); is {
		x, err := link.AttachTCX(link.TCXOptions{Interface: 1, Program: e.fromSandbox, Attach: ebpf.AttachTCXIngress})
		if err == nil { // the kernel has TCX, which runs before every filter
			x.Close()
			var before link.Link
			ok(t, in(ns, func() (err error) {
				before, err = link.AttachTCX(link.TCXOptions{Interface: index[0], Program: e.toSandbox, Attach: ebpf.AttachTCXEgress})
				return err
			}))
			if err := verify(); !errors.Is(err, ErrNotEnforced) {
				t.Errorf("TCX program: verify: got %v, want ErrNotEnforced", err)
			}
			ok(t, before.Close())
			ok(t, verify())
		}
	}
	ok(t, in(ns, func() error { return e.Detach(sb.ID, 1) }))
	left, err := h.FilterList(l, ours.Parent)
	if err != nil || len(left) != 1 || left[0].Attrs().Priority != 2 {
		t.Errorf("filters after detach: got %+v, %v, want the foreign one", left, err)
	}
	ok(t, h.FilterDel(later))
}

// Detach does not mind what is gone already, and attaching after it works.
func TestClsactDetach(t *testing.T) {
	ns, index := links(t, 2)
	cfg := clsactConfig(t)
	e := open(t, cfg)
	h := handle(t, ns)
	one, two := sandbox(1, index[0], compile(t, allowAll)), sandbox(2, index[1], compile(t, allowAll))
	attach := func(sb Sandbox) {
		t.Helper()
		ok(t, in(ns, func() error { return e.Attach(context.Background(), sb) }))
	}
	detach := func(sb Sandbox) { t.Helper(); ok(t, in(ns, func() error { return e.Detach(sb.ID, sb.Slot) })) }
	attach(one)
	attach(two)

	// A process that died after it had closed the slot: the filters are found.
	e.shm.setIfindex(1, 0)
	ok(t, e.Close())
	e = open(t, cfg)
	detach(one)
	detach(one)
	if in, out, qdisc := filters(t, ns, index[0]); len(in)+len(out) > 0 || qdisc {
		t.Errorf("left: %d and %d filters, qdisc %v", len(in), len(out), qdisc)
	}
	ok(t, in(ns, func() error { return e.Verify(two.ID, 2, index[1]) }))

	l, err := h.LinkByIndex(index[1])
	ok(t, err)
	ok(t, h.LinkDel(l))
	if err := in(ns, func() error { return e.Verify(two.ID, 2, index[1]) }); !errors.Is(err, ErrNotEnforced) {
		t.Errorf("verify without a link: got %v", err)
	}
	detach(two)
	if ids, err := e.List(); err != nil || len(ids) != 0 {
		t.Errorf("list: %v, %v", ids, err)
	}
	attach(one)
	ok(t, in(ns, func() error { return e.Verify(one.ID, 1, index[0]) }))
	detach(one)
}

// Another version of the program takes the place of the old one, and nothing
// passes unseen meanwhile.
func TestClsactUpgrade(t *testing.T) {
	ns, index := links(t, 2)
	cfg := clsactConfig(t)
	e := open(t, cfg)
	one, two := sandbox(1, index[0], compile(t, allowAll)), sandbox(2, index[1], netpol.Program{})
	for _, sb := range []Sandbox{one, two} {
		ok(t, in(ns, func() error { return e.Attach(context.Background(), sb) }))
	}
	was, err := programID(e.fromSandbox)
	ok(t, err)
	h := handle(t, ns)
	ok(t, h.FilterDel(e.hooks()[0].filter(index[1])))
	ok(t, e.writeMeta([32]byte{1})) // pins of another version
	ok(t, e.Close())
	ok(t, in(ns, func() (err error) { e, err = Open(cfg); return err }))
	t.Cleanup(func() { ok(t, e.Purge()) })
	if is, err := programID(e.fromSandbox); err != nil || is == was {
		t.Errorf("program %d, then %d, %v", was, is, err)
	}
	ok(t, in(ns, func() error { return e.Verify(one.ID, 1, index[0]) }))
	if err := in(ns, func() error { return e.Verify(two.ID, 2, index[1]) }); !errors.Is(err, ErrNotEnforced) {
		t.Errorf("verify of a filter that was removed before: got %v", err)
	}
	for _, sb := range []Sandbox{one, two} {
		ok(t, in(ns, func() error { return e.Detach(sb.ID, sb.Slot) }))
	}
}
