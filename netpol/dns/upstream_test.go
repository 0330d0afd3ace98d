// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	mdns "github.com/miekg/dns"
)

// upstreamRig is a sandbox behind real upstreams.
func upstreamRig(t testing.TB, change func(*Config), addrs ...string) *rig {
	t.Helper()
	return newRig(t, compile(t, webRules), nil, func(c *Config) {
		c.Upstreams, c.Timeout = addrs, 300*time.Millisecond
		if change != nil {
			change(c)
		}
	})
}

const web = "www.example.com. 60 A 93.184.216.34"

func TestUpstreamQuery(t *testing.T) {
	z := newZone(web)
	ids, ports := map[uint16]bool{}, map[string]bool{}
	var mu sync.Mutex
	z.reply = func(w mdns.ResponseWriter, r *mdns.Msg) bool {
		mu.Lock()
		defer mu.Unlock()
		ids[r.Id] = true
		ports[w.RemoteAddr().String()] = true
		return false
	}
	r := upstreamRig(t, nil, serveZone(t, z))
	const n = 20
	for range n {
		q := new(mdns.Msg)
		q.SetQuestion("WWW.example.com.", mdns.TypeA)
		q.SetEdns0(4096, true)
		opt := q.IsEdns0()
		opt.Option = append(opt.Option,
			&mdns.EDNS0_SUBNET{Code: mdns.EDNS0SUBNET, Family: 1, SourceNetmask: 24, Address: net.IPv4(10, 0, 0, 0)},
			&mdns.EDNS0_COOKIE{Code: mdns.EDNS0COOKIE, Cookie: "0011223344556677"})
		q.CheckingDisabled, q.AuthenticatedData = true, true
		if got := told(r.send(q)); got != "NOERROR 93.184.216.34" {
			t.Fatal(got)
		}
	}
	sent := z.last.Load()
	opt := sent.IsEdns0()
	if opt == nil || len(opt.Option) != 0 || opt.Do() || opt.UDPSize() != 1232 {
		t.Errorf("EDNS of the query upstream: %v", opt)
	}
	if sent.CheckingDisabled || sent.AuthenticatedData || !sent.RecursionDesired || sent.Question[0].Name != "www.example.com." {
		t.Errorf("query upstream: %v", sent)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(ids) < n-2 || len(ports) < n-2 {
		t.Errorf("%d queries had %d ids and %d source ports", n, len(ids), len(ports))
	}
	s := r.srv.Stats(testID)
	if s.ClientBytesIn == 0 || s.UpstreamBytesOut < n*30 || s.UpstreamBytesIn < n*40 {
		t.Errorf("bytes: %+v", s)
	}
}

// What is sent to the resolver's socket and is not the answer is passed over.
func TestLiar(t *testing.T) {
	for name, lie := range map[string]func(m *mdns.Msg){
		"id":            func(m *mdns.Msg) { m.Id++ },
		"name":          func(m *mdns.Msg) { m.Question[0].Name = "evil.example.com." },
		"type":          func(m *mdns.Msg) { m.Question[0].Qtype = mdns.TypeAAAA },
		"class":         func(m *mdns.Msg) { m.Question[0].Qclass = mdns.ClassCHAOS },
		"no question":   func(m *mdns.Msg) { m.Question = nil },
		"two":           func(m *mdns.Msg) { m.Question = append(m.Question, m.Question[0]) },
		"not an answer": func(m *mdns.Msg) { m.Response = false },
		"opcode":        func(m *mdns.Msg) { m.Opcode = mdns.OpcodeNotify },
	} {
		t.Run(name, func(t *testing.T) {
			z := newZone(web)
			z.reply = func(w mdns.ResponseWriter, r *mdns.Msg) bool {
				forged := z.answer(r)
				forged.Answer[0].(*mdns.A).A = net.IPv4(93, 184, 216, 66)
				lie(forged)
				_ = w.WriteMsg(forged)
				_, _ = w.Write([]byte{1, 2, 3})
				return false
			}
			r := upstreamRig(t, nil, serveZone(t, z))
			if got := told(r.ask("www.example.com", mdns.TypeA)); got != "NOERROR 93.184.216.34" {
				t.Errorf("got %s", got)
			}
			if n := r.srv.Stats(testID).Spoofed; n != 2 {
				t.Errorf("counted %d forged messages, want 2", n)
			}
		})
	}
	// Nothing but lies.
	z := newZone(web)
	z.reply = func(w mdns.ResponseWriter, r *mdns.Msg) bool {
		m := z.answer(r)
		m.Id++
		_ = w.WriteMsg(m)
		return true
	}
	r := upstreamRig(t, nil, serveZone(t, z))
	if m := r.ask("www.example.com", mdns.TypeA); m.Rcode != mdns.RcodeServerFailure || len(r.tb.has()) != 0 {
		t.Errorf("only lies: %s", told(m))
	}
}

func TestFailOver(t *testing.T) {
	good := newZone(web)
	slow := newZone(web)
	slow.reply = func(mdns.ResponseWriter, *mdns.Msg) bool { return true } // never answers
	sick := newZone(web)
	sick.reply = func(w mdns.ResponseWriter, r *mdns.Msg) bool {
		m := new(mdns.Msg)
		_ = w.WriteMsg(m.SetRcode(r, mdns.RcodeServerFailure))
		return true
	}
	closedPort := "127.0.0.1:9" // refuses at once
	for name, first := range map[string]string{"closed": closedPort, "slow": serveZone(t, slow), "servfail": serveZone(t, sick)} {
		t.Run(name, func(t *testing.T) {
			r := upstreamRig(t, nil, first, serveZone(t, good))
			start := time.Now()
			if got := told(r.ask("www.example.com", mdns.TypeA)); got != "NOERROR 93.184.216.34" {
				t.Fatal(got)
			}
			if d := time.Since(start); name != "slow" && d > 200*time.Millisecond {
				t.Errorf("took %s to ask the next", d)
			}
			// The one that answered is asked first now.
			start = time.Now()
			r.ask("www.example.com", mdns.TypeA)
			if d := time.Since(start); d > 200*time.Millisecond {
				t.Errorf("the second query took %s", d)
			}
		})
	}
	if n := slow.asked.Load(); n != 1 {
		t.Errorf("the slow upstream was asked %d times, want once", n)
	}
	r := upstreamRig(t, nil, closedPort, serveZone(t, sick))
	m := r.ask("www.example.com", mdns.TypeA)
	if m.Rcode != mdns.RcodeServerFailure || !strings.Contains(told(m), "refused") {
		t.Errorf("all sick: %s", told(m))
	}
	var p preference
	now := time.Now()
	p.good(2, now)
	if got := fmt.Sprint(p.order(3, now.Add(time.Second)), p.order(3, now.Add(time.Minute))); got != "[2 0 1] [0 1 2]" {
		t.Errorf("order %s", got)
	}
}

// Who owns a name can let it fail at one upstream. Other sandboxes go on to ask
// the first all the same.
func TestFailOverIsNobodyElses(t *testing.T) {
	first, second := newZone(web), newZone(web, "evil.cdn.example.com. 60 A 93.184.216.40")
	first.reply = func(w mdns.ResponseWriter, r *mdns.Msg) bool {
		if plain(r.Question[0].Name) != "evil.cdn.example.com" {
			return false
		}
		m := new(mdns.Msg)
		_ = w.WriteMsg(m.SetRcode(r, mdns.RcodeServerFailure))
		return true
	}
	r := upstreamRig(t, nil, serveZone(t, first), serveZone(t, second))
	if got := told(r.ask("evil.cdn.example.com", mdns.TypeA)); got != "NOERROR 93.184.216.40" {
		t.Fatal(got)
	}
	was := second.asked.Load()
	var neighbour counters
	if _, err := r.srv.up.exchange(t.Context(), &neighbour, "www.example.com", mdns.TypeA); err != nil {
		t.Fatal(err)
	}
	if second.asked.Load() != was {
		t.Error("a neighbour was led to the second upstream")
	}
}

func TestOldUpstream(t *testing.T) {
	z := newZone(web)
	z.reply = func(w mdns.ResponseWriter, r *mdns.Msg) bool {
		if r.IsEdns0() == nil {
			return false
		}
		m := new(mdns.Msg)
		_ = w.WriteMsg(m.SetRcode(r, mdns.RcodeFormatError))
		return true
	}
	r := upstreamRig(t, nil, serveZone(t, z))
	if got := told(r.ask("www.example.com", mdns.TypeA)); got != "NOERROR 93.184.216.34" {
		t.Error(got)
	}
}

func TestTruncatedUpstream(t *testing.T) {
	var records []string
	for i := range 240 {
		records = append(records, fmt.Sprintf("www.example.com. 60 A 93.184.218.%d", i))
	}
	z := newZone(records...)
	byTCP := 0
	z.reply = func(w mdns.ResponseWriter, r *mdns.Msg) bool {
		m := z.answer(r)
		if _, udp := w.RemoteAddr().(*net.UDPAddr); udp {
			m.Truncate(1232)
		} else {
			byTCP++
		}
		_ = w.WriteMsg(m)
		return true
	}
	r := upstreamRig(t, nil, serveZone(t, z))
	if m := r.ask("www.example.com", mdns.TypeA); len(m.Answer) != 240 || byTCP != 1 {
		t.Errorf("%d records, %d queries by TCP", len(m.Answer), byTCP)
	}
	r.consistent()
}

// Queries for the same records at the same time share one upstream.
func TestSharedQuery(t *testing.T) {
	z := newZone(web)
	hold := make(chan struct{})
	z.reply = func(mdns.ResponseWriter, *mdns.Msg) bool { <-hold; return false }
	r := upstreamRig(t, func(c *Config) { c.Timeout = 5 * time.Second }, serveZone(t, z))
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if got := told(r.ask("www.example.com", mdns.TypeA)); got != "NOERROR 93.184.216.34" {
				t.Error(got)
			}
		})
	}
	for r.sb.n.queries.Load() < 20 {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(20 * time.Millisecond)
	close(hold)
	wg.Wait()
	if n := z.asked.Load(); n != 1 {
		t.Errorf("asked %d times, want once", n)
	}
}

// authority makes certificates for a test.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test roots"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return &authority{cert, key, file}
}

func (a *authority) server(t testing.TB, name string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(2), DNSNames: []string{name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, &key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// countingListener counts connections.
type countingListener struct {
	net.Listener
	mu    sync.Mutex
	conns []net.Conn
}

func (l *countingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil {
		l.mu.Lock()
		l.conns = append(l.conns, c)
		l.mu.Unlock()
	}
	return c, err
}

func TestTLSUpstream(t *testing.T) {
	ca, other := newAuthority(t), newAuthority(t)
	inner, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := &countingListener{Listener: inner}
	runServer(t, &mdns.Server{
		Listener: tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{ca.server(t, "dns.example.net")}}), Handler: newZone(web),
	})
	addr := "tls://" + inner.Addr().String()
	use := func(text, file string) *rig {
		return upstreamRig(t, func(c *Config) { c.CAFile = file; c.Timeout = 2 * time.Second }, text)
	}
	r := use(addr+"#dns.example.net", ca.file)
	for range 5 {
		if got := told(r.ask("www.example.com", mdns.TypeA)); got != "NOERROR 93.184.216.34" {
			t.Fatal(got)
		}
	}
	l.mu.Lock()
	n := len(l.conns)
	for _, c := range l.conns {
		c.Close()
	}
	l.mu.Unlock()
	if n != 1 {
		t.Errorf("%d connections for five queries, want one", n)
	}
	// The upstream has closed it: a new one is made.
	if got := told(r.ask("www.example.com", mdns.TypeA)); got != "NOERROR 93.184.216.34" {
		t.Errorf("after the connection was closed: %s", got)
	}
	for name, bad := range map[string]*rig{
		"other name": use(addr+"#dns.example.org", ca.file), "no name": use(addr, ca.file),
		"other roots": use(addr+"#dns.example.net", other.file), "system roots": use(addr+"#dns.example.net", ""),
	} {
		m := bad.ask("www.example.com", mdns.TypeA)
		if m.Rcode != mdns.RcodeServerFailure || len(bad.tb.has()) != 0 {
			t.Errorf("%s: %s", name, told(m))
		}
	}
}

func TestParseUpstream(t *testing.T) {
	for _, text := range []string{
		"", "192.0.2.53", "dns.example.net:53", "192.0.2.53:0", "192.0.2.53:53#x", "tls://dns.example.net:853", "tls://192.0.2.53:853#",
		"https://192.0.2.53:443", "tls://192.0.2.53:853#a b", "[2001:db8::1%eth0",
	} {
		if _, err := parseUpstream(text, nil); err == nil {
			t.Errorf("%q is taken", text)
		}
	}
	u, err := parseUpstream("tls://[2001:db8::1]:853#Dns.example", nil)
	if err != nil || u.tls.ServerName != "Dns.example" || u.addr.String() != "[2001:db8::1]:853" {
		t.Errorf("%+v, %v", u, err)
	}
	p := compile(t, webRules)
	for name, c := range map[string]Config{
		"no directory": {Table: newTable(p), Upstreams: []string{"192.0.2.53:53"}},
		"no table":     {Dir: t.TempDir(), Upstreams: []string{"192.0.2.53:53"}},
		"no upstream":  {Dir: t.TempDir(), Table: newTable(p)},
		"floor":        {Dir: t.TempDir(), Table: newTable(p), Upstreams: []string{"192.0.2.53:53"}, Floor: 2 * time.Hour},
		"roots":        {Dir: t.TempDir(), Table: newTable(p), Upstreams: []string{"192.0.2.53:53"}, CAFile: "/none"},
		"negative":     {Dir: t.TempDir(), Table: newTable(p), Upstreams: []string{"192.0.2.53:53"}, InFlight: -1},
	} {
		if _, err := Open(c); err == nil {
			t.Errorf("%s: opened", name)
		}
	}
}

// Stop does not wait for upstreams.
func TestCloseDoesNotWait(t *testing.T) {
	z := newZone(web)
	z.reply = func(mdns.ResponseWriter, *mdns.Msg) bool { return true }
	r := upstreamRig(t, func(c *Config) { c.Timeout = time.Minute }, serveZone(t, z))
	done := make(chan *mdns.Msg, 1)
	go func() { done <- r.ask("www.example.com", mdns.TypeA) }()
	for z.asked.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	r.sb.close()
	select {
	case m := <-done:
		if m.Rcode != mdns.RcodeServerFailure {
			t.Error(told(m))
		}
	case <-time.After(5 * time.Second):
		t.Fatal("a query outlives the sandbox")
	}
	r.srv.Close()
	if err := r.srv.Start(context.Background(), Sandbox{ID: testID}); err != ErrClosed {
		t.Errorf("start after close: %v", err)
	}
}

// A sandbox whose names nobody answers does not take the places of others.
func TestBusyUpstreams(t *testing.T) {
	z := newZone(web)
	z.reply = func(w mdns.ResponseWriter, r *mdns.Msg) bool { return plain(r.Question[0].Name) != "www.example.com" }
	us, err := newUpstreams(Config{Timeout: time.Second, UpstreamInFlight: 24, Upstreams: []string{serveZone(t, z)}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var greedy, other counters
	var all sync.WaitGroup
	for i := range 64 {
		all.Go(func() { _, _ = us.exchange(ctx, &greedy, fmt.Sprintf("n%d.cdn.example.com", i), mdns.TypeA) })
	}
	eventually := time.Now().Add(5 * time.Second)
	for len(us.slots) < 13 && time.Now().Before(eventually) {
		time.Sleep(time.Millisecond)
	}
	start := time.Now()
	if _, err := us.exchange(t.Context(), &other, "www.example.com", mdns.TypeA); err != nil {
		t.Errorf("the other sandbox: %v", err)
	}
	if d := time.Since(start); d > 500*time.Millisecond {
		t.Errorf("the other sandbox waited for %s", d)
	}
	cancel()
	all.Wait()
	if n := greedy.asking.Load() + other.asking.Load(); n != 0 {
		t.Errorf("%d queries are still counted", n)
	}
}
