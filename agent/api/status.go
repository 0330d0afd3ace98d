// SPDX-License-Identifier: Apache-2.0

package api

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bulkheadhq/bulkhead/agent/budget"
	"github.com/bulkheadhq/bulkhead/agent/egress"
	"github.com/bulkheadhq/bulkhead/agent/sandbox"
	"github.com/bulkheadhq/bulkhead/netpol"
	"github.com/bulkheadhq/bulkhead/netpol/suggest"
	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
)

// notEnforced refuses a question about a sandbox that has no policy in the
// kernel.
func notEnforced(rec sandbox.Record) error {
	return status.Errorf(codes.FailedPrecondition, "sandbox %s is %s: nothing is enforced for it now", rec.Spec.Name, rec.State)
}

// PolicyStatus implements nodev1.NodeServer.
func (s *Server) PolicyStatus(ctx context.Context, req *nodev1.PolicyStatusRequest) (*nodev1.PolicyStatusResponse, error) {
	rec, _, err := s.find(ctx, req.GetRef())
	if err != nil {
		return nil, err
	}
	if !enforced(rec) {
		return nil, notEnforced(rec)
	}
	out, err := s.policyStatus(rec)
	if now := s.now(rec); !enforced(now) {
		return nil, notEnforced(now) // its slot may be another's
	}
	return out, failure(err)
}

func (s *Server) policyStatus(rec sandbox.Record) (*nodev1.PolicyStatusResponse, error) {
	prog, err := s.cfg.Sandboxes.Program(rec.ID)
	if err != nil {
		return nil, err
	}
	verified, degraded := s.cfg.Enforced(rec.ID)
	out := &nodev1.PolicyStatusResponse{
		Sandbox: rec.ID, Name: rec.Spec.Name, Tenant: string(rec.Spec.Tenant),
		Mode: prog.Mode.String(), Revision: rec.PolicyRev, Digest: hex.EncodeToString(prog.Digest[:]),
		VerifiedNs: unixNano(verified), Degraded: strings.ToValidUTF8(degraded, "?"),
		Published: portsToProto(rec.Spec.Publish),
		Names:     s.learned(rec.ID, prog),
		Resolver:  resolverToProto(s.cfg.Resolver.Resolver(rec.ID)),
	}
	var errs [6]error
	var counters []*nodev1.RuleCounter
	var budgets []egress.Budget
	counters, errs[0] = s.cfg.Traffic.Rules(rec.ID, rec.Slot)
	out.Rules = s.ruleStatus(rec, prog, counters)
	_, out.Drops, errs[1] = s.cfg.Traffic.Network(rec.Slot)
	out.Rates, errs[2] = s.rates(rec, func(egress.Rate) bool { return true })
	budgets, errs[3] = s.cfg.Limits.Budgets()
	out.Budgets = s.budgets(rec, budgets)
	out.Connections, errs[4] = s.connections(rec.ID)
	out.Audited, errs[5] = s.audited(rec)
	return out, errors.Join(errs[:]...)
}

// ruleStatus is one entry for every rule of the chain, in its order.
func (s *Server) ruleStatus(rec sandbox.Record, prog netpol.Program, counters []*nodev1.RuleCounter) []*nodev1.RuleStatus {
	byKey := map[egress.RuleKey]*nodev1.RuleCounter{}
	for _, c := range counters {
		byKey[egress.RuleKey{Tenant: c.Tenant, Rule: c.Rule}] = c
	}
	last := s.cfg.Flows.Last(rec.ID)
	written := s.written(rec)
	var out []*nodev1.RuleStatus
	for i, ref := range prog.Rules {
		key := egress.RuleKey{Tenant: ref.Tenant, Rule: ref.Name}
		c := byKey[key]
		row := &nodev1.RuleStatus{
			Tenant: ref.Tenant, Rule: ref.Name, Action: ref.Action.String(), RateBits: ref.Rate,
			Packets: c.GetPackets(), Bytes: c.GetBytes(), LastNs: max(c.GetLastEventNs(), unixNano(last[key])),
		}
		if i < len(written) && written[i].tenant == ref.Tenant && written[i].rule.Name == ref.Name {
			written[i].describe(row)
		}
		for _, p := range prog.Published {
			if int(p.Rule) == i {
				row.To = []string{"who connected to it"}
				row.Ports = append(row.Ports, netpol.PortRange{Lo: p.Port, Hi: p.Port, Proto: p.Proto}.String())
			}
		}
		out = append(out, row)
	}
	return out
}

// written is a rule with the place that it comes from.
type written struct {
	tenant, file string
	rule         netpol.Rule
}

// written answers the rules of a sandbox's chain as they are written now, in
// the order of its Program unless a reload is under way.
func (s *Server) written(rec sandbox.Record) []written {
	var out []written
	add := func(tenant, file string, p netpol.Policy) {
		for _, r := range p.Rules {
			out = append(out, written{tenant, file, r})
		}
	}
	for _, l := range s.cfg.Sandboxes.Tenants().Policies(rec.Spec.Tenant) {
		add(l.Tenant, l.File, l.Policy)
	}
	if rec.Spec.Policy != "" {
		if p, err := netpol.Parse("policy of "+rec.Spec.Name, []byte(rec.Spec.Policy)); err == nil {
			add(string(rec.Spec.Tenant), p.Source, p)
		}
	}
	return out
}

func (w written) describe(row *nodev1.RuleStatus) {
	row.File = w.file
	if w.rule.Line > 0 {
		row.File = fmt.Sprintf("%s:%d", w.file, w.rule.Line)
	}
	for _, t := range w.rule.To {
		row.To = append(row.To, target(t))
	}
	for _, p := range w.rule.Ports {
		row.Ports = append(row.Ports, p.String())
	}
}

// target is where a rule leads, on one line.
func target(t netpol.Target) string {
	s := t.String()
	for i, e := range t.Except {
		if i == 0 {
			s += " except "
		} else {
			s += " and "
		}
		s += e.String()
	}
	if t.AllowPrivate {
		s += " (private too)"
	}
	return s
}

// rates answers the buckets of a sandbox that want picks.
func (s *Server) rates(rec sandbox.Record, want func(egress.Rate) bool) ([]*nodev1.RateState, error) {
	all, err := s.cfg.Limits.Rates(rec.ID, rec.Slot)
	var out []*nodev1.RateState
	for _, r := range all {
		if want(r) {
			out = append(out, &nodev1.RateState{Tenant: r.Tenant, Rule: r.Rule, Scope: r.Scope.String(), Bits: r.Bits, Fill: r.Full})
		}
	}
	return out, err
}

// budgets answers the state of every budget that a sandbox is under. One that
// the kernel does not have lets nothing pass.
func (s *Server) budgets(rec sandbox.Record, all []egress.Budget) []*nodev1.BudgetState {
	if !enforced(rec) {
		return nil
	}
	prog, err := s.cfg.Sandboxes.Program(rec.ID)
	if err != nil {
		return nil // it is gone
	}
	var out []*nodev1.BudgetState
	for _, b := range prog.Budgets {
		row := &nodev1.BudgetState{Tenant: b.Tenant, Scope: b.Scope.String(), Per: b.Per.String(), Limit: b.Bytes, Blocked: true, Unknown: true}
		slot := uint32(0)
		if b.Scope == netpol.ScopeSandbox {
			slot = rec.Slot
		}
		for _, k := range all {
			if k.Tenant == b.Tenant && k.Slot == slot {
				row.Limit, row.Spent, row.Unknown, row.Blocked = k.Limit, k.Spent, false, k.Spent >= k.Limit
				if k.Window != 0 { // it has begun
					row.EndsNs = unixNano(budget.End(b.Per, k.Window))
				}
			}
		}
		out = append(out, row)
	}
	return out
}

// blocked says which budgets of a sandbox are spent.
func (s *Server) blocked(rec sandbox.Record) ([]string, error) {
	all, err := s.cfg.Limits.Budgets()
	return spent(s.budgets(rec, all)), err
}

// spent says in words which budgets are.
func spent(budgets []*nodev1.BudgetState) []string {
	var out []string
	for _, b := range budgets {
		switch {
		case b.Unknown:
			out = append(out, fmt.Sprintf("budget of the %s per %s, set by %s, is not known to the kernel", b.Scope, b.Per, b.Tenant))
		case b.Blocked:
			out = append(out, fmt.Sprintf("budget of the %s per %s, set by %s, is spent", b.Scope, b.Per, b.Tenant))
		}
	}
	return out
}

// health counts running sandboxes that an operator should look at.
func (s *Server) health() (degraded, auditing, blocked uint32, err error) {
	all, err := s.cfg.Limits.Budgets()
	if err != nil {
		return 0, 0, 0, err
	}
	for _, rec := range s.cfg.Sandboxes.List() {
		if !enforced(rec) {
			continue
		}
		if _, why := s.cfg.Enforced(rec.ID); why != "" {
			degraded++
		}
		if prog, err := s.cfg.Sandboxes.Program(rec.ID); err == nil && prog.Mode == netpol.ModeAudit {
			auditing++
		}
		if len(spent(s.budgets(rec, all))) > 0 {
			blocked++
		}
	}
	return degraded, auditing, blocked, nil
}

func (s *Server) connections(id string) (*nodev1.Connections, error) {
	refused, err := s.cfg.Links.Connections(id)
	return &nodev1.Connections{Limit: s.cfg.MaxConnections, Refused: refused}, err
}

// learned answers the names that a sandbox has learned, by name.
func (s *Server) learned(id string, prog netpol.Program) []*nodev1.LearnedName {
	var out []*nodev1.LearnedName
	for _, n := range s.cfg.Resolver.Names(id) {
		out = append(out, &nodev1.LearnedName{
			Name: strings.ToValidUTF8(n.Name, "?"), Addresses: addresses(n.Addrs),
			Rules: ruleNames(prog, n.Rules), ExpiresNs: unixNano(n.Expires),
		})
	}
	slices.SortFunc(out, func(a, b *nodev1.LearnedName) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

func addresses(addrs []netip.Addr) []string {
	var out []string
	for _, a := range addrs {
		out = append(out, a.String())
	}
	return out
}

// ruleNames names rules by their index, as "name of tenant".
func ruleNames(prog netpol.Program, rules []int) []string {
	var out []string
	for _, i := range rules {
		if i >= 0 && i < len(prog.Rules) {
			out = append(out, prog.Rules[i].Name+" of "+prog.Rules[i].Tenant)
		}
	}
	return out
}

func resolverToProto(r egress.Resolver) *nodev1.ResolverCounters {
	out := &nodev1.ResolverCounters{BytesIn: r.BytesIn, BytesOut: r.BytesOut}
	for _, o := range slices.Sorted(maps.Keys(r.Outcomes)) {
		out.Outcomes = append(out.Outcomes, &nodev1.ResolverOutcome{Outcome: o, Lookups: r.Outcomes[o]})
	}
	return out
}

// audited answers what audit mode has let pass, the most bytes first.
func (s *Server) audited(rec sandbox.Record) ([]*nodev1.AuditedFlow, error) {
	all, err := s.cfg.Limits.Audited(rec.ID, rec.Slot)
	var out []*nodev1.AuditedFlow
	for _, a := range all {
		out = append(out, &nodev1.AuditedFlow{
			Tenant: a.Tenant, Rule: a.Rule, Protocol: a.Proto.String(), Address: a.Dst.String(), Port: uint32(a.Port),
			Packets: a.Packets, Bytes: a.Bytes, Names: valid(s.cfg.Flows.NamesOf(rec.ID, a.Dst)),
		})
	}
	slices.SortFunc(out, func(a, b *nodev1.AuditedFlow) int {
		return cmp.Or(cmp.Compare(b.Bytes, a.Bytes), cmp.Compare(a.Address, b.Address), cmp.Compare(a.Port, b.Port), cmp.Compare(a.Protocol, b.Protocol))
	})
	return out, err
}

// valid makes text of a tenant fit for a message.
func valid(texts []string) []string {
	var out []string
	for _, t := range texts {
		out = append(out, strings.ToValidUTF8(t, "?"))
	}
	return out
}

// PolicySuggest implements nodev1.NodeServer.
func (s *Server) PolicySuggest(ctx context.Context, req *nodev1.PolicySuggestRequest) (*nodev1.PolicySuggestResponse, error) {
	rec, _, err := s.find(ctx, req.GetRef())
	if err != nil {
		return nil, err
	}
	if !enforced(rec) {
		return nil, notEnforced(rec)
	}
	flows, err := s.cfg.Limits.Audited(rec.ID, rec.Slot)
	if now := s.now(rec); !enforced(now) {
		return nil, notEnforced(now) // its slot may be another's
	}
	if err != nil {
		return nil, failure(err)
	}
	out := &nodev1.PolicySuggestResponse{}
	var seen []suggest.Seen
	for _, f := range flows {
		if f.Rule != "" {
			continue // a deny rule wins over whatever could be suggested
		}
		out.Flows++
		names := s.cfg.Flows.NamesOf(rec.ID, f.Dst)
		if len(names) == 0 {
			names = []string{""}
		}
		for _, name := range names { // each was asked for, and would have been refused
			seen = append(seen, suggest.Seen{Name: name, Addr: f.Dst, Port: f.Port, Proto: f.Proto, Packets: f.Packets, Bytes: f.Bytes})
		}
	}
	if len(seen) > 0 {
		name := strings.TrimRight(strings.ToLower(rec.Spec.Name), "._-") // what a policy may be called
		out.Policy = strings.ToValidUTF8(string(suggest.Policy(name, seen)), "?")
	}
	return out, nil
}
