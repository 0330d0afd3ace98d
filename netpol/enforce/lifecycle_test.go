// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/bpf"
	"github.com/bulkheadhq/bulkhead/netpol"
)

// links makes a namespace with n veth pairs and answers their indices.
func links(t testing.TB, n int) (nsHandle, []int) {
	t.Helper()
	ns, far := newNS(t), newNS(t)
	h := handle(t, ns)
	out := make([]int, n)
	for i := range out {
		mac := net.HardwareAddr{0x02, 0, 0, 1, 0, byte(i)}
		out[i] = veth(t, h, fmt.Sprintf("bh%d", i), net.HardwareAddr(hostMAC[:]), fmt.Sprintf("p%d", i), mac, far)
	}
	return ns, out
}

func TestAttachChecksItsInput(t *testing.T) {
	e := open(t, testConfig(t))
	good := sandbox(1, 1, netpol.Program{})
	for name, spoil := range map[string]func(*Sandbox){
		"no id":         func(s *Sandbox) { s.ID = "" },
		"long id":       func(s *Sandbox) { s.ID = strings.Repeat("a", 17) },
		"path":          func(s *Sandbox) { s.ID = "../../etc" },
		"dot":           func(s *Sandbox) { s.ID = "." },
		"slot 0":        func(s *Sandbox) { s.Slot = 0 },
		"slot too high": func(s *Sandbox) { s.Slot = 65 },
		"no link":       func(s *Sandbox) { s.Ifindex = 0 },
		"no such link":  func(s *Sandbox) { s.Ifindex = 1 << 30 },
		"MAC":           func(s *Sandbox) { s.MAC = s.MAC[:5] },
		"no address":    func(s *Sandbox) { s.Addrs = nil },
		"two of one":    func(s *Sandbox) { s.Addrs = []netip.Addr{addr4(1), addr4(2)} },
		"mapped":        func(s *Sandbox) { s.Addrs = []netip.Addr{netip.MustParseAddr("::ffff:100.96.0.1")} },
		"outside pools": func(s *Sandbox) { s.Addrs = []netip.Addr{netip.MustParseAddr("10.0.0.1")} },
		"mapped prefix": func(s *Sandbox) {
			s.Program.Entries = []netpol.Entry{{Prefix: netip.MustParsePrefix("::ffff:10.0.0.0/104")}}
		},
		"unknown rule": func(s *Sandbox) {
			s.Program.Entries = []netpol.Entry{{Prefix: pool4, Ports: []netpol.PortRule{{Lo: 1, Hi: 1, Proto: 6, Rule: 3}}}}
		},
		"too many port rules": func(s *Sandbox) {
			s.Program.Rules = []netpol.RuleRef{{Tenant: "acme", Name: "x"}}
			s.Program.Entries = []netpol.Entry{{Prefix: pool4, Ports: make([]netpol.PortRule, 33)}}
		},
		"long rule name": func(s *Sandbox) {
			s.Program.Rules = []netpol.RuleRef{{Tenant: "acme", Name: strings.Repeat("x", 600)}}
		},
	} {
		sb := good
		spoil(&sb)
		if err := e.Attach(context.Background(), sb); err == nil {
			t.Errorf("%s: attached", name)
		}
		if sb.ID == good.ID {
			ok(t, e.Detach(sb.ID, 0))
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := e.Attach(ctx, good); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: got %v", err)
	}
	for _, err := range []error{
		e.SetPolicy("nobody", 1, netpol.Program{}, 1, nil), e.Verify("nobody", 1, 1), e.Verify("nobody", 0, 1),
		func() error { _, err := e.Counters(1); return err }(),
		func() error { _, err := e.RuleCounters("nobody", 99); return err }(),
		func() error { _, err := e.Explain(5, netpol.Flow{}); return err }(),
	} {
		if !errors.Is(err, ErrNotFound) {
			t.Errorf("got %v, want ErrNotFound", err)
		}
	}
}

func TestSlotsAreExclusive(t *testing.T) {
	ns, index := links(t, 2)
	e := open(t, testConfig(t))
	one := sandbox(1, index[0], netpol.Program{})
	ok(t, in(ns, func() error { return e.Attach(context.Background(), one) }))
	other := sandbox(2, index[1], netpol.Program{})
	other.Slot = 1
	moved := one
	moved.Slot = 2
	for _, sb := range []Sandbox{other, moved} {
		if err := in(ns, func() error { return e.Attach(context.Background(), sb) }); !errors.Is(err, ErrSlotTaken) {
			t.Errorf("attach %s to slot %d: got %v, want ErrSlotTaken", sb.ID, sb.Slot, err)
		}
	}
	if err := e.Detach(one.ID, 2); err == nil {
		t.Error("detached with the wrong slot")
	}
	ok(t, e.Detach("neverseen", 1))
	ok(t, in(ns, func() error { return e.Verify(one.ID, 1, index[0]) }))
}

// Verify tells every way in which the kernel may have come to do something
// else, and Attach puts it right.
func TestVerifyAndRepair(t *testing.T) {
	ns, index := links(t, 2)
	e := open(t, testConfig(t))
	if _, is := e.hooking.(tcx); !is {
		t.Skip("this kernel has no TCX: TestClsactVerifyAndRepair")
	}
	sb := sandbox(1, index[0], compile(t, allowAll))
	verify := func() error { return in(ns, func() error { return e.Verify(sb.ID, 1, sb.Ifindex) }) }
	again := func() { t.Helper(); ok(t, in(ns, func() error { return e.Attach(context.Background(), sb) })) }
	again()
	ok(t, verify())
	again()
	ok(t, verify())

	pin := func(name string) string { return filepath.Join(e.linkDir(sb.ID), name) }
	foreign, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()},
	})
	ok(t, err)
	defer foreign.Close()
	for _, c := range []struct {
		name  string
		spoil func() (undo func())
	}{
		{"detached by hand", func() func() {
			l, err := link.LoadPinnedLink(pin("ingress"), nil)
			ok(t, err)
			defer l.Close()
			ok(t, l.Detach())
			return nil
		}},
		{"unpinned", func() func() {
			ok(t, os.Remove(pin("egress")))
			eventually(t, func() string { // the kernel lets go a little later
				var n int
				err := in(ns, func() error {
					got, err := link.QueryPrograms(link.QueryOptions{Target: sb.Ifindex, Attach: ebpf.AttachTCXEgress})
					if err == nil {
						n = len(got.Programs)
					}
					return err
				})
				if n == 0 {
					return ""
				}
				return fmt.Sprintf("%d programs, %v", n, err)
			})
			return nil
		}},
		{"another program", func() func() {
			l, err := link.LoadPinnedLink(pin("ingress"), nil)
			ok(t, err)
			defer l.Close()
			ok(t, l.Update(foreign))
			return nil
		}},
		{"a program before ours", func() func() {
			var l link.Link
			ok(t, in(ns, func() (err error) {
				l, err = link.AttachTCX(link.TCXOptions{Interface: sb.Ifindex, Program: foreign, Attach: ebpf.AttachTCXIngress, Anchor: link.Head()})
				return err
			}))
			return func() { l.Close() }
		}},
		{"slot closed", func() func() { e.shm.setIfindex(1, 0); return nil }},
		{"slot of another link", func() func() { e.shm.setIfindex(1, 77); return nil }},
		{"link not bound", func() func() { ok(t, e.maps["links"].Delete(uint32(sb.Ifindex))); return nil }},
		{"no policy", func() func() { e.shm.setPolicy(1, 0, 0); return nil }},
	} {
		undo := c.spoil()
		if err := verify(); !errors.Is(err, ErrNotEnforced) {
			t.Errorf("%s: got %v, want ErrNotEnforced", c.name, err)
		}
		again()
		if err := verify(); err != nil {
			t.Errorf("%s: after repair: %v", c.name, err)
		}
		if undo != nil {
			undo()
		}
	}

	// The link is made anew, with another index.
	was := counters(t, e, 1)
	sb.Ifindex = index[1]
	if err := verify(); !errors.Is(err, ErrNotEnforced) {
		t.Errorf("other link: got %v", err)
	}
	again()
	ok(t, verify())
	if diff := cmp.Diff(was, counters(t, e, 1)); diff != "" {
		t.Errorf("counters moved with the link:\n%s", diff)
	}
	var owner uint32
	if err := e.maps["links"].Lookup(uint32(index[0]), &owner); !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Errorf("the old link is still bound: %d, %v", owner, err)
	}

	// And the link may be gone before Detach.
	h := handle(t, ns)
	l, err := h.LinkByIndex(index[1])
	ok(t, err)
	ok(t, h.LinkDel(l))
	if err := verify(); !errors.Is(err, ErrNotEnforced) {
		t.Errorf("no link: got %v", err)
	}
	ok(t, e.Detach(sb.ID, 1))
}

func TestOpenRefuses(t *testing.T) {
	cfg := testConfig(t)
	e := open(t, cfg)
	if _, err := Open(cfg); !errors.Is(err, ErrLocked) {
		t.Errorf("second open: got %v, want ErrLocked", err)
	}
	ok(t, e.Close())
	ok(t, e.Close())
	if err := e.SetHostAddrs(nil); !errors.Is(err, ErrClosed) {
		t.Errorf("use after close: got %v", err)
	}

	other := cfg
	other.MaxSandboxes = 65
	if _, err := Open(other); !errors.Is(err, ErrLayout) || !strings.Contains(err.Error(), "made for 64 sandboxes, not 65") {
		t.Errorf("other size: got %v", err)
	}
	meta, err := ebpf.LoadPinnedMap(e.metaPin(), nil)
	ok(t, err)
	ok(t, meta.Put(uint32(0), bpf.DatapathBhMeta{Layout: 3, MaxSandboxes: 64}))
	if _, err := Open(cfg); !errors.Is(err, ErrLayout) || !strings.Contains(err.Error(), "layout 3") {
		t.Errorf("other layout: got %v", err)
	}
	ok(t, meta.Put(uint32(0), bpf.DatapathBhMeta{Layout: 2, MaxSandboxes: 64}))
	ok(t, meta.Close())
	ok(t, os.Mkdir(filepath.Join(cfg.PinDir, "v1"), 0o700))
	if _, err := Open(cfg); !errors.Is(err, ErrLayout) || !strings.Contains(err.Error(), "v1") {
		t.Errorf("other directory: got %v", err)
	}
	ok(t, os.Remove(filepath.Join(cfg.PinDir, "v1")))

	for _, bad := range []Config{{PinDir: "relative"}, {PinDir: cfg.PinDir, MaxSandboxes: 65536}, {
		PinDir: cfg.PinDir, MaxSandboxes: 64, HardDeny: []netip.Prefix{{}},
	}} {
		if _, err := Open(bad); err == nil {
			t.Errorf("opened with %+v", bad)
		}
	}
	open(t, cfg)
}

// A process that died while it made the pins leaves none that count.
func TestOpenAfterUnfinishedCreate(t *testing.T) {
	cfg := testConfig(t)
	e := open(t, cfg)
	ok(t, e.Close())
	ok(t, os.Remove(e.metaPin()))
	ok(t, os.Remove(e.mapPin("slots")))
	open(t, cfg)
}

// Another version of the program, for the same layout, takes over live links.
func TestUpgrade(t *testing.T) {
	hookings(t, func(t *testing.T, cfg Config) {
		ns, index := links(t, 1)
		// The links that an upgrade changes are in this namespace.
		reopen := func() (e *Enforcer) {
			t.Helper()
			ok(t, in(ns, func() error { e = open(t, cfg); return nil }))
			return e
		}
		e := reopen()
		sb := sandbox(1, index[0], compile(t, allowAll))
		ok(t, in(ns, func() error { return e.Attach(context.Background(), sb) }))
		old, err := programID(e.fromSandbox)
		ok(t, err)
		ok(t, e.writeMeta([32]byte{1}))
		ok(t, e.Close())

		for range 2 {
			e = reopen()
			now, err := programID(e.fromSandbox)
			ok(t, err)
			if now == old {
				t.Error("the old program is still in use")
			}
			ok(t, in(ns, func() error { return e.Verify(sb.ID, 1, index[0]) }))
			// The second time as after a crash in the middle.
			ok(t, e.writeMeta([32]byte{}))
			ok(t, os.Remove(e.progPin(progFrom)))
			ok(t, e.Close())
		}
		for range 2 {
			e = reopen()
			ok(t, in(ns, func() error { return e.Verify(sb.ID, 1, index[0]) }))
			ok(t, e.Close())
		}
	})
}

func TestPurgeLeavesNothing(t *testing.T) {
	hookings(t, func(t *testing.T, cfg Config) {
		ns, index := links(t, 3)
		e := open(t, cfg)
		for i, ifindex := range index {
			sb := sandbox(uint32(i+1), ifindex, compile(t, allowAll))
			ok(t, in(ns, func() error { return e.Attach(context.Background(), sb) }))
		}
		if n := attached(t, ns, index[0]); n != 2 {
			t.Errorf("%d programs are attached, want 2", n)
		}
		ok(t, in(ns, e.Purge))
		if _, err := os.Stat(e.dir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left: %v", e.dir, err)
		}
		for _, ifindex := range index {
			if n := attached(t, ns, ifindex); n != 0 {
				t.Errorf("link %d: %d programs are still attached", ifindex, n)
			}
		}
	})
}

// A policy that the kernel cannot take is an error and changes nothing.
func TestPolicyFull(t *testing.T) {
	cfg := testConfig(t)
	cfg.policyEntries = 4
	e := open(t, cfg)
	place(t, e, sandbox(testSlot, 1, compile(t, allowAll)))
	free := func() (int, int) {
		return settle(t, e), len(e.rules.free) - int(e.rules.next)
	}
	tries, rules := free()
	var big netpol.Program
	big.Rules = []netpol.RuleRef{{Tenant: "acme", Name: "big", Action: netpol.Allow}}
	for i := range 5 {
		big.Entries = append(big.Entries, netpol.Entry{
			Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 51, byte(i), 0}), 24),
			Ports:  []netpol.PortRule{{Lo: 443, Hi: 443, Proto: netpol.TCP}},
		})
	}
	for range 100 {
		if err := e.SetPolicy(testID, testSlot, big, 2, nil); !errors.Is(err, unix.ENOSPC) {
			t.Fatalf("got %v, want ENOSPC", err)
		}
	}
	if gotTries, gotRules := free(); gotTries != tries || gotRules != rules {
		t.Errorf("free tries: got %d, want %d; free rules: got %d, want %d", gotTries, tries, gotRules, rules)
	}
	expect(t, e, "old policy", frame{dst: dst4}.bytes(), "allow")
	if x, err := e.Explain(testSlot, netpol.Flow{Proto: netpol.TCP, Dst: dst4, Port: 1}); err != nil || x.PolicyRev != 1 {
		t.Errorf("explain: got %+v, %v, want revision 1", x, err)
	}
	big.Entries = big.Entries[:4]
	ok(t, e.SetPolicy(testID, testSlot, big, 3, nil))
	expect(t, e, "new policy", frame{dst: dst4}.bytes(), "no_rule")
}

// Policies come and go for ever: nothing runs out, and rules that come back
// find their counter.
func TestManyPolicies(t *testing.T) {
	e := unit(t, allowAll)
	for i := range 30 {
		var rules strings.Builder
		for r := range 20 {
			fmt.Fprintf(&rules, "- {name: r%d-%d, action: deny, to: [{cidr: 10.%d.%d.0/24}]}\n", i, r, i, r)
		}
		ok(t, e.SetPolicy(testID, testSlot, compile(t, allowAll4+rules.String()), uint64(i+2), nil))
		expect(t, e, "all4", frame{dst: dst4}.bytes(), "allow")
	}
	got, err := e.RuleCounters(testID, testSlot)
	ok(t, err)
	if len(got) > keptRules+21 {
		t.Errorf("%d rules are kept", len(got))
	}
	i := slices.IndexFunc(got, func(r RuleCount) bool { return r.Rule == "all4" })
	if i < 0 || got[i].Packets != 30 {
		t.Errorf("all4: got %+v, want 30 packets", got[i])
	}
}

// Many sandboxes at once, with meters and policies at work beside.
func TestConcurrent(t *testing.T) {
	const n = 50
	ns, index := links(t, n)
	cfg := testConfig(t)
	e := open(t, cfg)
	programs := []netpol.Program{compile(t, allowAll4), compile(t, allowAll6), compile(t, allowAll)}
	var wg sync.WaitGroup
	errs := make(chan error, 10*n)
	for i := range n {
		wg.Go(func() {
			slot := uint32(i + 1)
			sb := sandbox(slot, index[i], programs[i%3])
			errs <- in(ns, func() error { return e.Attach(context.Background(), sb) })
			errs <- e.SetPolicy(sb.ID, slot, programs[(i+1)%3], 2, nil)
			errs <- in(ns, func() error { return e.Verify(sb.ID, slot, index[i]) })
			_, err := e.Counters(slot)
			errs <- err
			x, err := e.Explain(slot, netpol.Flow{Proto: netpol.TCP, Dst: dst4, Port: 443})
			if err == nil && x.Allowed != ((i+1)%3 != 1) {
				err = fmt.Errorf("slot %d: explain answers %+v", slot, x)
			}
			errs <- err
			errs <- e.SetHostAddrs([]netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(i)}), 32)})
			if i%2 == 0 {
				errs <- in(ns, func() error { return e.Detach(sb.ID, slot) })
			}
		})
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		if err != nil {
			t.Error(err)
		}
	}
	ids, err := e.List()
	if err != nil || len(ids) != n/2 {
		t.Errorf("list: got %d, %v, want %d", len(ids), err, n/2)
	}
	// What is left is what another process finds.
	ok(t, e.Close())
	e = open(t, cfg)
	for i := 1; i < n; i += 2 {
		sb := sandbox(uint32(i+1), index[i], netpol.Program{})
		if err := in(ns, func() error { return e.Verify(sb.ID, sb.Slot, index[i]) }); err != nil {
			t.Error(err)
		}
	}
}

// Explain says what the program does, and counts nothing.
func TestExplain(t *testing.T) {
	program := compile(t, `
- {name: web, action: allow, to: [{cidr: 192.0.2.0/24}], ports: [443/tcp]}
- {name: dns, action: allow, to: [{cidr: '2001:db8::/32'}], ports: [53/udp]}
- {name: smtp, action: deny, to: [{cidr: 192.0.0.0/8}], ports: [25/tcp]}
`)
	e := unit(t, allowAll)
	ok(t, e.SetHostAddrs([]netip.Prefix{netip.MustParsePrefix("192.0.2.7/32")}))
	ok(t, e.SetPolicy(testID, testSlot, program, 9, nil))
	was := counters(t, e, testSlot)
	for _, c := range []struct {
		flow netpol.Flow
		want Explanation
	}{
		{netpol.Flow{Proto: netpol.TCP, Dst: dst4, Port: 443}, Explanation{Allowed: true, Reason: "allow", Rule: "web", Tenant: "acme", PolicyRev: 9}},
		{netpol.Flow{Proto: netpol.UDP, Dst: dst6, Port: 53}, Explanation{Allowed: true, Reason: "allow", Rule: "dns", Tenant: "acme", PolicyRev: 9}},
		{netpol.Flow{Proto: netpol.TCP, Dst: dst4, Port: 25}, Explanation{Reason: "rule_deny", Rule: "smtp", Tenant: "acme", PolicyRev: 9}},
		{netpol.Flow{Proto: netpol.TCP, Dst: dst4, Port: 80}, Explanation{Reason: "no_rule", PolicyRev: 9}},
		{netpol.Flow{Proto: netpol.TCP, Dst: dst6, Port: 53}, Explanation{Reason: "no_rule", PolicyRev: 9}},
		{netpol.Flow{Proto: netpol.TCP, Dst: netip.MustParseAddr("::ffff:192.0.2.1"), Port: 443}, Explanation{Allowed: true, Reason: "allow", Rule: "web", Tenant: "acme", PolicyRev: 9}},
		{netpol.Flow{Proto: netpol.TCP, Dst: netip.MustParseAddr("192.0.2.7"), Port: 443}, Explanation{Reason: "host"}},
		{netpol.Flow{Proto: netpol.TCP, Dst: netip.MustParseAddr("169.254.169.254"), Port: 80}, Explanation{Reason: "metadata"}},
		{netpol.Flow{Proto: netpol.TCP, Dst: addr6(9), Port: 80}, Explanation{Reason: "sandbox"}},
		{netpol.Flow{Proto: 1, Dst: dst4}, Explanation{Reason: "icmp"}},
		{netpol.Flow{Proto: 58, Dst: dst6}, Explanation{Reason: "icmp6"}},
		{netpol.Flow{Proto: 132, Dst: dst6, Port: 1}, Explanation{Reason: "protocol"}},
	} {
		got, err := e.Explain(testSlot, c.flow)
		ok(t, err)
		if got.Detail == "" {
			t.Errorf("%+v: no detail", c.flow)
		}
		got.Detail = ""
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%+v (-want +got):\n%s", c.flow, diff)
		}
	}
	if diff := cmp.Diff(was, counters(t, e, testSlot)); diff != "" {
		t.Errorf("explain counts:\n%s", diff)
	}
	rules, err := e.RuleCounters(testID, testSlot)
	ok(t, err)
	for _, r := range rules {
		if r.Packets != 0 {
			t.Errorf("explain counts: %+v", r)
		}
	}

	sb := sandbox(2, 4242, compile(t, allowAll))
	sb.Addrs = sb.Addrs[:1]
	place(t, e, sb)
	if got, err := e.Explain(2, netpol.Flow{Proto: netpol.TCP, Dst: dst6, Port: 443}); err != nil || got.Allowed || got.Reason != "no_address" {
		t.Errorf("no address: got %+v, %v", got, err)
	}
}

// Attach opens nothing that it does not close.
func TestAttachKeepsNoDescriptors(t *testing.T) {
	ns, index := links(t, 1)
	e := open(t, testConfig(t))
	sb := sandbox(1, index[0], compile(t, allowAll))
	round := func() {
		ok(t, in(ns, func() error {
			return errors.Join(e.Attach(context.Background(), sb), e.Verify(sb.ID, 1, index[0]), e.Detach(sb.ID, 1))
		}))
	}
	round()
	settle(t, e)
	before := len(leakedDescriptors())
	for range 5 {
		round()
	}
	settle(t, e)
	runtime.GC()
	if after := len(leakedDescriptors()); after > before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}
