// SPDX-License-Identifier: Apache-2.0

package api

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/bulkheadhq/bulkhead/agent/egress"
	"github.com/bulkheadhq/bulkhead/agent/sandbox"
	"github.com/bulkheadhq/bulkhead/netpol"
	nodev1 "github.com/bulkheadhq/bulkhead/proto/node/v1"
)

// Explain implements nodev1.NodeServer.
func (s *Server) Explain(ctx context.Context, req *nodev1.ExplainRequest) (*nodev1.ExplainResponse, error) {
	rec, _, err := s.find(ctx, req.GetRef())
	if err != nil {
		return nil, err
	}
	flow, name, err := question(req)
	if err != nil {
		return nil, err
	}
	if !enforced(rec) {
		return nil, notEnforced(rec)
	}
	var out *nodev1.ExplainResponse
	if name != "" {
		out, err = s.explainName(rec, flow, name)
	} else {
		out, err = s.explain(rec, flow)
	}
	if now := s.now(rec); !enforced(now) {
		return nil, notEnforced(now) // the answer may be another sandbox's
	}
	return out, failure(err)
}

// question reads what is asked about: a flow to an address, or to a name.
func question(req *nodev1.ExplainRequest) (f netpol.Flow, name string, err error) {
	f.Port = uint16(req.GetPort())
	switch req.GetProtocol() {
	case "tcp":
		f.Proto = netpol.TCP
	case "udp":
		f.Proto = netpol.UDP
	case "icmp":
		if req.GetPort() != 0 {
			return f, "", status.Error(codes.InvalidArgument, "icmp has no port")
		}
		f.Proto, f.Port = netpol.ICMP, netpol.EchoPort
	default:
		return f, "", status.Errorf(codes.InvalidArgument, "protocol %q is not tcp, udp or icmp", req.GetProtocol())
	}
	if f.Proto != netpol.ICMP && (req.GetPort() == 0 || req.GetPort() > 65535) {
		return f, "", status.Errorf(codes.InvalidArgument, "port %d is not between 1 and 65535", req.GetPort())
	}
	if f.Dst, err = netip.ParseAddr(req.GetAddress()); err == nil && f.Dst.Zone() == "" {
		return f, "", nil
	}
	name = strings.ToLower(strings.TrimSuffix(req.GetAddress(), "."))
	if !isName(name) {
		return f, "", status.Errorf(codes.InvalidArgument, "%q is neither an IP address nor a name", req.GetAddress())
	}
	return f, name, nil
}

// isName reports whether s can be the name of a host. One whose last label is a
// number is a mistyped address.
func isName(s string) bool {
	if len(s) > 253 {
		return false
	}
	labels := strings.Split(s, ".")
	for _, l := range labels {
		odd := func(r rune) bool {
			return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' && r != '_'
		}
		if l == "" || len(l) > 63 || strings.IndexFunc(l, odd) >= 0 {
			return false
		}
	}
	return strings.Trim(labels[len(labels)-1], "0123456789") != ""
}

// explain asks the kernel about a flow, and adds the limits that such a packet
// would meet.
func (s *Server) explain(rec sandbox.Record, f netpol.Flow) (*nodev1.ExplainResponse, error) {
	out, err := s.cfg.Traffic.Explain(rec.Slot, f)
	if err != nil {
		return nil, err
	}
	if !out.Allowed && out.Reason != "rate" && out.Reason != "budget" {
		return out, nil // dropped before it meets a limit
	}
	own := egress.Rate{Tenant: out.Tenant, Rule: out.Rule}
	out.Rates, err = s.rates(rec, func(r egress.Rate) bool {
		return r.Rule == "" || r.Tenant == own.Tenant && r.Rule == own.Rule
	})
	if err != nil {
		return nil, err
	}
	all, err := s.cfg.Limits.Budgets()
	if err != nil {
		return nil, err
	}
	out.Budgets = s.budgets(rec, all)
	out.Connections, err = s.connections(rec.ID)
	return out, err
}

// explainName says whether the resolver answers a name, and has every address
// that it has led to judged by the kernel.
func (s *Server) explainName(rec sandbox.Record, f netpol.Flow, name string) (*nodev1.ExplainResponse, error) {
	prog, err := s.cfg.Sandboxes.Program(rec.ID)
	if err != nil {
		return nil, err
	}
	v := prog.Name(name)
	out := &nodev1.ExplainResponse{
		Reason: v.Reason, PolicyRev: rec.PolicyRev,
		Name: &nodev1.NameVerdict{Allowed: v.Allowed, Audit: v.Audit, Reason: v.Reason, Rules: ruleNames(prog, v.Rules)},
	}
	if v.Rule >= 0 && v.Rule < len(prog.Rules) {
		out.Rule, out.Tenant = prog.Rules[v.Rule].Name, prog.Rules[v.Rule].Tenant
		out.Name.Rule, out.Name.Tenant = out.Rule, out.Tenant
	}
	for _, n := range s.cfg.Resolver.Names(rec.ID) {
		if n.Name != name {
			continue
		}
		out.Name.ExpiresNs = unixNano(n.Expires)
		for _, a := range n.Addrs {
			f.Dst = a
			x, err := s.explain(rec, f)
			if err != nil {
				return nil, err
			}
			out.Addresses = append(out.Addresses, &nodev1.AddressVerdict{Address: a.String(), Verdict: x})
		}
	}
	judgeName(out, prog, v, f)
	return out, nil
}

// judgeName says whether a connection to a name can come about.
func judgeName(out *nodev1.ExplainResponse, prog netpol.Program, v netpol.NameVerdict, f netpol.Flow) {
	if v.Audit {
		out.Audit = v.Reason
	}
	switch {
	case !v.Allowed && !v.Audit && v.Reason == netpol.ReasonDenied:
		out.Detail = "the resolver refuses the name: a deny rule matches"
	case !v.Allowed && !v.Audit:
		out.Detail = "the resolver refuses the name: no rule allows it"
	case len(out.Addresses) > 0:
		best := out.Addresses[0].Verdict
		for _, a := range out.Addresses {
			if a.Verdict.Allowed {
				best = a.Verdict
				break
			}
		}
		out.Allowed, out.Reason, out.Rule, out.Tenant, out.Detail = best.Allowed, best.Reason, best.Rule, best.Tenant, best.Detail
		if best.Audit != "" {
			out.Audit = best.Audit
		}
	case !v.Allowed:
		out.Allowed, out.Reason = true, netpol.ReasonAllowed
		out.Detail = "resolved for audit alone; each of its addresses is judged by itself"
	case !offers(prog, v, f):
		out.Reason = netpol.ReasonNoRule
		out.Detail = fmt.Sprintf("the name may be resolved, but no rule allows %s there", netpol.PortRange{Lo: f.Port, Hi: f.Port, Proto: f.Proto})
	default:
		out.Allowed, out.Reason = true, netpol.ReasonAllowed
		out.Detail = "not resolved yet; its addresses are allowed once they are"
	}
}

// offers reports whether a rule that allows a name allows the port of f.
func offers(prog netpol.Program, v netpol.NameVerdict, f netpol.Flow) bool {
	for _, n := range prog.Names {
		in := func(p netpol.PortRange) bool { return p.Proto == f.Proto && p.Lo <= f.Port && f.Port <= p.Hi }
		if !n.Deny && slices.Contains(v.Rules, int(n.Rule)) && slices.ContainsFunc(n.Ports, in) {
			return true
		}
	}
	return false
}
