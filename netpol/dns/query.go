// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"

	mdns "github.com/miekg/dns"

	"github.com/bulkheadhq/bulkhead/netpol"
)

const (
	maxName   = 253
	maxLabel  = 63
	maxLabels = 16
	maxQuery  = 1232 // bytes; one question and an OPT record need far less
)

// query is a client's message that asks one question.
type query struct {
	msg   *message
	name  string // plain
	qtype uint16
	label int // length of the longest label
	size  int // the longest UDP answer that the client takes
}

// refusal is an answer without records, and why.
type refusal struct {
	outcome string
	rcode   int
	ede     uint16
	rule    int
	detail  string
	addrs   []netip.Addr
}

func refuse(outcome string, ede uint16, format string, args ...any) *refusal {
	return &refusal{outcome: outcome, rcode: mdns.RcodeRefused, ede: ede, rule: -1, detail: fmt.Sprintf(format, args...)}
}

func broken(outcome string, ede uint16, err error) *refusal {
	return &refusal{outcome: outcome, rcode: mdns.RcodeServerFailure, ede: ede, rule: -1, detail: err.Error()}
}

// parseQuery reads a client's message. It is nil if nothing can be answered to
// it; with a refusal it is as much as could be read.
func parseQuery(raw []byte) (*query, *refusal) {
	if len(raw) < 12 || raw[2]&0x80 != 0 {
		return nil, nil // too short, or itself an answer
	}
	q := &query{msg: new(mdns.Msg), size: mdns.MinMsgSize}
	q.msg.Id = binary.BigEndian.Uint16(raw)
	q.msg.Opcode = int(raw[2]>>3) & 0xf
	q.msg.RecursionDesired = raw[2]&1 != 0
	count := func(section int) uint16 { return binary.BigEndian.Uint16(raw[4+2*section:]) }
	malformed := func(rcode int) (*query, *refusal) {
		return q, &refusal{outcome: OutcomeMalformed, rcode: rcode, rule: -1, detail: "not a query that is understood"}
	}
	if q.msg.Opcode != mdns.OpcodeQuery {
		return malformed(mdns.RcodeNotImplemented)
	}
	if count(0) != 1 || count(1) != 0 || count(2) != 0 || count(3) > 2 || len(raw) > maxQuery {
		return malformed(mdns.RcodeFormatError)
	}
	whole := new(mdns.Msg)
	if whole.Unpack(raw) != nil || len(whole.Question) != 1 {
		return malformed(mdns.RcodeFormatError)
	}
	q.msg = whole
	q.name, q.qtype = plain(whole.Question[0].Name), whole.Question[0].Qtype
	if opt := whole.IsEdns0(); opt != nil {
		q.size = min(max(int(opt.UDPSize()), mdns.MinMsgSize), ednsSize)
		if opt.Version() != 0 {
			return q, &refusal{outcome: OutcomeMalformed, rcode: mdns.RcodeBadVers, rule: -1, detail: "this version of EDNS is not spoken"}
		}
	}
	refused := q.check()
	return q, refused
}

// check refuses what no policy could allow.
func (q *query) check() *refusal {
	if c := q.msg.Question[0].Qclass; c != mdns.ClassINET {
		return refuse(OutcomeType, mdns.ExtendedErrorCodeFiltered, "class %s is not answered", mdns.Class(c))
	}
	switch q.qtype {
	case mdns.TypeA, mdns.TypeAAAA, mdns.TypeHTTPS, mdns.TypeSVCB, mdns.TypeCNAME:
	default:
		return refuse(OutcomeType, mdns.ExtendedErrorCodeFiltered, "records of type %s are not answered", mdns.Type(q.qtype))
	}
	if !validName(q.name) {
		return refuse(OutcomeName, mdns.ExtendedErrorCodeFiltered,
			"not a host name of at most %d characters, %d labels, letters, digits, '-' and '_'", maxName, maxLabels)
	}
	for label := range strings.SplitSeq(q.name, ".") {
		q.label = max(q.label, len(label))
	}
	return nil
}

// validName says that a plain name is one that can be asked for.
func validName(name string) bool {
	if name == "" || len(name) > maxName {
		return false
	}
	labels, length := 1, 0
	for _, c := range []byte(name) {
		switch {
		case c == '.':
			if length == 0 {
				return false
			}
			labels, length = labels+1, 0
			continue
		case 'a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '-' || c == '_':
		default:
			return false
		}
		if length++; length > maxLabel {
			return false
		}
	}
	return length > 0 && labels <= maxLabels
}

// judge refuses a name that the policy does not allow.
func judge(p netpol.Program, name string) (netpol.NameVerdict, *refusal) {
	v := p.Name(name)
	if v.Allowed || v.Audit {
		return v, nil
	}
	if v.Reason != netpol.ReasonDenied {
		return v, refuse(OutcomeNoRule, mdns.ExtendedErrorCodeProhibited, "no rule allows the name")
	}
	r := refuse(OutcomeDenied, mdns.ExtendedErrorCodeFiltered, "a deny rule refuses the name")
	r.rule = v.Rule
	if v.Rule >= 0 && v.Rule < len(p.Rules) {
		r.detail = fmt.Sprintf("rule %s of %s denies the name", p.Rules[v.Rule].Name, p.Rules[v.Rule].Tenant)
	}
	return v, r
}

// byWildcard says that no rule that allows a name spells it out.
func byWildcard(p netpol.Program, v netpol.NameVerdict, name string) bool {
	for _, n := range p.Names {
		if !n.Deny && n.Pattern == name {
			for _, r := range v.Rules {
				if r == int(n.Rule) {
					return false
				}
			}
		}
	}
	return true
}

// reply is an empty answer to a query.
func (q *query) reply(rcode int) *message {
	m := &mdns.Msg{Question: q.msg.Question, Compress: true}
	m.Id, m.Response, m.Opcode = q.msg.Id, true, q.msg.Opcode
	m.RecursionDesired, m.RecursionAvailable = q.msg.RecursionDesired, true
	m.Rcode = rcode
	if q.msg.IsEdns0() != nil {
		m.SetEdns0(ednsSize, false)
	}
	return m
}

// maxDetail of the text of an extended error.
const maxDetail = 160

func (q *query) refusal(r *refusal) *message {
	m := q.reply(r.rcode)
	if opt := m.IsEdns0(); opt != nil && r.rcode != mdns.RcodeBadVers {
		opt.Option = append(opt.Option, &mdns.EDNS0_EDE{InfoCode: r.ede, ExtraText: r.detail[:min(len(r.detail), maxDetail)]})
	}
	return m
}

// release is an answer with records. addrs are those that may be released.
func (q *query) release(a *answer, addrs []netip.Addr, svc []*mdns.SVCB, ttl uint32) *message {
	m := q.reply(a.rcode)
	owner := q.msg.Question[0].Name // as the client wrote it
	head := func(name string, t uint16) mdns.RR_Header {
		return mdns.RR_Header{Name: name, Rrtype: t, Class: mdns.ClassINET, Ttl: ttl}
	}
	if q.qtype == mdns.TypeHTTPS || q.qtype == mdns.TypeSVCB {
		// Without the aliases: so a target of "." is the name that was asked
		// for, which the policy allows.
		for _, s := range svc {
			s := *s
			s.Hdr = head(owner, q.qtype)
			if q.qtype == mdns.TypeHTTPS {
				m.Answer = append(m.Answer, &mdns.HTTPS{SVCB: s})
			} else {
				m.Answer = append(m.Answer, &s)
			}
		}
		return m
	}
	for _, target := range a.chain {
		m.Answer = append(m.Answer, &mdns.CNAME{Hdr: head(owner, mdns.TypeCNAME), Target: mdns.Fqdn(target)})
		owner = mdns.Fqdn(target)
	}
	for _, ip := range addrs {
		if q.qtype == mdns.TypeA {
			m.Answer = append(m.Answer, &mdns.A{Hdr: head(owner, mdns.TypeA), A: ip.AsSlice()})
		} else {
			m.Answer = append(m.Answer, &mdns.AAAA{Hdr: head(owner, mdns.TypeAAAA), AAAA: ip.AsSlice()})
		}
	}
	return m
}
