// SPDX-License-Identifier: Apache-2.0

// Package dns is the resolver of the sandboxes. It answers a sandbox only the
// names that the sandbox's policy allows, and lets the datapath know each
// address before the sandbox does.
//
// Every sandbox has a UDP and a TCP socket of its own on 127.0.0.53:53, opened
// inside its network namespace: no query crosses the link, no service of the
// host is exposed, and the socket is the identity of who asks. Queries to the
// upstreams leave from the host. Nothing that one sandbox has resolved is known
// to another.
//
// An answer takes this order: the lease of each address goes into the journal,
// then into the kernel (Table.Learn), then the answer is released. If either
// fails the client gets SERVFAIL and what was there before is put back. So an
// address that a client knows is open, and one that was never released is in
// the way of nobody.
//
// A lease is one address of one name, for the lifetime of the records, not
// less than Config.Floor. It ends after that, once the kernel has seen no packet
// to the address for Config.Idle. What several names give at an address is
// merged, and merged anew when one of them ends.
//
// The package never decides: that is netpol.Program. It never caches answers;
// queries of one sandbox for the same records at the same time share one
// query upstream.
//
// After a crash the journal in Config.Dir is read again: a line that is torn
// ends it. Start then makes the kernel equal to it. While no agent runs, names
// do not resolve and learned addresses stay open.
//
// Lock order: Server.mu, or sandbox.life and then sandbox.mu. Server.mu is never
// held while another is taken. sandbox.mu is held over the journal, the table
// and Swap's apply; it is what makes a policy change and an answer exclude each
// other.
package dns

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/bulkheadhq/bulkhead/netpol"
)

// Address is where the resolver listens in every sandbox.
const Address = "127.0.0.53:53"

var (
	// ErrMoved is what a Table's Learn answers when the digest is not that of
	// the policy in force.
	ErrMoved = errors.New("the policy in force is another one")
	// ErrClosed is the answer of a Server after Close.
	ErrClosed = errors.New("resolver is closed")
	// ErrListen says that the sockets of a sandbox could not be opened. What
	// the sandbox has learned is looked after all the same, and Run tries again.
	ErrListen = errors.New("resolver cannot listen in the sandbox")
)

// Table is the kernel's list of learned addresses.
type Table interface {
	// Learn puts an address in or changes its steps. ErrMoved (by errors.Is)
	// if the policy of the sandbox in force does not have this digest. It does
	// not touch when the last packet was seen.
	Learn(id string, slot uint32, digest [32]byte, l netpol.Learned) error
	// Forget takes an address out; nil if it is not there.
	Forget(id string, slot uint32, addr netip.Addr) error
	// Learned lists the addresses, each with the time since the last packet to
	// it; negative if there was none yet.
	Learned(id string, slot uint32) (map[netip.Addr]time.Duration, error)
}

// Config is what a Server needs. The zero value of a limit is its default.
type Config struct {
	Dir       string   // of the journals; made if missing; should not survive a reboot
	Upstreams []string // asked in order: "192.0.2.53:53", "tls://192.0.2.53:853#dns.example"
	CAFile    string   // roots for tls:// upstreams, PEM; "": the system's
	Table     Table
	Log       *slog.Logger
	Event     func(Event) // must not block; nil: nobody wants to know

	Timeout time.Duration // of one attempt at an upstream; 2 s. A query has two and a quarter of it in all
	Floor   time.Duration // least lifetime of a lease; 30 s
	Cap     time.Duration // most, and the most TTL of an answer; 1 h
	Idle    time.Duration // since the last packet, before an expired lease ends; 5 min

	AddrsPerName     int     // 256
	AddrsPerSandbox  int     // 1024; four times as many leases
	InFlight         int     // queries of a sandbox; 64. More are dropped
	UpstreamInFlight int     // queries of all sandboxes; 4096
	Connections      int     // TCP connections of a sandbox; 4
	Rate             float64 // queries a second of a sandbox; 50
	Burst            float64 // 200
	NamesPerMinute   int     // different names under one rule that a wildcard matched; 600
	WildcardLabel    int     // longest label of such a name; 63
}

func (c Config) withDefaults() Config {
	defaultTo(&c.Timeout, 2*time.Second)
	defaultTo(&c.Floor, 30*time.Second)
	defaultTo(&c.Cap, time.Hour)
	defaultTo(&c.Idle, 5*time.Minute)
	defaultTo(&c.AddrsPerName, 256)
	defaultTo(&c.AddrsPerSandbox, 1024)
	defaultTo(&c.InFlight, 64)
	defaultTo(&c.UpstreamInFlight, 4096)
	defaultTo(&c.Connections, 4)
	defaultTo(&c.Rate, 50)
	defaultTo(&c.Burst, 200)
	defaultTo(&c.NamesPerMinute, 600)
	defaultTo(&c.WildcardLabel, maxLabel)
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Event == nil {
		c.Event = func(Event) {}
	}
	return c
}

func defaultTo[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

func (c Config) check() error {
	switch {
	case c.Dir == "":
		return errors.New("resolver: no directory for the journals")
	case c.Table == nil:
		return errors.New("resolver: no table of learned addresses")
	case c.Floor < time.Second || c.Cap < c.Floor:
		return fmt.Errorf("resolver: lifetimes from %s to %s: the floor must be 1s or more and not above the cap", c.Floor, c.Cap)
	case c.Timeout < 0 || c.Idle < 0 || c.AddrsPerName < 0 || c.AddrsPerSandbox < 0 || c.InFlight < 0 ||
		c.UpstreamInFlight < 0 || c.Connections < 0 || c.Rate < 0 || c.Burst < 0 || c.NamesPerMinute < 0 || c.WildcardLabel < 0:
		return errors.New("resolver: a limit is negative")
	}
	return nil
}

// exchanger asks the upstreams one question.
type exchanger interface {
	exchange(ctx context.Context, st *counters, name string, qtype uint16) (*message, error)
}

// Server is the resolver of all sandboxes of a node.
type Server struct {
	cfg Config
	up  exchanger

	mu        sync.RWMutex
	sandboxes map[string]*sandbox
	closed    bool
}

// Sandbox is one to resolve for.
type Sandbox struct {
	ID      string
	Slot    uint32
	Netns   string // path of its network namespace, where the loopback device is up
	Program netpol.Program
}

// Open reads the configuration and makes the directory. It serves nobody yet.
func Open(cfg Config) (*Server, error) {
	cfg = cfg.withDefaults()
	if err := cfg.check(); err != nil {
		return nil, err
	}
	up, err := newUpstreams(cfg)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make directory of the resolver's journals: %w", err)
	}
	return &Server{cfg: cfg, up: up, sandboxes: map[string]*sandbox{}}, nil
}

// Run ends leases and opens sockets again that were lost, until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			for _, sb := range s.all() {
				sb.expire(now)
				sb.relisten(now)
			}
		}
	}
}

// Close stops serving. The journals and the kernel stay as they are.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	var g errgroup.Group
	for _, sb := range s.all() {
		g.Go(func() error { sb.close(); return nil })
	}
	err := g.Wait()
	if u, ok := s.up.(*upstreams); ok {
		u.close()
	}
	return err
}

// Start takes up the journal of a sandbox, makes the kernel equal to it under
// the program, and listens. The program is in force and stays so until Start
// returns. It may be called again, also with another program. ErrListen: all
// but the sockets is done, and Run opens them when it can; Stop ends that too.
func (s *Server) Start(ctx context.Context, sb Sandbox) error {
	path, err := s.journalPath(sb.ID)
	if err != nil {
		return err
	}
	for ctx.Err() == nil {
		one, err := s.ensure(sb, path)
		if err != nil {
			return err
		}
		ok, err := one.start(sb)
		if ok || err != nil {
			return err
		}
		// It was stopped in between: a new one takes its place.
	}
	return ctx.Err()
}

func (s *Server) ensure(sb Sandbox, path string) (*sandbox, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, ErrClosed
	}
	one := s.sandboxes[sb.ID]
	if one == nil {
		one = newSandbox(s, sb, path)
		s.sandboxes[sb.ID] = one
	}
	return one, nil
}

// Stop ends the service of a sandbox and removes its journal; nil if there is
// neither. It leaves the kernel alone: the sandbox's policy goes with it.
func (s *Server) Stop(id string) error {
	path, err := s.journalPath(id)
	if err != nil {
		return err
	}
	if sb := s.find(id); sb != nil {
		sb.close()
		s.forget(sb)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove resolver's journal of %s: %w", id, err)
	}
	return nil
}

func (s *Server) forget(sb *sandbox) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.sandboxes[sb.id] == sb {
		delete(s.sandboxes, sb.id)
	}
}

// Swap changes the program of a sandbox. apply gets what the names that are
// known give under the new one, and must put program and list in force
// together; if it fails the old program stays. No answer is released meanwhile.
func (s *Server) Swap(id string, p netpol.Program, apply func([]netpol.Learned) error) error {
	if sb := s.find(id); sb != nil {
		if done, err := sb.swap(p, apply); done {
			return err
		}
	}
	return apply(s.Learned(id, p))
}

// Learned is what the names known for a sandbox give under a program; of a
// sandbox that was not started, by its journal.
func (s *Server) Learned(id string, p netpol.Program) []netpol.Learned {
	if sb := s.find(id); sb != nil {
		if l, ok := sb.learned(p); ok {
			return l
		}
	}
	path, err := s.journalPath(id)
	if err != nil {
		return nil
	}
	st, _, err := readJournal(path, time.Now(), s.cfg.Cap)
	if err != nil {
		s.cfg.Log.Warn("resolver's journal cannot be read", "sandbox", id, "err", err)
		return nil
	}
	next, _ := st.under(p)
	return next.learned()
}

// NameState is one name that a sandbox has resolved and still may use.
type NameState struct {
	Name    string
	Addrs   []netip.Addr // sorted
	Rules   []int        // indices in Program.Rules of the rules that allow it
	Expires time.Time    // of the lease that lasts longest; past: kept by live flows
}

// Names lists the names of a sandbox, sorted.
func (s *Server) Names(id string) []NameState {
	if sb := s.find(id); sb != nil {
		return sb.names()
	}
	return nil
}

// NamesOf lists the names by which a sandbox knows an address, sorted.
func (s *Server) NamesOf(id string, a netip.Addr) []string {
	if sb := s.find(id); sb != nil {
		return sb.namesOf(a)
	}
	return nil
}

// Stats counts since the sandbox was started by this process.
func (s *Server) Stats(id string) Stats {
	if sb := s.find(id); sb != nil {
		return sb.n.stats()
	}
	return Stats{}
}

func (s *Server) find(id string) *sandbox {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.sandboxes[id]
}

func (s *Server) all() []*sandbox {
	s.mu.RLock()
	defer s.mu.RUnlock()
	out := make([]*sandbox, 0, len(s.sandboxes))
	for _, sb := range s.sandboxes {
		out = append(out, sb)
	}
	return out
}

func (s *Server) journalPath(id string) (string, error) {
	if id == "" || len(id) > 64 {
		return "", fmt.Errorf("resolver: %q is not the id of a sandbox", id)
	}
	for _, c := range []byte(id) {
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '_') {
			return "", fmt.Errorf("resolver: %q is not the id of a sandbox", id)
		}
	}
	return filepath.Join(s.cfg.Dir, id), nil
}
