// SPDX-License-Identifier: Apache-2.0

package api_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/bulkheadhq/bulkhead/agent/egress"
	"github.com/bulkheadhq/bulkhead/netpol"
	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
	sandboxv1 "github.com/bulkheadhq/bulkhead/proto/sandbox/v1"
	"github.com/bulkheadhq/bulkhead/test/need"
)

// kernel answers for the programs, the resolver and the links of all sandboxes.
type kernel struct {
	mu       sync.Mutex
	denied   map[netip.Addr]string // reason by destination; others pass at port 80 and as echo
	rules    []*nodev1.RuleCounter
	rates    []egress.Rate
	budgets  []egress.Budget
	audited  []egress.Audited
	names    []egress.Name
	refused  uint64
	degraded string
	broken   error // what Budgets answers
}

var (
	verified = time.Date(2026, 11, 2, 10, 0, 0, 0, time.UTC)
	month    = time.Date(2026, 11, 1, 0, 0, 0, 0, time.UTC) // that holds it
)

func (k *kernel) set(change func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	change()
}

func (k *kernel) Network(uint32) (*nodev1.Network, []*nodev1.DropCounter, error) {
	return &nodev1.Network{EgressBytes: 7}, []*nodev1.DropCounter{{Reason: "no_rule", Packets: 3, Bytes: 180}}, nil
}

func (k *kernel) Rules(string, uint32) ([]*nodev1.RuleCounter, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.rules, nil
}

func (k *kernel) Explain(_ uint32, f netpol.Flow) (*nodev1.ExplainResponse, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch reason := k.denied[f.Dst]; {
	case reason != "":
		return &nodev1.ExplainResponse{Reason: reason}, nil
	case f.Proto == netpol.ICMP && f.Port == netpol.EchoPort, f.Proto == netpol.TCP && f.Port == 80:
		return &nodev1.ExplainResponse{Allowed: true, Reason: "allow", Tenant: "acme", Rule: "api"}, nil
	}
	return &nodev1.ExplainResponse{Reason: "no_rule"}, nil
}

func (k *kernel) Rates(string, uint32) ([]egress.Rate, error) { return k.rates, nil }
func (k *kernel) Budgets() ([]egress.Budget, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.budgets, k.broken
}
func (k *kernel) Audited(string, uint32) ([]egress.Audited, error) { return k.audited, nil }
func (k *kernel) Names(string) []egress.Name                       { return k.names }
func (k *kernel) Resolver(string) egress.Resolver {
	return egress.Resolver{Outcomes: map[string]uint64{"no_rule": 2, "answered": 5}, BytesIn: 400, BytesOut: 900}
}
func (k *kernel) Connections(string) (uint64, error) { return k.refused, nil }
func (k *kernel) enforced(string) (time.Time, string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return verified, k.degraded
}

// ownPolicy is a sandbox's, below acme's.
const ownPolicy = `kind: EgressPolicy
name: own
mode: audit
rules:
- name: models
  action: allow
  to: [{fqdn: api.example.com}, {cidr: 192.0.2.0/24, except: [192.0.2.8/32]}]
  ports: [80/tcp]
  rate: 100Mbit
- name: no-evil
  action: deny
  to: [{cidr: 198.51.100.0/24}]
rate: {sandbox: 1Gbit}
budget: {egress: 1GiB, per: month, then: block, scope: sandbox}
`

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

// running starts a sandbox of acme under ownPolicy and answers its record.
func (n *node) running(c nodev1.NodeClient) *sandboxv1.Sandbox {
	n.t.Helper()
	req := create("box", "acme", "trap 'exit 0' TERM; sleep 60 & wait")
	req.Spec.Policy = ownPolicy
	req.Spec.Publish = []*sandboxv1.PublishedPort{{Host: 30080, Port: 80, Protocol: "tcp"}}
	resp, err := c.Create(n.t.Context(), req)
	if err != nil {
		n.t.Fatal(err)
	}
	return resp.Sandbox
}

// slot of the one sandbox of the test: Traffic and Limits are asked by it.
const slot = 1

func TestPolicyStatus(t *testing.T) {
	need.Root(t)
	n := serve(t)
	n.kernel.budgets = []egress.Budget{
		{Tenant: "acme", Slot: slot, Window: uint64(month.Unix()), Limit: 1 << 30, Spent: 5},
		{Tenant: "globex", Slot: 0, Window: 1, Limit: 1, Spent: 1},
		{Tenant: "acme", Slot: slot + 1, Window: 1, Limit: 1, Spent: 1},
	}
	n.kernel.rates = []egress.Rate{{Tenant: "acme", Scope: netpol.ScopeSandbox, Bits: 1e9, Full: 0.5}}
	n.kernel.rules = []*nodev1.RuleCounter{{Tenant: "acme", Rule: "api", Packets: 4, Bytes: 240}, {Tenant: "acme", Rule: "models", LastEventNs: 99}}
	n.kernel.names = []egress.Name{
		{Name: "z.example.com", Addrs: []netip.Addr{addr("192.0.2.9")}, Rules: []int{1, 77}, Expires: verified},
		{Name: "a\xff.example.com"},
	}
	n.kernel.audited = []egress.Audited{
		{Dst: addr("198.51.100.7"), Port: 443, Proto: netpol.TCP, Packets: 1, Bytes: 60},
		{Dst: addr("198.51.100.8"), Port: netpol.EchoPort, Proto: netpol.ICMP, Packets: 9, Bytes: 900, Tenant: "acme", Rule: "no-evil"},
	}
	n.kernel.refused, n.kernel.degraded = 12, "drift"
	c := n.as(acme)
	box := n.running(c)
	n.flows.DNS(egress.DNSEvent{ID: box.Id, Name: "seen.example.net", Addrs: []netip.Addr{addr("198.51.100.7")}})
	n.flows.Flow(egress.FlowEvent{ID: box.Id, Time: verified, Tenant: "acme", Rule: "api", Reason: "allow"})
	got := must[*nodev1.PolicyStatusResponse](t)(c.PolicyStatus(t.Context(), &nodev1.PolicyStatusRequest{Ref: "box"}))
	if len(got.Digest) != 64 {
		t.Errorf("digest %q", got.Digest)
	}
	want := &nodev1.PolicyStatusResponse{
		Sandbox: box.Id, Name: "box", Tenant: "acme", Mode: "audit", Revision: 1, Digest: got.Digest,
		VerifiedNs: verified.UnixNano(), Degraded: "drift",
		Rules: []*nodev1.RuleStatus{
			{Tenant: "acme", Rule: "api", Action: "allow", To: []string{"203.0.113.10/32"}, Ports: []string{"80/tcp"},
				File: "testdata/tenants/acme.yaml:8", Packets: 4, Bytes: 240, LastNs: verified.UnixNano()},
			{Tenant: "acme", Rule: "models", Action: "allow", To: []string{"api.example.com", "192.0.2.0/24 except 192.0.2.8/32"},
				Ports: []string{"80/tcp"}, RateBits: 1e8, File: "policy of box:5", LastNs: 99},
			{Tenant: "acme", Rule: "no-evil", Action: "deny", To: []string{"198.51.100.0/24"}, Ports: []string{"echo/icmp", "any/tcp", "any/udp"}, File: "policy of box:10"},
			{Tenant: "acme", Rule: "published:80/tcp", Action: "allow", To: []string{"who connected to it"}, Ports: []string{"80/tcp"}},
		},
		Drops: []*nodev1.DropCounter{{Reason: "no_rule", Packets: 3, Bytes: 180}},
		Rates: []*nodev1.RateState{{Tenant: "acme", Scope: "sandbox", Bits: 1e9, Fill: 0.5}},
		Budgets: []*nodev1.BudgetState{
			{Tenant: "acme", Scope: "tenant", Per: "day", Limit: 50 << 30, Blocked: true, Unknown: true},
			{Tenant: "acme", Scope: "sandbox", Per: "month", Limit: 1 << 30, Spent: 5, EndsNs: month.AddDate(0, 1, 0).UnixNano()},
		},
		Names: []*nodev1.LearnedName{
			{Name: "a?.example.com"},
			{Name: "z.example.com", Addresses: []string{"192.0.2.9"}, Rules: []string{"models of acme"}, ExpiresNs: verified.UnixNano()},
		},
		Resolver: &nodev1.ResolverCounters{Outcomes: []*nodev1.ResolverOutcome{{Outcome: "answered", Lookups: 5}, {Outcome: "no_rule", Lookups: 2}},
			BytesIn: 400, BytesOut: 900},
		Connections: &nodev1.Connections{Limit: 4096, Refused: 12},
		Published:   []*sandboxv1.PublishedPort{{Host: 30080, Port: 80, Protocol: "tcp"}},
		Audited: []*nodev1.AuditedFlow{
			{Tenant: "acme", Rule: "no-evil", Protocol: "icmp", Address: "198.51.100.8", Port: netpol.EchoPort, Packets: 9, Bytes: 900},
			{Protocol: "tcp", Address: "198.51.100.7", Port: 443, Packets: 1, Bytes: 60, Names: []string{"seen.example.net"}},
		},
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Errorf("status (-want +got):\n%s", diff)
	}
	must[*nodev1.StopResponse](t)(c.Stop(t.Context(), &nodev1.StopRequest{Ref: "box"}))
	_, err := c.PolicyStatus(t.Context(), &nodev1.PolicyStatusRequest{Ref: "box"})
	wantCode(t, "status of a stopped sandbox", err, codes.FailedPrecondition)
}

// What is wrong with a sandbox shows wherever sandboxes are shown.
func TestHealthShows(t *testing.T) {
	need.Root(t)
	n := serve(t)
	c := n.as(acme)
	box := n.running(c)
	k := n.kernel
	full := []egress.Budget{{Tenant: "acme", Window: 1, Limit: 10, Spent: 3}, {Tenant: "acme", Slot: slot, Window: 1, Limit: 10, Spent: 10}}
	for _, test := range []struct {
		what    string
		budgets []egress.Budget
		why     string
		blocked []string
	}{
		{"nothing known", nil, "", []string{
			"budget of the tenant per day, set by acme, is not known to the kernel",
			"budget of the sandbox per month, set by acme, is not known to the kernel",
		}},
		{"one spent", full, "link is down", []string{"budget of the sandbox per month, set by acme, is spent"}},
		{"all well", []egress.Budget{{Tenant: "acme", Window: 1, Limit: 10}, {Tenant: "acme", Slot: slot, Window: 1, Limit: 10, Spent: 9}}, "", nil},
	} {
		k.set(func() { k.budgets, k.degraded = test.budgets, test.why })
		got := must[*nodev1.GetResponse](t)(c.Get(t.Context(), &nodev1.GetRequest{Ref: "box"})).Sandbox
		list := must[*nodev1.ListResponse](t)(c.List(t.Context(), &nodev1.ListRequest{})).Sandboxes[0]
		for _, s := range []*sandboxv1.Sandbox{got, list} {
			if diff := cmp.Diff(test.blocked, s.Blocked); diff != "" || s.Degraded != test.why || !s.Audit {
				t.Errorf("%s: degraded %q, audit %t, blocked (-want +got):\n%s", test.what, s.Degraded, s.Audit, diff)
			}
		}
		info := must[*nodev1.NodeInfoResponse](t)(c.NodeInfo(t.Context(), &nodev1.NodeInfoRequest{}))
		want := [3]uint32{0, 1, 0}
		if test.why != "" {
			want[0] = 1
		}
		if test.blocked != nil {
			want[2] = 1
		}
		if got := [3]uint32{info.Degraded, info.Auditing, info.Blocked}; got != want {
			t.Errorf("%s: the node counts %v degraded, auditing, blocked; want %v", test.what, got, want)
		}
	}
	if p := box.Spec.Publish; len(p) != 1 || p[0].Host != 30080 || p[0].Port != 80 || p[0].Protocol != "tcp" {
		t.Errorf("published: %v", p)
	}
	k.set(func() { k.broken = os.ErrDeadlineExceeded })
	_, err := c.List(t.Context(), &nodev1.ListRequest{})
	wantCode(t, "a kernel that does not answer", err, codes.Internal) // and not: nothing is spent
}

func TestExplainShowsLimits(t *testing.T) {
	need.Root(t)
	n := serve(t)
	k := n.kernel
	k.denied = map[netip.Addr]string{addr("192.0.2.1"): "budget", addr("192.0.2.2"): "rate", addr("169.254.169.254"): "metadata"}
	k.rates = []egress.Rate{
		{Tenant: "acme", Bits: 1e9, Scope: netpol.ScopeTenant},
		{Tenant: "acme", Rule: "api", Bits: 1e6, Scope: netpol.ScopeSandbox},
		{Tenant: "acme", Rule: "models", Bits: 2e6, Scope: netpol.ScopeSandbox},
	}
	c := n.as(acme)
	n.running(c)
	for _, test := range []struct {
		proto, to      string
		port           uint32
		allowed        bool
		rates, budgets int
	}{
		{"tcp", "203.0.113.10", 80, true, 2, 2}, // of the policy and of the rule that decides
		{"icmp", "203.0.113.10", 0, true, 2, 2}, // an echo request
		{"tcp", "192.0.2.1", 80, false, 1, 2},
		{"tcp", "192.0.2.2", 80, false, 1, 2},       // what refuses it
		{"tcp", "169.254.169.254", 80, false, 0, 0}, // never meets one
		{"udp", "203.0.113.10", 53, false, 0, 0},
	} {
		got := must[*nodev1.ExplainResponse](t)(c.Explain(t.Context(), &nodev1.ExplainRequest{Ref: "box", Protocol: test.proto, Address: test.to, Port: test.port}))
		if got.Allowed != test.allowed || len(got.Rates) != test.rates || len(got.Budgets) != test.budgets || (got.Connections != nil) != (test.budgets > 0) {
			t.Errorf("%s %s: %v", test.proto, test.to, got)
		}
	}
}

func TestExplainName(t *testing.T) {
	need.Root(t)
	n := serve(t)
	k := n.kernel
	k.denied = map[netip.Addr]string{addr("192.0.2.1"): "sandbox"}
	c := n.as(globex) // whose tenant has no policy
	req := create("box", "globex", "sleep 60")
	req.Spec.Policy = `kind: EgressPolicy
name: own
rules:
- name: models
  action: allow
  to: [{fqdn: api.example.com}, {fqdn: "*.models.example.com"}]
  ports: [80/tcp]
- name: git
  action: allow
  to: [{fqdn: git.example.com}]
  ports: [22/tcp]
- name: no-evil
  action: deny
  to: [{fqdn: "evil.models.example.com"}]
`
	must[*nodev1.CreateResponse](t)(c.Create(t.Context(), req))
	k.names = []egress.Name{
		{Name: "api.example.com", Addrs: []netip.Addr{addr("192.0.2.1"), addr("203.0.113.10")}, Rules: []int{0}, Expires: verified},
		{Name: "bad.models.example.com", Addrs: []netip.Addr{addr("192.0.2.1")}, Rules: []int{0}},
	}
	for _, test := range []struct {
		name    string
		port    uint32
		allowed bool
		reason  string
		named   bool
		addrs   string
		detail  string
	}{
		{"API.example.com.", 80, true, "allow", true, "192.0.2.1:false 203.0.113.10:true", ""},
		{"api.example.com", 443, false, "sandbox", true, "192.0.2.1:false 203.0.113.10:false", ""},
		{"bad.models.example.com", 80, false, "sandbox", true, "192.0.2.1:false", ""},
		{"new.models.example.com", 80, true, "allow", true, "", "not resolved yet"},
		{"new.models.example.com", 22, false, "no_rule", true, "", "no rule allows 22/tcp there"},
		{"evil.models.example.com", 80, false, "rule_deny", false, "", "a deny rule matches"},
		{"example.org", 80, false, "no_rule", false, "", "no rule allows it"},
	} {
		got := must[*nodev1.ExplainResponse](t)(c.Explain(t.Context(), &nodev1.ExplainRequest{Ref: "box", Protocol: "tcp", Address: test.name, Port: test.port}))
		var addrs []string
		for _, a := range got.Addresses {
			addrs = append(addrs, fmt.Sprintf("%s:%t", a.Address, a.Verdict.Allowed))
		}
		if got.Allowed != test.allowed || got.Reason != test.reason || got.Name.GetAllowed() != test.named ||
			strings.Join(addrs, " ") != test.addrs || !strings.Contains(got.Detail, test.detail) {
			t.Errorf("%s:%d: got %v", test.name, test.port, got)
		}
	}
}

func TestFlows(t *testing.T) {
	need.Root(t)
	n := serve(t)
	c := n.as(acme)
	box := n.running(c)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	event := func(second int, reason, audit string) {
		n.flows.Flow(egress.FlowEvent{
			ID: box.Id, Time: verified.Add(time.Duration(second) * time.Second), Reason: reason, Audit: audit, Tenant: "acme", Rule: "models",
			Proto: netpol.TCP, Peer: addr("192.0.2.9"), PeerPort: 80, LocalPort: 40000, Bytes: 60, TotalPackets: uint64(second), TotalBytes: 100,
		})
	}
	n.flows.DNS(egress.DNSEvent{ID: box.Id, Time: verified, Name: "a\xff.example.com", Type: "A", Outcome: "answered", Tenant: "acme", Rule: "models",
		Addrs: []netip.Addr{addr("192.0.2.9")}, Suppressed: 2})
	event(1, "allow", "")
	event(2, "rate", "")
	event(5, "allow", "no_rule")
	all := readFlows(ctx, t, c, &nodev1.FlowsRequest{Ref: "box"})
	want := []*nodev1.FlowsResponse{
		{Entry: &nodev1.FlowsResponse_Lookup{Lookup: &nodev1.Lookup{TimeNs: verified.UnixNano(), Name: "a?.example.com", Type: "A", Verdict: "allow",
			Outcome: "answered", Tenant: "acme", Rule: "models", Addresses: []string{"192.0.2.9"}, Suppressed: 2}}},
		{Entry: &nodev1.FlowsResponse_Flow{Flow: &nodev1.Flow{TimeNs: verified.Add(time.Second).UnixNano(), Verdict: "allow", Reason: "allow",
			Tenant: "acme", Rule: "models", Protocol: "tcp", Address: "192.0.2.9", Port: 80, LocalPort: 40000, Names: []string{"a?.example.com"},
			Length: 60, Packets: 1, Bytes: 100}}},
	}
	if diff := cmp.Diff(want, all[:2], protocmp.Transform()); diff != "" || len(all) != 4 {
		t.Errorf("%d entries, the first two (-want +got):\n%s", len(all), diff)
	}
	if got := all[3].GetFlow(); got.Verdict != "audit" || got.Reason != "no_rule" || got.Packets != 4 { // of the rule's 5; what the rate dropped is not the rule's
		t.Errorf("an audited flow: %v", got)
	}
	for _, test := range []struct {
		req  *nodev1.FlowsRequest
		want int
	}{
		{&nodev1.FlowsRequest{Denied: true}, 1}, {&nodev1.FlowsRequest{Audit: true}, 1}, {&nodev1.FlowsRequest{Denied: true, Audit: true}, 2},
		{&nodev1.FlowsRequest{Tail: 3}, 3}, {&nodev1.FlowsRequest{Tail: 1 << 40}, 4}, {&nodev1.FlowsRequest{Tail: -1 << 40}, 0},
	} {
		test.req.Ref = box.Id
		if got := len(readFlows(ctx, t, c, test.req)); got != test.want {
			t.Errorf("%v: %d entries, want %d", test.req, got, test.want)
		}
	}
	// A reader that follows sees what comes, and its stream ends with the sandbox.
	s := must[grpc.ServerStreamingClient[nodev1.FlowsResponse]](t)(c.Flows(ctx, &nodev1.FlowsRequest{Ref: "box", Follow: true, Tail: 1}))
	if m := must[*nodev1.FlowsResponse](t)(s.Recv()); m.GetFlow().GetVerdict() != "audit" {
		t.Errorf("the last entry: %v", m)
	}
	event(7, "no_rule", "")
	if m := must[*nodev1.FlowsResponse](t)(s.Recv()); m.GetFlow().GetVerdict() != "deny" {
		t.Errorf("the next entry: %v", m)
	}
	must[*nodev1.StopResponse](t)(c.Stop(ctx, &nodev1.StopRequest{Ref: "box"}))
	if _, err := s.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("after the end: %v, want io.EOF", err)
	}
	if got := len(readFlows(ctx, t, c, &nodev1.FlowsRequest{Ref: "box", Follow: true})); got != 5 {
		t.Errorf("a stopped sandbox has %d entries, want 5", got)
	}
}

func TestPolicySuggest(t *testing.T) {
	need.Root(t)
	n := serve(t)
	c := n.as(acme)
	box := n.running(c)
	suggest := func() *nodev1.PolicySuggestResponse {
		return must[*nodev1.PolicySuggestResponse](t)(c.PolicySuggest(t.Context(), &nodev1.PolicySuggestRequest{Ref: "box"}))
	}
	denied := egress.Audited{Dst: addr("198.51.100.8"), Port: 443, Proto: netpol.TCP, Tenant: "acme", Rule: "no-evil", Packets: 1}
	n.kernel.audited = []egress.Audited{denied}
	if got := suggest(); got.Policy != "" || got.Flows != 0 {
		t.Errorf("nothing can be suggested, and yet: %v", got)
	}
	n.kernel.audited = []egress.Audited{
		denied, {Dst: addr("198.18.0.7"), Port: 443, Proto: netpol.TCP, Packets: 2, Bytes: 120}, {Dst: addr("8.8.8.8"), Port: 53, Proto: netpol.UDP, Packets: 1, Bytes: 70},
	}
	n.flows.DNS(egress.DNSEvent{ID: box.Id, Name: "api.example.org", Addrs: []netip.Addr{addr("198.18.0.7")}})
	got := suggest()
	p, err := netpol.Parse("suggested", []byte(got.Policy))
	if err != nil || p.Name != "box" || got.Flows != 2 {
		t.Fatalf("%d flows make this of the name %q, %v:\n%s", got.Flows, p.Name, err, got.Policy)
	}
	prog, err := netpol.Compile([]netpol.Layer{{Tenant: "acme", Policy: p}})
	if err != nil {
		t.Fatal(err)
	}
	if !prog.Name("api.example.org").Allowed || !prog.Evaluate(netpol.Flow{Proto: netpol.UDP, Dst: addr("8.8.8.8"), Port: 53}).Allowed ||
		prog.Evaluate(netpol.Flow{Proto: netpol.TCP, Dst: addr("198.51.100.8"), Port: 443}).Allowed {
		t.Errorf("the policy does not allow what was seen, or allows what a rule denies:\n%s", got.Policy)
	}
}

func readFlows(ctx context.Context, t *testing.T, c nodev1.NodeClient, req *nodev1.FlowsRequest) (out []*nodev1.FlowsResponse) {
	t.Helper()
	s, err := c.Flows(ctx, req)
	if err != nil {
		t.Fatal(err)
	}
	for {
		m, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, m)
	}
}
