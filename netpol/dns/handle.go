// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"runtime/debug"
	"time"

	mdns "github.com/miekg/dns"

	"github.com/bulkheadhq/bulkhead/netpol"
)

// handle answers a client's message; nil: with nothing. By UDP the answer is
// no longer than the client says that it takes.
func (sb *sandbox) handle(raw []byte, udp bool) (out []byte) {
	defer func() {
		// A message that upsets the parser must not end the agent.
		if p := recover(); p != nil {
			sb.n.panics.Add(1)
			sb.emit(Event{Outcome: OutcomePanic, Rule: -1, Detail: fmt.Sprintf("%v\n%s", p, debug.Stack())})
			out = nil
		}
	}()
	sb.n.queries.Add(1)
	sb.n.clientIn.Add(uint64(len(raw)))
	q, refused := parseQuery(raw)
	if q == nil {
		sb.n.malformed.Add(1)
		return nil
	}
	var m *message
	if ok, _ := sb.rate.take(time.Now(), sb.cfg.Rate, sb.cfg.Burst); !ok {
		refused = refuse(OutcomeRate, mdns.ExtendedErrorCodeProhibited, "more than %g queries a second", sb.cfg.Rate)
	}
	if refused == nil {
		m, refused = sb.resolve(q)
	}
	if refused != nil {
		sb.report(q, refused)
		m = q.refusal(refused)
	}
	size := mdns.MaxMsgSize
	if udp {
		size = q.size
	}
	m.Truncate(size)
	out, err := m.Pack()
	if err != nil {
		sb.n.panics.Add(1)
		sb.emit(Event{Name: q.name, Outcome: OutcomePanic, Rule: -1, Detail: "pack the answer: " + err.Error()})
		return nil
	}
	return out
}

func (sb *sandbox) report(q *query, r *refusal) {
	sb.n.of(r.outcome).Add(1)
	sb.emit(Event{Name: q.name, Type: mdns.Type(q.qtype).String(), Outcome: r.outcome, Rule: r.rule, Addrs: r.addrs, Detail: r.detail})
}

// resolve answers a query that could be allowed.
func (sb *sandbox) resolve(q *query) (*message, *refusal) {
	p, ok := sb.program()
	if !ok {
		return nil, broken(OutcomeLearn, mdns.ExtendedErrorCodeNotReady, errGone)
	}
	v, refused := judge(p, q.name)
	if refused != nil {
		return nil, refused
	}
	if refused := sb.tunnel(p, v, q); refused != nil {
		return nil, refused
	}
	a, err := sb.ask(q)
	if err != nil {
		return nil, broken(OutcomeUpstream, mdns.ExtendedErrorCodeNoReachableAuthority, fmt.Errorf("upstream: %w", err))
	}
	m, refused, err := sb.commit(q, a)
	if errors.Is(err, ErrMoved) {
		// The policy has changed under us: once more, by the new one.
		m, refused, err = sb.commit(q, a)
	}
	if err != nil {
		return nil, broken(OutcomeLearn, mdns.ExtendedErrorCodeOther, err)
	}
	return m, refused
}

// tunnel bounds what can be said to a name server by way of names that a
// wildcard allows.
func (sb *sandbox) tunnel(p netpol.Program, v netpol.NameVerdict, q *query) *refusal {
	if !byWildcard(p, v, q.name) {
		return nil
	}
	if q.label > sb.cfg.WildcardLabel {
		return refuse(OutcomeTunnel, mdns.ExtendedErrorCodeProhibited, "a label of %d characters, %d are allowed under a wildcard", q.label, sb.cfg.WildcardLabel)
	}
	if !sb.distinct.allow(time.Now(), v.Rule, q.name, sb.cfg.NamesPerMinute) {
		return refuse(OutcomeTunnel, mdns.ExtendedErrorCodeProhibited, "more than %d different names a minute under one rule", sb.cfg.NamesPerMinute)
	}
	return nil
}

// ask fetches what a query is about, once for all that ask it now.
func (sb *sandbox) ask(q *query) (*answer, error) {
	a, err, _ := sb.asking.Do(mdns.Type(q.qtype).String()+" "+q.name, func() (any, error) {
		ctx, cancel := context.WithTimeout(sb.ctx, sb.cfg.Timeout*9/4)
		defer cancel()
		return fetch(ctx, sb.srv.up, &sb.n, q.name, q.qtype)
	})
	if err != nil {
		return nil, err
	}
	return a.(*answer), nil
}

// commit judges an answer by the program in force, learns it and writes the
// message that releases it. After an error nothing may be released.
func (sb *sandbox) commit(q *query, a *answer) (m *message, refused *refusal, err error) {
	var ev Event
	defer func() { sb.flush(ev, m != nil) }()
	sb.mu.Lock()
	defer sb.mu.Unlock()
	if sb.closed {
		return nil, nil, errGone
	}
	v, refused := judge(sb.prog, q.name)
	if refused != nil {
		return nil, refused, nil
	}
	ev = Event{Name: q.name, Type: mdns.Type(q.qtype).String(), Outcome: OutcomeAnswered, Rule: v.Rule}
	if v.Audit {
		ev.Outcome = OutcomeAudit
	}
	if a.rcode == mdns.RcodeNameError {
		ev.Detail = "no such name"
	} else if !a.found {
		ev.Detail = "no such records"
	}
	ttl := min(max(a.ttl, 1), uint32(sb.cfg.Cap/time.Second))
	if q.qtype != mdns.TypeA && q.qtype != mdns.TypeAAAA {
		return q.release(a, nil, sb.services(a), ttl), nil, nil
	}
	o, addrs, lost, why := sb.usable(v, q.name, a)
	sb.n.strippedAddrs.Add(uint64(len(lost)))
	if len(o.addrs)+len(addrs) == 0 && len(lost) > 0 {
		r := refuse(OutcomeStripped, mdns.ExtendedErrorCodeFiltered, "%s", why)
		r.rule, r.addrs = v.Rule, lost
		return nil, r, nil
	}
	if len(lost) > 0 {
		ev.Detail = fmt.Sprintf("%d of %d addresses taken out: %s", len(lost), len(a.addrs), why)
	}
	if len(o.addrs) > 0 {
		o.life = min(max(time.Duration(a.ttl)*time.Second, sb.cfg.Floor), sb.cfg.Cap)
		learned, err := sb.learn(time.Now(), o)
		if err != nil {
			return nil, nil, err
		}
		addrs = append(learned, addrs...)
	}
	ev.Addrs = addrs
	return q.release(a, addrs, nil, ttl), nil, nil
}

// flush emits what happened while the lock was held, and the event of the
// answer if it is released.
func (sb *sandbox) flush(ev Event, released bool) {
	sb.mu.Lock()
	later := sb.later
	sb.later = nil
	sb.mu.Unlock()
	for _, e := range later {
		sb.emit(e)
	}
	if released {
		sb.n.of(ev.Outcome).Add(1)
		sb.emit(ev)
	}
}

// services are the records of a HTTPS or SVCB answer that may be released.
func (sb *sandbox) services(a *answer) []*mdns.SVCB {
	var out []*mdns.SVCB
	for _, r := range a.svc {
		s := service(r, func(name string) bool {
			v := sb.prog.Name(name)
			return v.Allowed || v.Audit
		})
		if s != nil {
			out = append(out, s)
		}
	}
	return out
}

// usable parts the addresses of an answer into those that the policy lets the
// name have, with what it gives there, those that are released for audit
// without being learned, and the others, with the reason.
func (sb *sandbox) usable(v netpol.NameVerdict, name string, a *answer) (o offer, watched, lost []netip.Addr, why string) {
	o.name = name
	for _, ip := range a.addrs {
		switch {
		case unusable(ip, v.AllowPrivate):
			lost = append(lost, ip)
			why = "answers only private addresses"
			continue
		case len(o.addrs) == sb.cfg.AddrsPerName:
			continue // more than the name may have: the rest is left out
		}
		steps := sb.prog.Learn(name, ip)
		switch {
		case len(steps) > 0:
			o.addrs = append(o.addrs, ip)
			o.steps = append(o.steps, steps)
		case v.Audit:
			// What the sandbox may do there for audit it may do by the address.
			watched = append(watched, ip)
		default:
			lost = append(lost, ip)
			if why == "" {
				why = "answers only addresses outside the guardrails"
			}
		}
	}
	return o, watched, lost, why
}
