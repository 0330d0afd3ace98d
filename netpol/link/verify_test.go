// SPDX-License-Identifier: Apache-2.0

package link

import (
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// TestVerifyTable: every way in which somebody can weaken the table is seen,
// and Restore repairs it.
func TestVerifyTable(t *testing.T) {
	m := open(t)
	l := launch(t, m, 1)
	must(t, m.Publish(l.ID, []Port{{Host: 8080, Sandbox: 80, Proto: tcp}}))
	must(t, m.VerifyTable())
	table := m.table()
	chainNamed := func(name string) *nftables.Chain { return &nftables.Chain{Name: name, Table: table} }
	rules := func(c *nftables.Conn, chain string) []*nftables.Rule {
		all, err := c.GetRules(table, chainNamed(chain))
		must(t, err)
		return all
	}
	accept := []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}
	for want, weaken := range map[string]func(c *nftables.Conn){
		"there is no table":                  func(c *nftables.Conn) { c.DelTable(table) },
		"it may be dormant":                  func(*nftables.Conn) { makeDormant(t, m) },
		"rule 1 of chain prerouting (passed": func(c *nftables.Conn) { c.FlushChain(chainNamed("prerouting")) },
		"rule 1 of chain forward (sandboxes stay apart) differs": func(c *nftables.Conn) {
			c.InsertRule(&nftables.Rule{Table: table, Chain: chainNamed("forward"), Exprs: accept})
		},
		"chain input has 2 rules, want 1": func(c *nftables.Conn) {
			c.AddRule(&nftables.Rule{Table: table, Chain: chainNamed("input"), Exprs: accept})
		},
		"(nothing else comes in) is missing": func(c *nftables.Conn) {
			all := rules(c, "forward")
			must(t, c.DelRule(all[len(all)-1]))
		},
		"rule 1 of chain input (the host is out of reach) differs": func(c *nftables.Conn) {
			r := rules(c, "input")[0]
			r.Exprs = accept
			c.ReplaceRule(r)
		},
		"chain extra is not ours": func(c *nftables.Conn) { c.AddChain(&nftables.Chain{Name: "extra", Table: table}) },
		"chain input has another policy": func(c *nftables.Conn) {
			drop := nftables.ChainPolicyDrop
			c.AddChain(&nftables.Chain{Name: "input", Table: table, Policy: &drop})
		},
		"chain postrouting is missing": func(c *nftables.Conn) {
			c.FlushChain(chainNamed("postrouting"))
			c.DelChain(chainNamed("postrouting"))
		},
		"set open4 holds 2 published ports": func(c *nftables.Conn) {
			key := append(l.Addr4.AsSlice(), tcp, 0, 0, 0, 0, 81, 0, 0)
			must(t, c.SetAddElements(m.namedSet(table, "open4"), []nftables.SetElement{{Key: key}}))
		},
		"rule 2 of chain begun (rate of new connections) differs": func(c *nftables.Conn) {
			must(t, c.DelRule(rules(c, "begun")[1]))
		},
		"rule 3 of chain reached (cap on connections) differs": func(c *nftables.Conn) {
			must(t, c.DelRule(rules(c, "reached")[2]))
		},
		"rule 9 of chain begun (closed ones go soon) is missing": func(c *nftables.Conn) {
			all := rules(c, "begun")
			must(t, c.DelRule(all[len(all)-1]))
		},
		"ct timeout tcp is 120 s for kind 7, want 5 s": func(c *nftables.Conn) { replaceTimeouts(c, m) },
		"chain inbound is of type": func(c *nftables.Conn) {
			c.DelTable(table)
			c.AddTable(table)
			c.AddChain(&nftables.Chain{Name: "inbound", Table: table, Type: nftables.ChainTypeFilter,
				Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityFilter})
		},
		"set published6 holds 0 published ports": func(c *nftables.Conn) { c.FlushSet(m.namedSet(table, "published6")) },
	} {
		t.Run(want, func(t *testing.T) {
			c := &nftables.Conn{}
			weaken(c)
			must(t, c.Flush())
			for _, verify := range []func() error{m.VerifyTable, func() error { return m.Verify(l.ID) }} {
				err := verify()
				if !errors.Is(err, ErrDrift) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "Restore repairs") {
					t.Errorf("error = %v, want ErrDrift about %q", err, want)
				}
			}
			must(t, m.Restore())
			if err := m.VerifyTable(); err != nil {
				t.Errorf("after Restore: %v", err)
			}
			if p, err := m.Published(); err != nil || len(p[l.ID]) != 1 {
				t.Errorf("after Restore: Published = %v, %v", p, err)
			}
		})
	}
}

// replaceTimeouts puts other timeouts behind the same rules.
func replaceTimeouts(c *nftables.Conn, m *Manager) {
	t := m.table()
	for _, b := range bounds {
		c.FlushChain(&nftables.Chain{Name: b.chain, Table: t})
	}
	obj := &nftables.NamedObj{Table: t, Name: objectTimeouts, Type: nftables.ObjTypeCtTimeout}
	c.DeleteObject(obj)
	obj.Obj = &expr.CtTimeout{L3Proto: unix.NFPROTO_INET, L4Proto: tcp, Policy: expr.CtStatePolicyTimeout{
		kindSynSent - 1: 15, kindTimeWait - 1: 120, kindClose - 1: 0, kindSynSent2 - 1: 15, 2: 432000,
	}}
	c.AddObj(obj)
	for _, b := range bounds {
		for _, r := range m.limits(b) {
			c.AddRule(&nftables.Rule{Table: t, Chain: &nftables.Chain{Name: b.chain, Table: t}, Exprs: r.exprs, UserData: r.userData()})
		}
	}
}

// TestRemoveWithoutTable: a table that someone took does not keep a sandbox
// from being removed, nor its flows in conntrack.
func TestRemoveWithoutTable(t *testing.T) {
	m, f := open(t), newFar(t)
	markAll(t)
	trackAll(t)
	for name, take := range map[string]func(*nftables.Conn){
		"table": func(c *nftables.Conn) { c.DelTable(m.table()) },
		"rules": func(c *nftables.Conn) { c.FlushTable(m.table()) },
	} {
		l := launch(t, m, 1)
		must(t, m.Publish(l.ID, []Port{{Host: 8080, Sandbox: 80, Proto: tcp}}))
		c := &nftables.Conn{}
		take(c)
		must(t, c.Flush())
		sink := listenUDP(t, f.ns, f.addr4)
		conn, err := dialFrom(openNetns(t, m, l.ID), "udp", sink.LocalAddr().String(), time.Second)
		must(t, err)
		_, err = conn.Write([]byte("unseen"))
		must(t, errors.Join(err, conn.Close()))
		if n := entries(t, l.Addr4); n == 0 {
			t.Errorf("without the %s, the datagram left no entry", name)
		}
		must(t, m.Remove(l.ID))
		if n := entries(t, l.Addr4); n != 0 {
			t.Errorf("without the %s, %d entries are left", name, n)
		}
		must(t, m.Restore())
	}
}

// trackAll keeps conntrack on, as other software of a host does.
func trackAll(t *testing.T) {
	t.Helper()
	c := &nftables.Conn{}
	table := c.AddTable(&nftables.Table{Name: "other", Family: nftables.TableFamilyINet})
	chain := c.AddChain(&nftables.Chain{Name: "forward", Table: table, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter})
	c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: ctState(expr.CtStateBitNEW)})
	must(t, c.Flush())
	t.Cleanup(func() {
		c.DelTable(table)
		must(t, c.Flush())
	})
}

// TestVerifyTableIgnoresTraffic: what packets change is no drift.
func TestVerifyTableIgnoresTraffic(t *testing.T) {
	m, f := openCapped(t, 1), newFar(t)
	markAll(t)
	l := launch(t, m, 1)
	must(t, m.VerifyTable())
	to := hold(t, f.ns, net.JoinHostPort(f.addr4.String(), "0")).String()
	for range 2 {
		_, _ = dialFrom(openNetns(t, m, l.ID), "tcp", to, refused)
	}
	must(t, m.Verify(l.ID))
	must(t, m.Publish(l.ID, []Port{{Host: 8080, Sandbox: 80, Proto: udp}}))
	must(t, m.Verify(l.ID))
	m.rules.mu.Lock()
	m.rules.good = 0
	m.rules.mu.Unlock()
	must(t, m.Verify(l.ID)) // all of it read again
}

// TestVerifyLink: each change to the host's end is seen, and what the error
// names repairs it.
func TestVerifyLink(t *testing.T) {
	m := open(t)
	l := launch(t, m, 1)
	name := m.HostName(l.ID)
	must(t, m.Verify(l.ID))
	host, err := netlink.LinkByName(name)
	must(t, err)
	dst := func(a []byte) *net.IPNet { return &net.IPNet{IP: a, Mask: net.CIDRMask(8*len(a), 8*len(a))} }
	addr := &netlink.Addr{IPNet: dst([]byte{198, 51, 100, 9})}
	again := func() {
		must(t, m.Down(l.ID))
		_, err := m.Create(t.Context(), l)
		must(t, err)
		must(t, m.Up(l.ID))
	}
	up := func() { must(t, m.Up(l.ID)) }
	for want, c := range map[string]struct{ change, repair func() }{
		"rp_filter is 0, want 1":            {func() { must(t, writeSysctl(sysctl4+"conf/"+name+"/rp_filter", "0")) }, again},
		"ipv4 route_localnet is 1, want 0":  {func() { must(t, writeSysctl(sysctl4+"conf/"+name+"/route_localnet", "1")) }, again},
		"ipv4 forwarding is 0, want 1":      {func() { must(t, writeSysctl(sysctl4+"conf/"+name+"/forwarding", "0")) }, again},
		": accept_ra is 2, want 0":          {func() { must(t, writeSysctl(sysctl6+name+"/accept_ra", "2")) }, again},
		"accept_redirects is 1, want 0":     {func() { must(t, writeSysctl(sysctl6+name+"/accept_redirects", "1")) }, again},
		": accept_dad is 1, want 0":         {func() { must(t, writeSysctl(sysctl6+name+"/accept_dad", "1")) }, again},
		"ARP is on":                         {func() { must(t, netlink.LinkSetARPOn(host)) }, again},
		"multicast is on":                   {func() { must(t, netlink.LinkSetMulticastOn(host)) }, again},
		"hardware address is 02:00":         {func() { must(t, netlink.LinkSetHardwareAddr(host, net.HardwareAddr{2, 0, 0, 0, 0, 1})) }, again},
		"alias":                             {func() { must(t, netlink.LinkSetAlias(host, "mine")) }, func() { must(t, m.Down(l.ID)); again() }},
		"host's end has address 198.51.100": {func() { must(t, netlink.AddrAdd(host, addr)) }, func() { must(t, netlink.AddrDel(host, addr)); up() }},
		"no route to 100.96.0.1": {func() {
			must(t, netlink.RouteDel(&netlink.Route{Dst: dst(l.Addr4.AsSlice()), LinkIndex: host.Attrs().Index, Scope: netlink.SCOPE_LINK}))
		}, up},
		"no route to fd62:6b68::1": {func() {
			must(t, netlink.RouteDel(&netlink.Route{Dst: dst(l.Addr6.AsSlice()), LinkIndex: host.Attrs().Index, Scope: netlink.SCOPE_LINK}))
		}, up},
		"no neighbour 100.96.0.1": {func() { must(t, netlink.NeighDel(neighOf(host, l.Addr4.AsSlice(), MACFor(1)))) }, up},
		"neighbour fd62:6b68::1 is 02:00": {func() {
			must(t, netlink.NeighSet(neighOf(host, l.Addr6.AsSlice(), net.HardwareAddr{2, 0, 0, 0, 0, 1})))
		}, up},
	} {
		t.Run(want, func(t *testing.T) {
			c.change()
			if err := m.Verify(l.ID); !errors.Is(err, ErrDrift) || !strings.Contains(err.Error(), want) {
				t.Errorf("error = %v, want ErrDrift about %q", err, want)
			}
			c.repair()
			if err := m.Verify(l.ID); err != nil {
				t.Fatalf("after the repair: %v", err)
			}
			if host, err = netlink.LinkByName(name); err != nil {
				t.Fatal(err)
			}
		})
	}
	must(t, m.Down(l.ID))
	if err := m.Verify(l.ID); err != nil {
		t.Errorf("a link that is down: %v", err)
	}
	if err := m.Verify(sandboxID(9)); !errors.Is(err, ErrNotFound) {
		t.Errorf("unknown link = %v, want ErrNotFound", err)
	}
}

func neighOf(host netlink.Link, ip net.IP, mac net.HardwareAddr) *netlink.Neigh {
	return &netlink.Neigh{LinkIndex: host.Attrs().Index, IP: ip, HardwareAddr: mac, State: unix.NUD_PERMANENT}
}

func BenchmarkVerify(b *testing.B) {
	m := open(b)
	l := launch(b, m, 1)
	b.Run("link", func(b *testing.B) {
		for b.Loop() {
			must(b, m.Verify(l.ID))
		}
	})
	b.Run("table after a change", func(b *testing.B) {
		for b.Loop() {
			m.rules.good = 0
			must(b, m.VerifyTable())
		}
	})
}

// makeDormant switches the table off, as `nft add table ... { flags dormant; }`.
func makeDormant(t *testing.T, m *Manager) {
	t.Helper()
	const batch = uint16(unix.NFNL_SUBSYS_NFTABLES)
	begin := nl.NewNetlinkRequest(unix.NFNL_MSG_BATCH_BEGIN, 0)
	begin.AddData(&nl.Nfgenmsg{ResId: htons(batch)})
	set := nftRequest("", unix.NFT_MSG_NEWTABLE, unix.NLM_F_ACK,
		nl.NewRtAttr(unix.NFTA_TABLE_NAME, nl.ZeroTerminated(m.cfg.Table)), nl.NewRtAttr(unix.NFTA_TABLE_FLAGS, []byte{0, 0, 0, 1}))
	end := nl.NewNetlinkRequest(unix.NFNL_MSG_BATCH_END, 0)
	end.AddData(&nl.Nfgenmsg{ResId: htons(batch)})
	var out []byte
	for _, r := range []*nl.NetlinkRequest{begin, set.msg, end} {
		out = append(out, r.Serialize()...)
		out = append(out, make([]byte, -len(out)&3)...)
	}
	must(t, m.rules.rd.exchange(out, func(h unix.NlMsghdr, body []byte) (bool, error) {
		return h.Seq == set.msg.Seq, ackError(body, h.Flags)
	}))
}
