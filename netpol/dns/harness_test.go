// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	mdns "github.com/miekg/dns"

	"github.com/bulkheadhq/bulkhead/netpol"
)

const (
	testID   = "aaaaaaaaaaaa"
	testSlot = 7
)

var (
	errTableFull = errors.New("no space left in the map")
	errNoMemory  = errors.New("cannot allocate memory")
)

// table behaves like the kernel's: it has a size, and takes steps of the
// policy in force alone.
type table struct {
	mu     sync.Mutex
	size   int // 0: 4096
	digest [32]byte
	addrs  map[netip.Addr][]netpol.PortRule
	used   map[netip.Addr]time.Duration
	calls  int
	fail   func(op string, call int) error // nil: works
}

func newTable(p netpol.Program) *table {
	return &table{digest: p.Digest, addrs: map[netip.Addr][]netpol.PortRule{}, used: map[netip.Addr]time.Duration{}}
}

func (tb *table) op(name string) error {
	tb.calls++
	if tb.fail != nil {
		return tb.fail(name, tb.calls)
	}
	return nil
}

func (tb *table) Learn(id string, slot uint32, digest [32]byte, l netpol.Learned) error {
	tb.mu.Lock()
	defer tb.mu.Unlock()
	if id != testID || slot != testSlot {
		return fmt.Errorf("learn for %s at %d", id, slot)
	}
	if err := tb.op("learn"); err != nil {
		return err
	}
	if digest != tb.digest {
		return fmt.Errorf("learn %s: %w", l.Addr, ErrMoved)
	}
	if len(l.Steps) == 0 || len(l.Steps) > netpol.MaxLearnedSteps {
		return fmt.Errorf("learn %s: %d steps", l.Addr, len(l.Steps))
	}
	size := tb.size
	if size == 0 {
		size = 4096
	}
	if tb.addrs[l.Addr] == nil && len(tb.addrs) >= size {
		return errTableFull
	}
	tb.addrs[l.Addr] = slices.Clone(l.Steps)
	return nil
}

func (tb *table) Forget(_ string, _ uint32, a netip.Addr) error {
	tb.mu.Lock()
	defer tb.mu.Unlock()
	if err := tb.op("forget"); err != nil {
		return err
	}
	delete(tb.addrs, a)
	return nil
}

func (tb *table) Learned(string, uint32) (map[netip.Addr]time.Duration, error) {
	tb.mu.Lock()
	defer tb.mu.Unlock()
	if err := tb.op("learned"); err != nil {
		return nil, err
	}
	out := map[netip.Addr]time.Duration{}
	for a := range tb.addrs {
		out[a] = -1
		if d, ok := tb.used[a]; ok {
			out[a] = d
		}
	}
	return out, nil
}

// swapped is what SetPolicy does.
func (tb *table) swapped(p netpol.Program, learned []netpol.Learned) error {
	tb.mu.Lock()
	defer tb.mu.Unlock()
	tb.digest = p.Digest
	tb.addrs = map[netip.Addr][]netpol.PortRule{}
	for _, l := range learned {
		tb.addrs[l.Addr] = slices.Clone(l.Steps)
	}
	return nil
}

func (tb *table) has() []string {
	tb.mu.Lock()
	defer tb.mu.Unlock()
	var out []string
	for _, a := range slices.SortedFunc(maps.Keys(tb.addrs), netip.Addr.Compare) {
		out = append(out, a.String())
	}
	return out
}

func (tb *table) ports(a string) string {
	tb.mu.Lock()
	defer tb.mu.Unlock()
	var out []string
	for _, s := range tb.addrs[netip.MustParseAddr(a)] {
		out = append(out, netpol.PortRange{Lo: s.Lo, Hi: s.Hi, Proto: s.Proto}.String())
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

func (tb *table) set(f func()) {
	tb.mu.Lock()
	defer tb.mu.Unlock()
	f()
}

// compile compiles one policy, given as rules in YAML.
func compile(t testing.TB, rules string) netpol.Program {
	t.Helper()
	return compileAll(t, "rules:\n"+rules)
}

// compileAll compiles a chain, each layer without its kind and name.
func compileAll(t testing.TB, layers ...string) netpol.Program {
	t.Helper()
	var chain []netpol.Layer
	for i, text := range layers {
		p, err := netpol.Parse("test.yaml", []byte("kind: EgressPolicy\nname: test\n"+text))
		if err != nil {
			t.Fatal(err)
		}
		chain = append(chain, netpol.Layer{Tenant: "acme" + strings.Repeat("/team", i), Policy: p})
	}
	prog, err := netpol.Compile(chain)
	if err != nil {
		t.Fatal(err)
	}
	return prog
}

const webRules = `
- {name: web, action: allow, to: [{fqdn: www.example.com}, {fqdn: "*.cdn.example.com"}], ports: [443/tcp]}
- {name: plain, action: allow, to: [{fqdn: www.example.com}], ports: [80/tcp]}
- {name: inner, action: allow, to: [{fqdn: inner.example.com, allow_private: true}], ports: [5432/tcp]}
- {name: bad, action: deny, to: [{fqdn: bad.cdn.example.com}]}
`

// zone is a scripted upstream: it answers questions by what is in it.
type zone struct {
	mu      sync.Mutex
	records map[string][]string // "name type" -> records as in a zone file
	reply   func(w mdns.ResponseWriter, r *mdns.Msg) bool
	asked   atomic.Int64
	last    atomic.Pointer[mdns.Msg]
}

func newZone(records ...string) *zone {
	z := &zone{records: map[string][]string{}}
	for _, text := range records {
		rr, err := mdns.NewRR(text)
		if err != nil {
			panic(err)
		}
		key := plain(rr.Header().Name) + " " + mdns.TypeToString[rr.Header().Rrtype]
		z.records[key] = append(z.records[key], text)
	}
	return z
}

// ServeDNS answers as a recursive resolver does, aliases followed.
func (z *zone) ServeDNS(w mdns.ResponseWriter, r *mdns.Msg) {
	z.asked.Add(1)
	z.last.Store(r)
	if z.reply != nil && z.reply(w, r) {
		return
	}
	_ = w.WriteMsg(z.answer(r))
}

func (z *zone) answer(r *mdns.Msg) *mdns.Msg {
	z.mu.Lock()
	defer z.mu.Unlock()
	m := new(mdns.Msg)
	m.SetReply(r)
	at, known := plain(r.Question[0].Name), false
	for range 20 {
		for _, text := range z.records[at+" "+mdns.TypeToString[r.Question[0].Qtype]] {
			rr, _ := mdns.NewRR(text)
			m.Answer = append(m.Answer, rr)
		}
		for key := range z.records {
			known = known || strings.HasPrefix(key, at+" ")
		}
		alias := z.records[at+" CNAME"]
		if len(alias) == 0 || r.Question[0].Qtype == mdns.TypeCNAME {
			break
		}
		rr, _ := mdns.NewRR(alias[0])
		m.Answer = append(m.Answer, rr)
		at = plain(rr.(*mdns.CNAME).Target)
	}
	if !known {
		m.Rcode = mdns.RcodeNameError
	}
	return m
}

// exchange lets a zone stand in for the upstreams.
func (z *zone) exchange(_ context.Context, _ *counters, name string, qtype uint16) (*message, error) {
	z.asked.Add(1)
	q := new(mdns.Msg)
	q.SetQuestion(mdns.Fqdn(name), qtype)
	return z.answer(q), nil
}

// serveZone answers on UDP and TCP of one port of the loopback device.
func serveZone(t testing.TB, h mdns.Handler) string {
	t.Helper()
	pc, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp4", pc.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []*mdns.Server{{PacketConn: pc, Handler: h, UDPSize: 4096}, {Listener: l, Handler: h}} {
		runServer(t, s)
	}
	return pc.LocalAddr().String()
}

func runServer(t testing.TB, s *mdns.Server) {
	started := make(chan struct{})
	s.NotifyStartedFunc = func() { close(started) }
	done := make(chan error, 1)
	go func() { done <- s.ActivateAndServe() }()
	<-started
	t.Cleanup(func() {
		_ = s.Shutdown()
		<-done
	})
}

// rig is one sandbox without sockets: its queries are handed to it.
type rig struct {
	t      testing.TB
	srv    *Server
	sb     *sandbox
	tb     *table
	zone   *zone
	dir    string
	mu     sync.Mutex
	events []Event
}

func newRig(t testing.TB, p netpol.Program, z *zone, change func(*Config)) *rig {
	t.Helper()
	r := &rig{t: t, tb: newTable(p), zone: z, dir: filepath.Join(t.TempDir(), "dns")}
	r.open(p, change)
	return r
}

// open opens a server on the directory and the table, as after a restart.
func (r *rig) open(p netpol.Program, change func(*Config)) {
	r.t.Helper()
	cfg := Config{
		Dir: r.dir, Table: r.tb, Upstreams: []string{"127.0.0.1:1"},
		Event: func(ev Event) { r.mu.Lock(); r.events = append(r.events, ev); r.mu.Unlock() },
		Rate:  1e6, Burst: 1e6,
	}
	if change != nil {
		change(&cfg)
	}
	srv, err := Open(cfg)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { srv.Close() })
	if r.zone != nil {
		srv.up = r.zone
	}
	r.srv = srv
	as := Sandbox{ID: testID, Slot: testSlot, Program: p}
	path, err := srv.journalPath(testID)
	if err != nil {
		r.t.Fatal(err)
	}
	if r.sb, err = srv.ensure(as, path); err != nil {
		r.t.Fatal(err)
	}
	if _, err := r.sb.takeUp(as); err != nil {
		r.t.Fatal(err)
	}
}

// ask asks as a client with EDNS does.
func (r *rig) ask(name string, qtype uint16) *mdns.Msg {
	r.t.Helper()
	q := new(mdns.Msg)
	q.SetQuestion(mdns.Fqdn(name), qtype)
	q.SetEdns0(4096, true)
	return r.send(q)
}

func (r *rig) send(q *mdns.Msg) *mdns.Msg {
	r.t.Helper()
	raw, err := q.Pack()
	if err != nil {
		r.t.Fatal(err)
	}
	out := r.sb.handle(raw, false)
	if out == nil {
		return nil
	}
	m := new(mdns.Msg)
	if err := m.Unpack(out); err != nil {
		r.t.Fatalf("answer to %v: %v", q.Question, err)
	}
	if m.Id != q.Id || !m.Response {
		r.t.Fatalf("answer to %v: id %d, response %v", q.Question, m.Id, m.Response)
	}
	return m
}

// told is what an answer says: its code, the addresses and other data, the
// text of its error.
func told(m *mdns.Msg) string {
	if m == nil {
		return "nothing"
	}
	parts := []string{mdns.RcodeToString[m.Rcode]}
	for _, rr := range m.Answer {
		switch rr := rr.(type) {
		case *mdns.A:
			parts = append(parts, rr.A.String())
		case *mdns.AAAA:
			parts = append(parts, rr.AAAA.String())
		case *mdns.CNAME:
			parts = append(parts, "->"+plain(rr.Target))
		default:
			parts = append(parts, strings.Join(strings.Fields(strings.TrimPrefix(rr.String(), rr.Header().String())), " "))
		}
	}
	if opt := m.IsEdns0(); opt != nil {
		for _, o := range opt.Option {
			if e, ok := o.(*mdns.EDNS0_EDE); ok {
				parts = append(parts, fmt.Sprintf("(%d %s)", e.InfoCode, e.ExtraText))
			}
		}
	}
	return strings.Join(parts, " ")
}

func (r *rig) outcomes() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []string
	for _, ev := range r.events {
		out = append(out, ev.Outcome)
	}
	return out
}

// consistent fails unless the journal, the kernel and the state agree.
func (r *rig) consistent() {
	r.t.Helper()
	st, torn, err := readJournal(filepath.Join(r.dir, testID), time.Now(), r.sb.cfg.Cap)
	if err != nil || torn != 0 {
		r.t.Fatalf("journal: %v, %d bytes torn", err, torn)
	}
	r.sb.mu.Lock()
	defer r.sb.mu.Unlock()
	pairs := func(s *state) (out []string) {
		for _, e := range s.byAge() {
			out = append(out, e.name+" "+e.addr.String()+" "+e.expires.Truncate(time.Millisecond).UTC().String())
		}
		slices.Sort(out)
		return out
	}
	if got, want := pairs(st), pairs(r.sb.st); !slices.Equal(got, want) {
		r.t.Errorf("journal has %q, the sandbox %q", got, want)
	}
	var want []string
	for _, l := range r.sb.st.learned() {
		want = append(want, l.Addr.String())
		r.tb.mu.Lock()
		if got := r.tb.addrs[l.Addr]; !slices.Equal(got, l.Steps) {
			r.t.Errorf("the kernel has %v at %s, want %v", got, l.Addr, l.Steps)
		}
		r.tb.mu.Unlock()
	}
	if got := r.tb.has(); !slices.Equal(got, want) {
		r.t.Errorf("the kernel has %v, want %v", got, want)
	}
}

// replier is an upstream that says what a function says.
type replier func(name string, qtype uint16) *mdns.Msg

func (r replier) exchange(_ context.Context, _ *counters, name string, qtype uint16) (*message, error) {
	return r(name, qtype), nil
}
