// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"bytes"
	"context"
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	mdns "github.com/miekg/dns"

	"github.com/bulkheadhq/bulkhead/netpol"
)

// rawUpstream answers every question with the same bytes, their id and
// question put right when fix is set, so that they are not passed over.
type rawUpstream struct {
	raw []byte
	fix bool
}

func (u rawUpstream) exchange(_ context.Context, _ *counters, name string, qtype uint16) (*message, error) {
	q := new(mdns.Msg)
	q.SetQuestion(mdns.Fqdn(name), qtype)
	raw := append([]byte(nil), u.raw...)
	if len(raw) >= 2 {
		binary.BigEndian.PutUint16(raw, q.Id)
	}
	if u.fix {
		m := new(mdns.Msg)
		if m.Unpack(raw) == nil {
			m.Response, m.Opcode, m.Question = true, mdns.OpcodeQuery, q.Question
			if b, err := m.Pack(); err == nil {
				raw = b
			}
		}
	}
	return accept(raw, q)
}

// FuzzMessages hands any message of a client and any message of an upstream to
// a sandbox. Nothing may panic, and no address may be released that was not
// learned for a name that the policy allows.
func FuzzMessages(f *testing.F) {
	query := func(name string, qtype uint16) []byte {
		m := new(mdns.Msg)
		m.SetQuestion(name, qtype)
		m.SetEdns0(1232, true)
		raw, _ := m.Pack()
		return raw
	}
	reply := func(name string, qtype uint16, records ...string) []byte {
		m := new(mdns.Msg)
		m.SetQuestion(name, qtype)
		m.Response = true
		for _, text := range records {
			rr, err := mdns.NewRR(text)
			if err != nil {
				f.Fatal(err)
			}
			m.Answer = append(m.Answer, rr)
		}
		raw, _ := m.Pack()
		return raw
	}
	f.Add(query("www.example.com.", mdns.TypeA), reply("www.example.com.", mdns.TypeA, web, "www.example.com. 1 A 10.0.0.1"), true, true)
	f.Add(query("WWW.example.com.", mdns.TypeAAAA), reply("www.example.com.", mdns.TypeAAAA, "www.example.com. 1 AAAA ::ffff:1.2.3.4", "www.example.com. 1 AAAA 2600::1"), true, false)
	f.Add(query("a.cdn.example.com.", mdns.TypeA), reply("a.cdn.example.com.", mdns.TypeA, "a.cdn.example.com. 1 CNAME b.example.net.", "b.example.net. 1 A 93.184.216.1"), true, false)
	f.Add(query("a.cdn.example.com.", mdns.TypeHTTPS), reply("a.cdn.example.com.", mdns.TypeHTTPS, `a.cdn.example.com. 1 HTTPS 1 . alpn="h2" ipv4hint=10.0.0.1 mandatory=alpn`), true, true)
	f.Add(query("www.example.com.", mdns.TypeTXT), []byte{}, false, true)
	f.Add([]byte{0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0xc0, 0x0c, 0, 1, 0, 1}, reply(".", 0), false, true)

	p := compile(f, webRules)
	tb := newTable(p)
	srv, err := Open(Config{
		Dir: f.TempDir(), Table: tb, Upstreams: []string{"127.0.0.1:1"}, Rate: 1e12, Burst: 1e12, NamesPerMinute: 1 << 30, AddrsPerSandbox: 64,
	})
	if err != nil {
		f.Fatal(err)
	}
	as := Sandbox{ID: testID, Slot: testSlot, Program: p}
	path, _ := srv.journalPath(testID)
	sb, err := srv.ensure(as, path)
	if err != nil {
		f.Fatal(err)
	}
	if _, err := sb.takeUp(as); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, client, upstream []byte, fix, udp bool) {
		srv.up = rawUpstream{upstream, fix}
		out := sb.handle(client, udp)
		if out == nil {
			if len(client) >= 12 && client[2]&0x80 == 0 {
				t.Error("no answer to a query")
			}
			return
		}
		if len(out) > 65535 || udp && len(out) > ednsSize {
			t.Errorf("an answer of %d bytes", len(out))
		}
		m := new(mdns.Msg)
		if err := m.Unpack(out); err != nil {
			t.Fatalf("the answer is malformed: %v", err)
		}
		if m.Id != binary.BigEndian.Uint16(client) || !m.Response {
			t.Errorf("answer %v", m)
		}
		for _, rr := range m.Answer {
			var a netip.Addr
			switch rr := rr.(type) {
			case *mdns.A:
				a, _ = netip.AddrFromSlice(rr.A.To4())
			case *mdns.AAAA:
				a, _ = netip.AddrFromSlice(rr.AAAA)
			default:
				continue
			}
			name := plain(m.Question[0].Name)
			if v := p.Name(name); !v.Allowed || !v.AllowPrivate && netpol.PrivateAddr(a) || netpol.SpecialUse(a) || a.Is4In6() {
				t.Errorf("%s was released for %s", a, name)
			}
			tb.mu.Lock()
			if len(tb.addrs[a]) == 0 {
				t.Errorf("%s was released and is not open", a)
			}
			tb.mu.Unlock()
		}
	})
}

// FuzzJournal reads any file as a journal.
func FuzzJournal(f *testing.F) {
	now := time.UnixMilli(1_700_000_000_000)
	f.Add([]byte(`{"n":"www.example.com","a":["192.0.2.1","2001:db8::1"],"x":[1700000000000,1],"s":1}`+"\n"+`{"n":"www.example.com","a":["192.0.2.1"]}`), true)
	f.Add([]byte(`{"n":"..","a":["192.0.2.1%eth0"],"x":[9223372036854775807]}`), true)
	f.Add([]byte("00000000 \n"), false)
	f.Fuzz(func(t *testing.T, b []byte, sums bool) {
		if sums {
			values := bytes.Split(b, []byte{'\n'})
			b = appendLine(nil, []byte(journalVersion))
			for _, v := range values {
				b = appendLine(b, v)
			}
		}
		st, torn := decodeJournal(b, now, time.Hour)
		if torn > len(b) || torn < 0 {
			t.Errorf("%d of %d bytes torn", torn, len(b))
		}
		// What it says is written and read again.
		again, err := encode(appendLine(nil, []byte(journalVersion)), st.records())
		if err != nil {
			t.Fatal(err)
		}
		back, torn := decodeJournal(again, now, time.Hour)
		if torn != 0 || back.leases != st.leases {
			t.Errorf("%d leases come back as %d, %d bytes torn", st.leases, back.leases, torn)
		}
	})
}
