// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	mdns "github.com/miekg/dns"
)

type message = mdns.Msg

const (
	ednsSize  = 1232 // of UDP messages, both ways: fits every path
	goodFor   = 30 * time.Second
	idleConns = 4 // kept of one tls:// upstream
	idleFor   = 20 * time.Second
	fairShare = 8 // queries of a sandbox once half of all places are taken
)

// errNotOurs says that a message is not the answer to the question.
var errNotOurs = errors.New("not an answer to the question")

// upstreams asks the configured servers in order.
type upstreams struct {
	list    []*upstream
	timeout time.Duration
	slots   chan struct{} // one for each query that may be under way
}

// preference is the upstream that answered a sandbox where those before it did
// not: it is asked first for a while. It is each sandbox's own, since whoever
// owns a name may let it fail at one upstream and not at another: others must
// not be led away from the first by that.
type preference struct {
	mu    sync.Mutex
	first int
	until time.Time // first is asked first so long
}

// upstream is one server.
type upstream struct {
	addr netip.AddrPort
	tls  *tls.Config // nil: plain

	mu     sync.Mutex
	idle   []idleConn // last used last
	closed bool
}

type idleConn struct {
	net.Conn
	since time.Time
}

func newUpstreams(cfg Config) (*upstreams, error) {
	if len(cfg.Upstreams) == 0 {
		return nil, errors.New("resolver: no upstreams")
	}
	var roots *x509.CertPool // nil: the system's
	if cfg.CAFile != "" {
		pem, err := os.ReadFile(cfg.CAFile)
		if err != nil {
			return nil, fmt.Errorf("roots of the resolver's upstreams: %w", err)
		}
		roots = x509.NewCertPool()
		if !roots.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("roots of the resolver's upstreams: no certificate in %s", cfg.CAFile)
		}
	}
	us := &upstreams{timeout: cfg.Timeout, slots: make(chan struct{}, cfg.UpstreamInFlight)}
	for _, text := range cfg.Upstreams {
		u, err := parseUpstream(text, roots)
		if err != nil {
			return nil, err
		}
		us.list = append(us.list, u)
	}
	return us, nil
}

func parseUpstream(text string, roots *x509.CertPool) (*upstream, error) {
	bad := func(why string) error {
		return fmt.Errorf("resolver: upstream %q: %s; it must look like 192.0.2.53:53 or tls://192.0.2.53:853#dns.example", text, why)
	}
	rest, isTLS := strings.CutPrefix(text, "tls://")
	where, name, named := strings.Cut(rest, "#")
	addr, err := netip.ParseAddrPort(where)
	if err != nil {
		return nil, bad("not an address with a port")
	}
	u := &upstream{addr: netip.AddrPortFrom(addr.Addr().Unmap(), addr.Port())}
	switch {
	case addr.Port() == 0:
		return nil, bad("no port")
	case !isTLS && named:
		return nil, bad("a name is for tls:// only")
	case isTLS && named && !validName(strings.ToLower(name)):
		return nil, bad("the name is not one")
	case isTLS:
		if !named {
			name = addr.Addr().String()
		}
		u.tls = &tls.Config{ServerName: name, RootCAs: roots, MinVersion: tls.VersionTLS12, ClientSessionCache: tls.NewLRUClientSessionCache(4)}
	}
	return u, nil
}

// order lists the upstreams as they are to be asked; a single one twice.
func (p *preference) order(upstreams int, now time.Time) []int {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := make([]int, 0, upstreams+1)
	if p.first != 0 && now.Before(p.until) {
		out = append(out, p.first)
	}
	for i := range upstreams {
		if !slices.Contains(out, i) {
			out = append(out, i)
		}
	}
	if len(out) == 1 {
		out = append(out, 0)
	}
	return out
}

func (p *preference) good(i int, now time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if i != p.first || !now.Before(p.until) {
		p.first, p.until = i, now.Add(goodFor)
	}
}

// exchange answers what the first upstream says that says anything of use: no
// error, or that there is no such name.
func (us *upstreams) exchange(ctx context.Context, st *counters, name string, qtype uint16) (*message, error) {
	// Names that nobody answers hold their places for seconds: one tenant's must
	// not take those of all.
	defer st.asking.Add(-1)
	if st.asking.Add(1) > fairShare && len(us.slots) > cap(us.slots)/2 {
		return nil, fmt.Errorf("more than %d queries of the sandbox are under way on a busy node", fairShare)
	}
	select {
	case us.slots <- struct{}{}:
		defer func() { <-us.slots }()
	case <-ctx.Done():
		return nil, fmt.Errorf("too many queries are under way: %w", ctx.Err())
	}
	var errs []error
	for _, i := range st.prefer.order(len(us.list), time.Now()) {
		m, err := us.attempt(ctx, us.list[i], st, name, qtype)
		if err == nil && m.Rcode != mdns.RcodeSuccess && m.Rcode != mdns.RcodeNameError {
			err = fmt.Errorf("answered %s", mdns.RcodeToString[m.Rcode])
		}
		if err == nil {
			st.prefer.good(i, time.Now())
			return m, nil
		}
		errs = append(errs, fmt.Errorf("%s: %w", us.list[i].addr, err))
		if ctx.Err() != nil {
			break
		}
	}
	return nil, errors.Join(errs...)
}

func (us *upstreams) attempt(ctx context.Context, u *upstream, st *counters, name string, qtype uint16) (*message, error) {
	ctx, cancel := context.WithTimeout(ctx, us.timeout)
	defer cancel()
	m, err := u.ask(ctx, st, name, qtype, true)
	if err == nil && m.Rcode == mdns.RcodeFormatError {
		// It may be too old for EDNS.
		return u.ask(ctx, st, name, qtype, false)
	}
	return m, err
}

// ask sends one new query and waits for its answer.
func (u *upstream) ask(ctx context.Context, st *counters, name string, qtype uint16, edns bool) (*message, error) {
	q := new(mdns.Msg)
	q.SetQuestion(mdns.Fqdn(name), qtype) // with a random id
	if edns {
		q.SetEdns0(ednsSize, false)
	}
	raw, err := q.Pack()
	if err != nil {
		return nil, fmt.Errorf("pack query: %w", err)
	}
	if u.tls != nil {
		return u.askTLS(ctx, st, q, raw)
	}
	m, err := u.askUDP(ctx, st, q, raw)
	if err != nil || !m.Truncated {
		return m, err
	}
	conn, err := dial(ctx, "tcp", u.addr)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer stopWith(ctx, conn)()
	return askStream(conn, st, q, raw)
}

func dial(ctx context.Context, network string, to netip.AddrPort) (net.Conn, error) {
	var d net.Dialer
	d.SetMultipathTCP(false)
	return d.DialContext(ctx, network, to.String())
}

// stopWith makes reads and writes of a connection fail when ctx ends.
func stopWith(ctx context.Context, conn net.Conn) (release func()) {
	if t, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(t)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	return func() { stop() }
}

var udpBuffers = sync.Pool{New: func() any { return new([4096]byte) }}

// askUDP uses a socket, and so a source port, of its own. The kernel lets in
// only what comes from the upstream; of that, what is no answer is passed over.
func (u *upstream) askUDP(ctx context.Context, st *counters, q *message, raw []byte) (*message, error) {
	conn, err := dial(ctx, "udp", u.addr)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer stopWith(ctx, conn)()
	st.upstreamOut.Add(uint64(len(raw)))
	if _, err := conn.Write(raw); err != nil {
		return nil, err
	}
	buf := udpBuffers.Get().(*[4096]byte)
	defer udpBuffers.Put(buf)
	for {
		n, err := conn.Read(buf[:])
		if err != nil {
			return nil, err
		}
		st.upstreamIn.Add(uint64(n))
		m, err := accept(buf[:n], q)
		if err == nil {
			return m, nil
		}
		st.spoofed.Add(1)
	}
}

// askStream asks over TCP or TLS.
func askStream(conn net.Conn, st *counters, q *message, raw []byte) (*message, error) {
	out := append(binary.BigEndian.AppendUint16(nil, uint16(len(raw))), raw...)
	st.upstreamOut.Add(uint64(len(out)))
	if _, err := conn.Write(out); err != nil {
		return nil, err
	}
	var head [2]byte
	if _, err := io.ReadFull(conn, head[:]); err != nil {
		return nil, err
	}
	in := make([]byte, binary.BigEndian.Uint16(head[:]))
	if _, err := io.ReadFull(conn, in); err != nil {
		return nil, err
	}
	st.upstreamIn.Add(uint64(len(head) + len(in)))
	m, err := accept(in, q)
	if err != nil {
		st.spoofed.Add(1)
		return nil, err
	}
	return m, nil
}

// askTLS uses a connection that was kept, or a new one if there is none or the
// upstream has closed it.
func (u *upstream) askTLS(ctx context.Context, st *counters, q *message, raw []byte) (*message, error) {
	for {
		conn, kept := u.takeIdle(time.Now())
		if !kept {
			c, err := dial(ctx, "tcp", u.addr)
			if err != nil {
				return nil, err
			}
			conn = tls.Client(c, u.tls)
		}
		release := stopWith(ctx, conn)
		m, err := askStream(conn, st, q, raw)
		release()
		switch {
		case err == nil:
			u.keep(conn, time.Now())
			return m, nil
		case !kept || ctx.Err() != nil:
			_ = conn.Close()
			return nil, err
		}
		_ = conn.Close()
	}
}

func (u *upstream) takeIdle(now time.Time) (net.Conn, bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for len(u.idle) > 0 {
		last := u.idle[len(u.idle)-1]
		u.idle = u.idle[:len(u.idle)-1]
		if now.Sub(last.since) < idleFor {
			return last.Conn, true
		}
		_ = last.Close()
	}
	return nil, false
}

func (u *upstream) keep(conn net.Conn, now time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed || len(u.idle) >= idleConns {
		_ = conn.Close()
		return
	}
	_ = conn.SetDeadline(time.Time{})
	u.idle = append(u.idle, idleConn{conn, now})
}

func (us *upstreams) close() {
	for _, u := range us.list {
		u.mu.Lock()
		u.closed = true
		for _, c := range u.idle {
			_ = c.Close()
		}
		u.idle = nil
		u.mu.Unlock()
	}
}

// accept reads a message from an upstream; errNotOurs if it does not answer
// the query.
func accept(raw []byte, q *message) (*message, error) {
	if len(raw) < 12 || binary.BigEndian.Uint16(raw) != q.Id {
		return nil, errNotOurs
	}
	m := new(mdns.Msg)
	if err := m.Unpack(raw); err != nil {
		return nil, fmt.Errorf("%w: %w", errNotOurs, err)
	}
	if !m.Response || m.Opcode != mdns.OpcodeQuery || len(m.Question) != 1 {
		return nil, errNotOurs
	}
	got, want := m.Question[0], q.Question[0]
	if got.Qtype != want.Qtype || got.Qclass != want.Qclass || plain(got.Name) != plain(want.Name) {
		return nil, errNotOurs
	}
	return m, nil
}

// plain is a name as policies have it: lower case, no final dot.
func plain(name string) string { return strings.ToLower(strings.TrimSuffix(name, ".")) }
