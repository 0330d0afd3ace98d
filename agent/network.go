// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sync/errgroup"

	"github.com/bulkheadhq/bulkhead/agent/budget"
	eventlog "github.com/bulkheadhq/bulkhead/agent/egress"
	"github.com/bulkheadhq/bulkhead/agent/sandbox"
	"github.com/bulkheadhq/bulkhead/agent/supervisor"
	"github.com/bulkheadhq/bulkhead/netpol"
	"github.com/bulkheadhq/bulkhead/netpol/dns"
	"github.com/bulkheadhq/bulkhead/netpol/enforce"
)

// openNetwork opens what works on the egress program: budgets, the flow log
// and, if there is somebody to ask, the resolver.
func (n *node) openNetwork() (err error) {
	n.budgets, err = budget.New(budget.Config{
		Kernel: budgets{n.egress}, Store: n.store, Log: n.opts.Log,
		Warn: func(text string) { n.sup.Warn("budgets", text) },
	})
	if err != nil {
		return err
	}
	n.flows = eventlog.New(eventlog.Config{
		Live:  func(id string) bool { return n.sup.Live(id) },
		Names: n.namesOf,
	})
	c := n.cfg.DNS
	if n.upstreams = c.Upstreams; len(n.upstreams) == 0 {
		if n.upstreams, err = hostResolvers("/etc/resolv.conf"); err != nil {
			return err
		}
	}
	if len(n.upstreams) == 0 {
		return nil
	}
	n.names, err = dns.Open(dns.Config{
		Dir: filepath.Join(n.cfg.RunDir, "dns"), Upstreams: n.upstreams, CAFile: c.CAFile,
		Table: table{n.egress}, Log: n.opts.Log, Event: n.lookup,
		Timeout: c.Timeout.Duration, Floor: c.TTLFloor.Duration, Cap: c.TTLCap.Duration, Idle: c.Idle.Duration,
		AddrsPerSandbox: c.MaxAddresses, Rate: float64(c.QueriesPerSecond),
	})
	return err
}

// runNetwork runs it until ctx ends.
func (n *node) runNetwork(ctx context.Context, group *errgroup.Group) {
	group.Go(func() error { return n.budgets.Run(ctx) })
	group.Go(func() error { return n.flows.Run(ctx) })
	group.Go(func() error { return n.egress.Events(ctx, n.flow) })
	if n.names != nil {
		group.Go(func() error { return n.names.Run(ctx) })
	}
}

// maxHostResolvers is how many nameservers of resolv.conf count, as in glibc.
const maxHostResolvers = 3

// hostResolvers reads the nameservers of a resolv.conf. One that does not exist
// names none.
func hostResolvers(file string) (upstreams []string, err error) {
	data, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read the host's resolvers: %w", err)
	}
	lines := bufio.NewScanner(bytes.NewReader(data))
	for lines.Scan() && len(upstreams) < maxHostResolvers {
		f := strings.Fields(lines.Text())
		if len(f) < 2 || f[0] != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(f[1]); err == nil {
			upstreams = append(upstreams, net.JoinHostPort(a.String(), "53"))
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read the host's resolvers in %s: %w", file, err)
	}
	return upstreams, nil
}

// hostListens says whether a service of this machine has a port, by trying to
// take it.
func hostListens(p sandbox.Port) bool {
	address := net.JoinHostPort("", strconv.Itoa(int(p.Host)))
	var c io.Closer
	var err error
	if p.Proto == netpol.UDP {
		c, err = net.ListenPacket("udp", address)
	} else {
		c, err = net.Listen("tcp", address)
	}
	if err != nil {
		return errors.Is(err, syscall.EADDRINUSE)
	}
	_ = c.Close() // nothing was sent
	return false
}

// resolvConf is what sandboxes see as /etc/resolv.conf.
func (n *node) resolvConf() string {
	if n.names == nil {
		return "# This sandbox has no resolver: its policy names addresses.\noptions attempts:1 timeout:1\n"
	}
	host, _, _ := net.SplitHostPort(dns.Address) // a constant
	return "# Bulkhead answers here what the policy allows.\nnameserver " + host + "\noptions ndots:1\n"
}

// namesOf answers what the sandbox has resolved to an address.
func (n *node) namesOf(id string, a netip.Addr) []string {
	if n.names == nil {
		return nil
	}
	return n.names.NamesOf(id, a)
}

// flow puts an event of the kernel into the flow log.
func (n *node) flow(e enforce.Event) {
	n.flows.Flow(eventlog.FlowEvent{
		ID: e.ID, Slot: e.Slot, Time: e.Time, Tenant: e.Tenant, Rule: e.Rule, Reason: e.Reason, Audit: e.Audit,
		Inbound: e.Inbound, Proto: e.Proto, Peer: e.Peer, LocalPort: e.LocalPort, PeerPort: e.PeerPort,
		Bytes: e.Bytes, TotalPackets: e.TotalPackets, TotalBytes: e.TotalBytes,
	})
}

// lookup puts an event of the resolver into the flow log.
func (n *node) lookup(e dns.Event) {
	out := eventlog.DNSEvent{
		ID: e.ID, Time: e.Time, Name: e.Name, Type: e.Type, Outcome: e.Outcome,
		Audit: e.Outcome == dns.OutcomeAudit, Addrs: e.Addrs, Detail: e.Detail, Suppressed: e.Suppressed,
	}
	switch e.Outcome {
	case dns.OutcomeAnswered, dns.OutcomeAudit, dns.OutcomeEvicted, dns.OutcomeUpstream:
	default:
		out.Denied = true
	}
	if prog, err := n.sup.Program(e.ID); err == nil && e.Rule >= 0 && e.Rule < len(prog.Rules) {
		out.Tenant, out.Rule = prog.Rules[e.Rule].Tenant, prog.Rules[e.Rule].Name
	}
	n.flows.DNS(out)
}

// names makes a dns.Server serve the supervisor.
type names struct{ *dns.Server }

func (s names) Start(ctx context.Context, id string, slot uint32, netns string, p netpol.Program) error {
	err := s.Server.Start(ctx, dns.Sandbox{ID: id, Slot: slot, Netns: netns, Program: p})
	if errors.Is(err, dns.ErrListen) {
		return fmt.Errorf("%w: %w", supervisor.ErrNoResolver, err)
	}
	return err
}

// table makes an enforce.Enforcer serve the resolver.
type table struct{ *enforce.Enforcer }

func (t table) Learn(id string, slot uint32, digest [32]byte, l netpol.Learned) error {
	err := t.Enforcer.Learn(id, slot, digest, l)
	if errors.Is(err, enforce.ErrPolicyMoved) {
		return fmt.Errorf("%w: %w", dns.ErrMoved, err)
	}
	return err
}

// budgets makes an enforce.Enforcer serve the keeper of budgets.
type budgets struct{ e *enforce.Enforcer }

func (b budgets) SetBudget(s budget.State) error {
	return b.e.SetBudget(enforce.Budget{Tenant: s.Tenant, Slot: s.Slot, Window: s.Window, Limit: s.Limit, Spent: s.Spent})
}

func (b budgets) Budgets() ([]budget.State, error) {
	all, err := b.e.Budgets()
	out := make([]budget.State, len(all))
	for i, s := range all {
		out[i] = budget.State{Tenant: s.Tenant, Slot: s.Slot, Window: s.Window, Limit: s.Limit, Spent: s.Spent}
	}
	return out, err
}

// limits makes an enforce.Enforcer answer the API for limits and audit.
type limits struct{ e *enforce.Enforcer }

// Rates implements api.Limits.
func (l limits) Rates(id string, slot uint32) ([]eventlog.Rate, error) {
	all, err := l.e.Rates(id, slot)
	out := make([]eventlog.Rate, len(all))
	for i, r := range all {
		out[i] = eventlog.Rate{Tenant: r.Tenant, Rule: r.Rule, Scope: r.Scope, Bits: r.Bits, Full: r.Full}
	}
	return out, err
}

// Budgets implements api.Limits.
func (l limits) Budgets() ([]eventlog.Budget, error) {
	all, err := l.e.Budgets()
	out := make([]eventlog.Budget, len(all))
	for i, b := range all {
		out[i] = eventlog.Budget{Tenant: b.Tenant, Slot: b.Slot, Window: b.Window, Limit: b.Limit, Spent: b.Spent}
	}
	return out, err
}

// Audited implements api.Limits.
func (l limits) Audited(id string, slot uint32) ([]eventlog.Audited, error) {
	all, err := l.e.Audited(id, slot)
	out := make([]eventlog.Audited, len(all))
	for i, a := range all {
		out[i] = eventlog.Audited{
			Tenant: a.Tenant, Rule: a.Rule, Dst: a.Dst, Port: a.Port, Proto: a.Proto, Packets: a.Packets, Bytes: a.Bytes,
		}
	}
	return out, err
}

// resolver makes a dns.Server answer the API; without one it knows nothing.
type resolver struct{ s *dns.Server }

// Names implements api.Resolver.
func (r resolver) Names(id string) []eventlog.Name {
	if r.s == nil {
		return nil
	}
	var out []eventlog.Name
	for _, x := range r.s.Names(id) {
		out = append(out, eventlog.Name{Name: x.Name, Addrs: x.Addrs, Rules: x.Rules, Expires: x.Expires})
	}
	return out
}

// Resolver implements api.Resolver.
func (r resolver) Resolver(id string) eventlog.Resolver {
	if r.s == nil {
		return eventlog.Resolver{}
	}
	st := r.s.Stats(id)
	out := eventlog.Resolver{Outcomes: map[string]uint64{}, BytesIn: st.ClientBytesIn, BytesOut: st.ClientBytesOut}
	for outcome, count := range map[string]uint64{
		dns.OutcomeAnswered: st.Answered, dns.OutcomeAudit: st.Audited, dns.OutcomeDenied: st.Denied, dns.OutcomeNoRule: st.NoRule,
		dns.OutcomeType: st.Type, dns.OutcomeName: st.Name, dns.OutcomeRate: st.Rate, dns.OutcomeTunnel: st.Tunnel,
		dns.OutcomeUpstream: st.Upstream, dns.OutcomeStripped: st.Stripped, dns.OutcomeLearn: st.Learn,
		dns.OutcomeMalformed: st.Malformed, dns.OutcomeEvicted: st.Evicted, "dropped": st.Dropped,
	} {
		if count > 0 {
			out.Outcomes[outcome] = count
		}
	}
	return out
}
