// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"

	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
)

// egress does something to the egress of a sandbox, or of all of them.
func (f *fakeNode) egress(t *testing.T, verb, arg string) {
	t.Helper()
	ref, text, _ := strings.Cut(arg, " ")
	f.mu.Lock()
	defer f.mu.Unlock()
	if verb == "flow" {
		f.flows = append(f.flows, flowsOf(ref)...)
		f.signal()
		return
	}
	b, err := f.find(ref)
	if err != nil {
		t.Fatal(err)
	}
	switch verb {
	case "degraded":
		b.s.Degraded, f.info.Degraded = text, 1
	case "audit":
		b.s.Audit, f.info.Auditing = true, 1
	case "blocked":
		b.s.Blocked, f.info.Blocked = []string{text}, 1
	}
}

// flowsOf is a piece of a flow log.
func flowsOf(name string) []*nodev1.FlowsResponse {
	at := func(s int) int64 { return epoch.Add(time.Duration(s) * time.Second).UnixNano() }
	flow := func(m *nodev1.Flow) *nodev1.FlowsResponse {
		return &nodev1.FlowsResponse{Entry: &nodev1.FlowsResponse_Flow{Flow: m}}
	}
	lookup := func(m *nodev1.Lookup) *nodev1.FlowsResponse {
		return &nodev1.FlowsResponse{Entry: &nodev1.FlowsResponse_Lookup{Lookup: m}}
	}
	switch name {
	case "start":
		return []*nodev1.FlowsResponse{
			lookup(&nodev1.Lookup{TimeNs: at(1), Name: "api.example.com", Type: "A", Verdict: "allow", Outcome: "answered", Tenant: "acme", Rule: "model-api",
				Addresses: []string{"203.0.113.10"}}),
			flow(&nodev1.Flow{TimeNs: at(1), Verdict: "allow", Reason: "allow", Tenant: "acme", Rule: "model-api", Protocol: "tcp", Address: "203.0.113.10",
				Port: 443, LocalPort: 40000, Names: []string{"api.example.com"}, Length: 60, Packets: 1, Bytes: 60}),
			flow(&nodev1.Flow{TimeNs: at(2), Verdict: "allow", Reason: "allow", Tenant: "acme", Rule: "model-api", Protocol: "tcp", Address: "203.0.113.10",
				Port: 443, LocalPort: 40000, Names: []string{"api.example.com"}, Length: 1500, Packets: 731, Bytes: 1 << 20}),
			flow(&nodev1.Flow{TimeNs: at(3), Verdict: "deny", Reason: "rule_deny", Tenant: "acme", Rule: "no-crawling", Protocol: "tcp",
				Address: "198.51.100.7", Port: 80, LocalPort: 40002, Length: 60, Packets: 3, Bytes: 180}),
			lookup(&nodev1.Lookup{TimeNs: at(3), Name: "\x1b[2J.example.net", Type: "AAAA", Verdict: "deny", Outcome: "no_rule", Detail: "no rule allows the name", Suppressed: 4}),
		}
	case "more":
		return []*nodev1.FlowsResponse{
			flow(&nodev1.Flow{TimeNs: at(5), Verdict: "audit", Reason: "no_rule", Protocol: "udp", Address: "2001:db8::5", Port: 53, LocalPort: 40003,
				Names: []string{"ns.example.org", "dns.example.org"}, Length: 80, Packets: 2, Bytes: 160}),
			{Entry: &nodev1.FlowsResponse_Missed{Missed: &nodev1.Missed{Entries: 12}}},
			flow(&nodev1.Flow{TimeNs: at(6), Inbound: true, Verdict: "deny", Reason: "in_sandbox", Protocol: "tcp", Address: "100.96.0.9", Port: 40004,
				LocalPort: 22, Length: 60, Packets: 1, Bytes: 60}),
			flow(&nodev1.Flow{TimeNs: at(7), Verdict: "deny", Reason: "rate", Tenant: "acme", Rule: "model-api", Protocol: "icmp", Address: "203.0.113.10", Length: 84,
				Packets: 5, Bytes: 420}),
			flow(&nodev1.Flow{TimeNs: at(8), Verdict: "deny", Reason: "arp", Length: 28, Packets: 1, Bytes: 28}),
		}
	}
	return nil
}

func (f *fakeNode) Flows(req *nodev1.FlowsRequest, stream grpc.ServerStreamingServer[nodev1.FlowsResponse]) error {
	f.mu.Lock()
	b, err := f.find(req.GetRef())
	next := 0
	switch tail := int(req.GetTail()); {
	case tail < 0:
		next = len(f.flows)
	case tail > 0:
		next = max(0, len(f.flows)-tail)
	}
	f.mu.Unlock()
	if err != nil {
		return err
	}
	for ended := false; !ended; {
		var out []*nodev1.FlowsResponse
		err := f.until(stream.Context(), func() bool {
			out = f.flows[next:]
			ended = b.s.GetExit() != nil || !req.GetFollow()
			return len(out) > 0 || ended
		})
		if err != nil {
			return err
		}
		next += len(out)
		for _, m := range out {
			v := m.GetFlow().GetVerdict() + m.GetLookup().GetVerdict()
			if (req.GetDenied() || req.GetAudit()) && !(req.GetDenied() && v == "deny") && !(req.GetAudit() && v == "audit") {
				continue
			}
			if err := stream.Send(m); err != nil {
				return err
			}
		}
	}
	return nil
}

func (f *fakeNode) PolicyStatus(_ context.Context, req *nodev1.PolicyStatusRequest) (*nodev1.PolicyStatusResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	b, err := f.find(req.GetRef())
	if err != nil {
		return nil, err
	}
	mode, spec := "enforce", b.s.GetSpec()
	resp := &nodev1.PolicyStatusResponse{
		Sandbox: b.s.GetId(), Name: spec.GetName(), Tenant: spec.GetTenant(), Revision: 3,
		Digest: "5d2f1c0a9be84412aa00bb11cc22dd33ee44ff5566778899aabbccddeeff0011", Degraded: b.s.GetDegraded(),
		Connections: &nodev1.Connections{Limit: 4096}, Published: spec.GetPublish(),
	}
	if spec.GetName() == "bare" {
		resp.Mode = mode
		return resp, nil
	}
	day := epoch.Add(14 * time.Hour).UnixNano()
	resp.VerifiedNs = epoch.Add(30 * time.Second).UnixNano()
	resp.Connections.Refused = 17
	resp.Rules = []*nodev1.RuleStatus{
		{Tenant: "acme", Rule: "model-api", Action: "allow", To: []string{"api.example.com", "*.models.example.com", "203.0.113.0/24 except 203.0.113.7/32"},
			Ports: []string{"443/tcp"}, RateBits: 100_000_000, File: "/etc/bulkhead/tenants/acme.yaml:12", Packets: 3600, Bytes: 5 << 20, LastNs: epoch.UnixNano()},
		{Tenant: "acme", Rule: "no-crawling", Action: "deny", To: []string{"198.51.100.0/24"}, Ports: []string{"echo/icmp", "any/tcp", "any/udp"},
			File: "/etc/bulkhead/tenants/acme.yaml:18"},
		{Tenant: "acme/vision", Rule: "registry", Action: "allow", To: []string{"10.20.0.0/16"}, Ports: []string{"80/tcp", "443/tcp", "5000/tcp", "8000-8010/tcp"},
			File: "/etc/bulkhead/tenants/acme-vision.yaml:7"},
	}
	for _, p := range spec.GetPublish() {
		resp.Rules = append(resp.Rules, &nodev1.RuleStatus{Tenant: "acme/vision", Rule: fmt.Sprintf("published:%d/%s", p.GetPort(), p.GetProtocol()),
			Action: "allow", To: []string{"who connected to it"}, Ports: []string{fmt.Sprintf("%d/%s", p.GetPort(), p.GetProtocol())}})
	}
	resp.Drops = []*nodev1.DropCounter{{Reason: "metadata", Packets: 2, Bytes: 120}, {Reason: "no_rule", Packets: 1, Bytes: 60}}
	resp.Rates = rates()
	resp.Budgets = budgets()
	resp.Budgets[0].Blocked = len(b.s.GetBlocked()) > 0
	resp.Names = []*nodev1.LearnedName{{Name: "api.example.com", Addresses: []string{"203.0.113.10", "2001:db8::10"}, Rules: []string{"model-api of acme"}, ExpiresNs: day}}
	resp.Resolver = &nodev1.ResolverCounters{BytesIn: 4200, BytesOut: 9100,
		Outcomes: []*nodev1.ResolverOutcome{{Outcome: "answered", Lookups: 40}, {Outcome: "no_rule", Lookups: 3}}}
	if b.s.GetAudit() {
		mode = "audit"
		resp.Audited = []*nodev1.AuditedFlow{
			{Protocol: "tcp", Address: "198.18.0.7", Port: 443, Packets: 12, Bytes: 4 << 10, Names: []string{"cdn.example.org"}},
			{Tenant: "acme", Rule: "no-crawling", Protocol: "icmp", Address: "198.51.100.9", Port: 8, Packets: 1, Bytes: 84},
		}
	}
	resp.Mode = mode
	return resp, nil
}

func rates() []*nodev1.RateState {
	return []*nodev1.RateState{
		{Tenant: "acme", Scope: "tenant", Bits: 5_000_000_000, Fill: 0.031},
		{Tenant: "acme", Scope: "sandbox", Bits: 1_000_000_000, Fill: 0.15},
		{Tenant: "acme", Rule: "model-api", Scope: "sandbox", Bits: 100_000_000, Fill: 0.99},
	}
}

func budgets() []*nodev1.BudgetState {
	return []*nodev1.BudgetState{{Tenant: "acme", Scope: "tenant", Per: "day", Limit: 50 << 30, Spent: 3 << 30, EndsNs: epoch.Add(14 * time.Hour).UnixNano()}}
}

func (f *fakeNode) PolicySuggest(_ context.Context, req *nodev1.PolicySuggestRequest) (*nodev1.PolicySuggestResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	b, err := f.find(req.GetRef())
	if err != nil || !b.s.GetAudit() {
		return &nodev1.PolicySuggestResponse{}, err
	}
	return &nodev1.PolicySuggestResponse{Flows: 1, Policy: `kind: EgressPolicy
name: web
rules:
- name: cdn.example.org
  action: allow
  to: [{fqdn: cdn.example.org}]
  ports: [443/tcp]
`}, nil
}

func (f *fakeNode) Explain(_ context.Context, req *nodev1.ExplainRequest) (*nodev1.ExplainResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	b, err := f.find(req.GetRef())
	if err != nil {
		return nil, err
	}
	passes := &nodev1.ExplainResponse{Allowed: true, Reason: "allow", Rule: "model-api", Tenant: "acme", PolicyRev: 1}
	named := &nodev1.NameVerdict{Allowed: true, Reason: "allow", Rule: "model-api", Tenant: "acme", Rules: []string{"model-api of acme"}}
	switch a := req.GetAddress(); {
	case a == "203.0.113.10" && req.GetProtocol() == "icmp", strings.HasPrefix(a, "203.0.113.") && req.GetPort() == 443:
		passes.Rates, passes.Budgets, passes.Connections = rates(), budgets(), &nodev1.Connections{Limit: 4096}
		if len(b.s.GetBlocked()) > 0 {
			passes.Allowed, passes.Reason, passes.Detail, passes.Budgets[0].Blocked = false, "budget", "a byte budget is spent", true
		}
		return passes, nil
	case strings.HasPrefix(a, "2001:db8:"):
		return passes, nil
	case a == "api.example.com":
		named.ExpiresNs = epoch.Add(time.Minute).UnixNano()
		passes.Name, passes.Addresses = named, []*nodev1.AddressVerdict{
			{Address: "100.96.0.9", Verdict: &nodev1.ExplainResponse{Reason: "sandbox", Detail: "other sandboxes cannot be allowed", Tenant: "bulkhead"}},
			{Address: "203.0.113.10", Verdict: &nodev1.ExplainResponse{Allowed: true, Reason: "allow", Rule: "model-api", Tenant: "acme",
				Rates: rates()[2:], Connections: &nodev1.Connections{Limit: 4096, Refused: 17}}},
		}
		return passes, nil
	case a == "new.models.example.com":
		return &nodev1.ExplainResponse{Allowed: true, Reason: "allow", Rule: "model-api", Tenant: "acme",
			Detail: "not resolved yet; its addresses are allowed once they are", Name: named}, nil
	case a == "ads.example.com":
		return &nodev1.ExplainResponse{Reason: "rule_deny", Rule: "no-ads", Tenant: "acme", Detail: "the resolver refuses the name: a deny rule matches",
			Name: &nodev1.NameVerdict{Reason: "rule_deny", Rule: "no-ads", Tenant: "acme"}}, nil
	case strings.HasSuffix(a, ".example.net"):
		return &nodev1.ExplainResponse{Reason: "no_rule", Detail: "the resolver refuses the name: no rule allows it", Name: &nodev1.NameVerdict{Reason: "no_rule"}}, nil
	case a == "169.254.169.254":
		return &nodev1.ExplainResponse{Reason: "metadata", Tenant: "bulkhead", Detail: "cloud metadata is never reachable", PolicyRev: 1}, nil
	case strings.HasPrefix(a, "198.51.100."):
		return &nodev1.ExplainResponse{Reason: "rule_deny", Rule: "no-crawling", Tenant: "acme", Detail: "a deny rule wins over every allow", PolicyRev: 1}, nil
	case b.s.GetAudit():
		return &nodev1.ExplainResponse{Allowed: true, Reason: "allow", Detail: "no rule allows it", Audit: "no_rule"}, nil
	}
	return &nodev1.ExplainResponse{Reason: "no_rule", Detail: "no rule allows it", PolicyRev: 1}, nil
}
