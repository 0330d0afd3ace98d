// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	mdns "github.com/miekg/dns"
)

// maxHops of CNAMEs, and of queries that follow them.
const maxHops = 8

// answer is what the upstreams say about a question, no more than that. It is
// not changed after it was made: several queries may share it.
type answer struct {
	rcode int          // NOERROR or NXDOMAIN
	chain []string     // names that the question's name is an alias for, in order
	addrs []netip.Addr // of the last name, each once
	svc   []*mdns.SVCB // HTTPS and SVCB records of the last name
	ttl   uint32       // the least of all records; seconds
	found bool         // there are records of the type
}

// fetch asks the upstreams, following aliases. Records that do not belong to
// the question's name or to what it is an alias for are passed over.
func fetch(ctx context.Context, up exchanger, st *counters, name string, qtype uint16) (*answer, error) {
	a := &answer{ttl: ^uint32(0)}
	at := name
	for range maxHops {
		m, err := up.exchange(ctx, st, at, qtype)
		if err != nil {
			return nil, err
		}
		end, err := a.walk(m, at, qtype)
		if err != nil {
			return nil, err
		}
		a.rcode = m.Rcode
		if a.found || m.Rcode != mdns.RcodeSuccess || end == at || hasSOA(m) {
			return a, nil
		}
		at = end
	}
	return nil, errors.New("too many aliases")
}

// walk follows the aliases of a message from a name and takes the records of
// the last one, which it answers.
func (a *answer) walk(m *message, at string, qtype uint16) (end string, err error) {
	alias := map[string]*mdns.CNAME{}
	for _, rr := range m.Answer {
		if c, ok := rr.(*mdns.CNAME); ok && c.Hdr.Class == mdns.ClassINET {
			owner := plain(c.Hdr.Name)
			if alias[owner] == nil {
				alias[owner] = c
			}
		}
	}
	for alias[at] != nil {
		c := alias[at]
		target := plain(c.Target)
		if !validName(target) {
			return "", fmt.Errorf("%s is an alias for %q, which is no host name", at, target)
		}
		if len(a.chain) >= maxHops || slices.Contains(a.chain, target) {
			return "", errors.New("too many aliases")
		}
		a.chain = append(a.chain, target)
		a.ttl = min(a.ttl, c.Hdr.Ttl)
		if qtype == mdns.TypeCNAME {
			a.found = true
			return at, nil
		}
		at = target
	}
	if m.Rcode == mdns.RcodeSuccess {
		a.take(m, at, qtype)
	}
	return at, nil
}

// take adds the records of a name.
func (a *answer) take(m *message, at string, qtype uint16) {
	seen := map[netip.Addr]bool{}
	for _, rr := range m.Answer {
		h := rr.Header()
		if h.Rrtype != qtype || h.Class != mdns.ClassINET || plain(h.Name) != at {
			continue
		}
		switch r := rr.(type) {
		case *mdns.A:
			if ip, ok := netip.AddrFromSlice(r.A.To4()); ok && !seen[ip] {
				seen[ip] = true
				a.addrs = append(a.addrs, ip)
			}
		case *mdns.AAAA:
			if ip, ok := netip.AddrFromSlice(r.AAAA.To16()); ok && !seen[ip] {
				seen[ip] = true
				a.addrs = append(a.addrs, ip)
			}
		case *mdns.HTTPS:
			a.svc = append(a.svc, &r.SVCB)
		case *mdns.SVCB:
			a.svc = append(a.svc, r)
		default:
			continue
		}
		a.ttl = min(a.ttl, h.Ttl)
		a.found = true
	}
}

// hasSOA says that the upstream knows that there are no records.
func hasSOA(m *message) bool {
	return slices.ContainsFunc(m.Ns, func(rr mdns.RR) bool { return rr.Header().Rrtype == mdns.TypeSOA })
}

// service is a copy of a HTTPS or SVCB record without what would go round the
// resolver: hints of addresses, the keys that hide the name of a TLS
// connection, and what is not known. nil: nothing of use is left.
func service(r *mdns.SVCB, allowed func(name string) bool) *mdns.SVCB {
	target := plain(r.Target)
	if target != "" && (!validName(target) || !allowed(target)) {
		return nil
	}
	out := &mdns.SVCB{Priority: r.Priority, Target: mdns.Fqdn(target)}
	if r.Priority == 0 {
		return out // an alias; it has no parameters
	}
	kept := map[mdns.SVCBKey]bool{}
	for _, v := range r.Value {
		switch v.Key() {
		case mdns.SVCB_ALPN, mdns.SVCB_NO_DEFAULT_ALPN, mdns.SVCB_PORT:
			kept[v.Key()] = true
			out.Value = append(out.Value, v)
		}
	}
	for _, v := range r.Value {
		if m, ok := v.(*mdns.SVCBMandatory); ok {
			for _, key := range m.Code {
				if !kept[key] {
					return nil // who may not use the record without
				}
			}
			out.Value = append(out.Value, m)
		}
	}
	return out
}
