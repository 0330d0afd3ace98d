// SPDX-License-Identifier: Apache-2.0

package threats

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	mdns "github.com/miekg/dns"

	"github.com/bulkheadhq/bulkhead/netpol"
	"github.com/bulkheadhq/bulkhead/netpol/dns"
	"github.com/bulkheadhq/bulkhead/netpol/enforce"
)

// upstream is a name server of the internet.
type upstream struct {
	addr netip.AddrPort
	mu   sync.Mutex
	// zone answers a question; nil is NXDOMAIN.
	zone  func(q mdns.Question) []mdns.RR // +checklocks:mu
	asked []string                        // +checklocks:mu; names and types, in order
	first func(m *mdns.Msg) []*mdns.Msg   // +checklocks:mu; what a forger sends before the answer
}

// newUpstream serves on port 53 of an address of the internet.
func newUpstream(t testing.TB, n *node, at netip.Addr, zone func(mdns.Question) []mdns.RR) *upstream {
	t.Helper()
	u := &upstream{addr: netip.AddrPortFrom(at, 53), zone: zone}
	var c *net.UDPConn
	var l *net.TCPListener
	must(t, in(n.far, func() (err error) {
		if c, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(u.addr)); err != nil {
			return err
		}
		l, err = net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(u.addr))
		return err
	}))
	servers := []*mdns.Server{{PacketConn: c, Handler: u}, {Listener: l, Handler: u}}
	var all sync.WaitGroup
	for _, s := range servers {
		up := make(chan struct{}) // closed when it serves
		s.NotifyStartedFunc = func() { close(up) }
		all.Go(func() {
			if err := s.ActivateAndServe(); err != nil {
				t.Errorf("name server: %v", err)
			}
		})
		<-up
	}
	t.Cleanup(func() {
		for _, s := range servers {
			must(t, s.Shutdown())
		}
		all.Wait()
	})
	return u
}

// ServeDNS answers one query.
func (u *upstream) ServeDNS(w mdns.ResponseWriter, q *mdns.Msg) {
	u.mu.Lock()
	u.asked = append(u.asked, strings.ToLower(q.Question[0].Name)+" "+mdns.TypeToString[q.Question[0].Qtype])
	m := new(mdns.Msg).SetReply(q)
	m.Answer = u.zone(q.Question[0])
	if m.Answer == nil {
		m.Rcode = mdns.RcodeNameError
	}
	var forged []*mdns.Msg
	if u.first != nil {
		forged = u.first(m)
	}
	u.mu.Unlock()
	if _, udp := w.RemoteAddr().(*net.UDPAddr); udp {
		m.Truncate(1232)
	}
	for _, f := range append(forged, m) {
		_ = w.WriteMsg(f) // who asked may be gone
	}
}

// saw answers how many queries for names that end so have come.
func (u *upstream) saw(suffix string) (n int) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, q := range u.asked {
		if name, _, _ := strings.Cut(q, " "); strings.HasSuffix(name, suffix) {
			n++
		}
	}
	return n
}

// records is a zone of fixed addresses.
func records(list map[string][]string) func(mdns.Question) []mdns.RR {
	return func(q mdns.Question) []mdns.RR {
		addrs, ok := list[strings.ToLower(q.Name)]
		if !ok {
			return nil
		}
		out := []mdns.RR{}
		for _, a := range addrs {
			if rr := record(q.Name, a); rr.Header().Rrtype == q.Qtype {
				out = append(out, rr)
			}
		}
		return out
	}
}

func record(name, addr string) mdns.RR {
	ip := netip.MustParseAddr(addr)
	h := mdns.RR_Header{Name: name, Rrtype: mdns.TypeA, Class: mdns.ClassINET, Ttl: 60}
	if ip.Is6() {
		h.Rrtype = mdns.TypeAAAA
		return &mdns.AAAA{Hdr: h, AAAA: ip.AsSlice()}
	}
	return &mdns.A{Hdr: h, A: ip.AsSlice()}
}

// table is the kernel's list of learned addresses, as the agent wires it.
type table struct{ *enforce.Enforcer }

// Learn tells the resolver's error from the enforcer's.
func (k table) Learn(id string, slot uint32, digest [32]byte, l netpol.Learned) error {
	err := k.Enforcer.Learn(id, slot, digest, l)
	if errors.Is(err, enforce.ErrPolicyMoved) {
		err = errors.Join(dns.ErrMoved, err)
	}
	return err
}

// resolve makes a sandbox with a resolver behind it. limits may change what
// the resolver is opened with.
func (n *node) resolve(t testing.TB, u *upstream, rules string, limits func(*dns.Config)) (*box, *dns.Server) {
	t.Helper()
	b := n.sandbox(t, rules)
	return b, n.startResolver(t, b, u, rules, limits)
}

func (n *node) startResolver(t testing.TB, b *box, u *upstream, rules string, limits func(*dns.Config)) *dns.Server {
	t.Helper()
	cfg := dns.Config{
		Dir: filepath.Join(n.dir, "dns"), Upstreams: []string{u.addr.String()}, Table: table{n.enforce},
		Log: slog.New(slog.DiscardHandler), Timeout: patience / 4, Rate: 1e6, Burst: 1e6,
	}
	if limits != nil {
		limits(&cfg)
	}
	s, err := dns.Open(cfg)
	must(t, err)
	t.Cleanup(func() { must(t, s.Close()) })
	must(t, s.Start(context.Background(), dns.Sandbox{ID: b.id, Slot: b.slot, Netns: n.links.NetnsPath(b.id), Program: compile(t, rules)}))
	return s
}

// ask sends one query from inside.
func (b *box) ask(t testing.TB, network, server, name string, typ uint16) (*mdns.Msg, error) {
	t.Helper()
	var c net.Conn
	if err := in(b.ns, func() (err error) {
		c, err = net.DialTimeout(network, server, patience)
		return err
	}); err != nil {
		return nil, err
	}
	defer c.Close()
	q := new(mdns.Msg).SetQuestion(mdns.Fqdn(name), typ)
	q.SetEdns0(1232, false)
	client := mdns.Client{Net: network, Timeout: patience}
	m, _, err := client.ExchangeWithConn(q, &mdns.Conn{Conn: c, UDPSize: 4096})
	return m, err
}

// lookup asks the sandbox's own resolver and answers addresses or the code.
func (b *box) lookup(t testing.TB, name string, typ uint16) (addrs []string, code string) {
	t.Helper()
	m, err := b.ask(t, "udp", dns.Address, name, typ)
	if err == nil && m.Truncated {
		m, err = b.ask(t, "tcp", dns.Address, name, typ)
	}
	if err != nil {
		t.Fatalf("ask for %s: %v", name, err)
	}
	for _, rr := range m.Answer {
		switch r := rr.(type) {
		case *mdns.A:
			addrs = append(addrs, r.A.String())
		case *mdns.AAAA:
			addrs = append(addrs, r.AAAA.String())
		}
	}
	return addrs, mdns.RcodeToString[m.Rcode]
}

// stranger asks a name server that is not the node's, as the open box can.
func (n *node) stranger(t testing.TB, u *upstream, name string, typ uint16) *mdns.Msg {
	t.Helper()
	m, err := n.open.ask(t, "udp", u.addr.String(), name, typ)
	if err != nil {
		t.Fatalf("control: ask %s for %s: %v", u.addr, name, err)
	}
	return m
}

func fqdn(name, more string) string {
	return fmt.Sprintf("- {name: n, action: allow, to: [{fqdn: %q%s}], ports: [any/udp, any/tcp]}\n", name, more)
}
