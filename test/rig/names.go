// SPDX-License-Identifier: Apache-2.0

package rig

import (
	"net"
	"net/netip"
	"strings"

	"github.com/miekg/dns"
)

// Resolver is where the internet's names are asked, port 53 of the API host,
// over UDP and TCP.
var Resolver = netip.AddrPortFrom(API4, 53)

// names of the internet. What starts with "->" is an alias.
var names = map[string][]string{
	"api.example.com.":          {API4.String(), API6.String()},
	"far.example.com.":          {Forbidden4.String(), Forbidden6.String()},
	"large.models.example.com.": {"->edge.cdn.example."},
	"eu.models.example.com.":    {"->edge.cdn.example."},
	"edge.cdn.example.":         {API4.String(), API6.String()},
	"rebind.example.com.":       {Metadata4.String()},
	"private.example.com.":      {"10.9.9.9"},
}

const nameTTL = 60

// Asked answers how many questions about a name have reached the resolver.
func (n *Internet) Asked(name string) int {
	return n.Requests("dns " + dns.Fqdn(strings.ToLower(name)))
}

// answerNames starts the resolver; called inside the host's namespace.
func (n *Internet) answerNames() error {
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		_ = w.WriteMsg(n.answer(q)) // a lost answer is asked for again
	})
	udp, err := net.ListenPacket("udp", ":53")
	if err != nil {
		return err
	}
	tcp, err := net.Listen("tcp", ":53")
	if err != nil {
		udp.Close()
		return err
	}
	for _, srv := range []*dns.Server{{PacketConn: udp, Handler: handler}, {Listener: tcp, Handler: handler}} {
		n.servers = append(n.servers, closer(srv.Shutdown))
		n.wg.Go(func() { _ = srv.ActivateAndServe() }) // ends with Close
	}
	return nil
}

type closer func() error

func (c closer) Close() error { return c() }

func (n *Internet) answer(q *dns.Msg) *dns.Msg {
	m := new(dns.Msg).SetReply(q)
	if len(q.Question) != 1 {
		return m.SetRcode(q, dns.RcodeFormatError)
	}
	ask := q.Question[0]
	n.count("dns " + strings.ToLower(ask.Name))
	name := strings.ToLower(ask.Name)
	records, ok := names[name]
	if !ok {
		return m.SetRcode(q, dns.RcodeNameError)
	}
	for len(records) == 1 && strings.HasPrefix(records[0], "->") {
		target := records[0][2:]
		m.Answer = append(m.Answer, &dns.CNAME{Hdr: header(name, dns.TypeCNAME), Target: target})
		name, records = target, names[target]
	}
	for _, r := range records {
		a := netip.MustParseAddr(r)
		switch {
		case ask.Qtype == dns.TypeA && a.Is4():
			m.Answer = append(m.Answer, &dns.A{Hdr: header(name, dns.TypeA), A: a.AsSlice()})
		case ask.Qtype == dns.TypeAAAA && a.Is6():
			m.Answer = append(m.Answer, &dns.AAAA{Hdr: header(name, dns.TypeAAAA), AAAA: a.AsSlice()})
		}
	}
	return m
}

func header(name string, typ uint16) dns.RR_Header {
	return dns.RR_Header{Name: name, Rrtype: typ, Class: dns.ClassINET, Ttl: nameTTL}
}
