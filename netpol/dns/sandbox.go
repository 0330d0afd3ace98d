// SPDX-License-Identifier: Apache-2.0

package dns

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/singleflight"

	"github.com/bulkheadhq/bulkhead/netpol"
)

const (
	relistenAfter = 10 * time.Second // between attempts to open sockets again
	retryAfter    = 5 * time.Second  // after the journal or the kernel failed a lease's end
)

// sandbox is the resolver of one sandbox.
type sandbox struct {
	srv *Server
	cfg Config
	id  string
	ctx context.Context // ends with close
	end context.CancelFunc

	n              counters
	rate, pace     bucket
	eventsReleased bucket
	eventsOther    bucket
	distinct       distinct
	inFlight       atomic.Int64
	asking         singleflight.Group // upstream; by type and name

	// life is held by what begins and ends the service.
	life   sync.Mutex
	socks  *sockets
	serve  sync.WaitGroup // the goroutines of socks and their queries
	broken atomic.Bool    // a socket failed: socks is of no use
	listen time.Time      // no attempt before
	netns  string

	mu     sync.Mutex
	closed bool
	slot   uint32
	ready  bool // st was taken up and prog is in force
	prog   netpol.Program
	st     *state
	jr     journal
	check  time.Time // nothing ends before; zero: nothing is known to end
	later  []Event   // to be emitted when mu is free
	// resumed is when this process took up leases of an earlier one; zero: there
	// were none. Nobody has moved the kernel's clock in between.
	resumed time.Time
}

func newSandbox(s *Server, sb Sandbox, path string) *sandbox {
	one := &sandbox{srv: s, cfg: s.cfg, id: sb.ID, slot: sb.Slot, netns: sb.Netns, st: newState(), jr: journal{path: path}}
	// It lives until it is closed, whatever becomes of the call that started it.
	one.ctx, one.end = context.WithCancel(context.Background())
	return one
}

// start answers false if the sandbox was closed before.
func (sb *sandbox) start(as Sandbox) (bool, error) {
	sb.life.Lock()
	defer sb.life.Unlock()
	if closed, err := sb.takeUp(as); closed || err != nil {
		return !closed, err
	}
	sb.netns = as.Netns
	if sb.socks != nil && !sb.broken.Load() {
		return true, nil
	}
	if err := sb.open(time.Now()); err != nil {
		return true, fmt.Errorf("%w %s: %w", ErrListen, sb.id, err)
	}
	return true, nil
}

// takeUp reads the journal, the first time, and makes the kernel and the
// journal what it says under the program.
func (sb *sandbox) takeUp(as Sandbox) (closed bool, err error) {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	if sb.closed {
		return true, nil
	}
	if sb.ready && as.Slot != sb.slot {
		return false, fmt.Errorf("start resolver of %s: it is at slot %d, not %d", sb.id, sb.slot, as.Slot)
	}
	from := sb.st
	if !sb.ready {
		st, torn, err := readJournal(sb.jr.path, time.Now(), sb.cfg.Cap)
		if err != nil {
			return false, fmt.Errorf("start resolver of %s: %w", sb.id, err)
		}
		if torn > 0 {
			sb.cfg.Log.Warn("the end of the resolver's journal is torn", "sandbox", sb.id, "bytes", torn)
		}
		from, sb.slot = st, as.Slot
		if st.leases > 0 {
			sb.resumed = time.Now()
		}
	}
	next, _ := from.under(as.Program)
	if err := sb.reconcile(as.Program, next); err != nil {
		return false, fmt.Errorf("start resolver of %s: %w", sb.id, err)
	}
	if err := sb.jr.rewrite(next); err != nil {
		return false, fmt.Errorf("start resolver of %s: %w", sb.id, err)
	}
	sb.st, sb.prog, sb.ready, sb.check = next, as.Program, true, next.nextExpiry()
	return false, nil
}

// reconcile makes the kernel hold what a state says and nothing else. All of
// it is written: an address that is there may have the steps of before.
func (sb *sandbox) reconcile(p netpol.Program, st *state) error {
	have, err := sb.cfg.Table.Learned(sb.id, sb.slot)
	if err != nil {
		return fmt.Errorf("list learned addresses: %w", err)
	}
	want := st.learned()
	keep := map[netip.Addr]bool{}
	for _, l := range want {
		keep[l.Addr] = true
	}
	for a := range have {
		if keep[a] {
			continue
		}
		if err := sb.cfg.Table.Forget(sb.id, sb.slot, a); err != nil {
			return fmt.Errorf("forget %s: %w", a, err)
		}
	}
	for _, l := range want {
		if err := sb.cfg.Table.Learn(sb.id, sb.slot, p.Digest, l); err != nil {
			return fmt.Errorf("learn %s: %w", l.Addr, err)
		}
	}
	return nil
}

// swap answers false if the sandbox is not in service: then apply was not
// called.
func (sb *sandbox) swap(p netpol.Program, apply func([]netpol.Learned) error) (done bool, err error) {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	if sb.closed || !sb.ready {
		return false, nil
	}
	next, gone := sb.st.under(p)
	if err := apply(next.learned()); err != nil {
		return true, err
	}
	sb.st, sb.prog, sb.check = next, p, next.nextExpiry()
	if len(gone) == 0 {
		return true, nil
	}
	// If this fails the journal knows names that have ended. It is written anew
	// before the next answer, and Start judges every name by its program.
	if err := sb.jr.rewrite(next); err != nil {
		sb.cfg.Log.Warn("resolver's journal is behind", "sandbox", sb.id, "err", err)
	}
	return true, nil
}

func (sb *sandbox) learned(p netpol.Program) ([]netpol.Learned, bool) {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	if !sb.ready {
		return nil, false
	}
	next, _ := sb.st.under(p)
	return next.learned(), true
}

func (sb *sandbox) program() (p netpol.Program, ok bool) {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	return sb.prog, sb.ready && !sb.closed
}

func (sb *sandbox) names() []NameState {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	out := make([]NameState, 0, len(sb.st.names))
	for _, name := range slices.Sorted(maps.Keys(sb.st.names)) {
		n := NameState{Name: name, Rules: sb.prog.Name(name).Rules}
		for a, l := range sb.st.names[name] {
			n.Addrs = append(n.Addrs, a)
			if l.expires.After(n.Expires) {
				n.Expires = l.expires
			}
		}
		slices.SortFunc(n.Addrs, netip.Addr.Compare)
		out = append(out, n)
	}
	return out
}

func (sb *sandbox) namesOf(a netip.Addr) []string {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	if one := sb.st.addrs[a]; one != nil {
		return slices.Sorted(maps.Keys(one.leases))
	}
	return nil
}

// expire ends the leases whose time is over, but for those whose address saw
// a packet within the idle time.
func (sb *sandbox) expire(now time.Time) {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	if sb.closed || !sb.ready || sb.check.IsZero() || now.Before(sb.check) {
		return
	}
	due := map[pair]bool{}
	for name, addrs := range sb.st.names {
		for a, l := range addrs {
			if !l.expires.After(now) {
				due[pair{name, a}] = true
			}
		}
	}
	next := time.Time{} // the next look
	soon := func(t time.Time) {
		if next.IsZero() || t.Before(next) {
			next = t
		}
	}
	if len(due) > 0 {
		used, err := sb.cfg.Table.Learned(sb.id, sb.slot)
		if err != nil {
			sb.cfg.Log.Warn("leases of a sandbox cannot end", "sandbox", sb.id, "err", fmt.Errorf("list learned addresses: %w", err))
			sb.check = now.Add(retryAfter)
			return
		}
		for p := range due {
			if left := sb.busy(used, p.addr); left > 0 {
				delete(due, p)
				soon(now.Add(max(left, time.Second)))
			}
		}
	}
	over := len(due)
	err := sb.endLeases(due)
	if err != nil {
		sb.cfg.Log.Warn("leases of a sandbox did not end", "sandbox", sb.id, "err", err)
		soon(now.Add(retryAfter))
	} else {
		sb.n.expired.Add(uint64(over))
	}
	for name, addrs := range sb.st.names {
		for a, l := range addrs {
			if l.expires.After(now) && !due[pair{name, a}] {
				soon(l.expires)
			}
		}
	}
	sb.check = next
}

// busy is how long an address is still kept for its last packet; 0: it need
// not be.
func (sb *sandbox) busy(used map[netip.Addr]time.Duration, a netip.Addr) time.Duration {
	ago, ok := used[a]
	if !ok || ago < 0 {
		return 0
	}
	if !sb.resumed.IsZero() { // a flow may have gone on all the time
		ago = min(ago, time.Since(sb.resumed))
	}
	return max(sb.cfg.Idle-ago, 0)
}

// open opens the sockets and serves them. sb.life is held.
func (sb *sandbox) open(now time.Time) error {
	if sb.socks != nil {
		sb.socks.close()
		sb.serve.Wait()
		sb.socks = nil
	}
	sb.listen = now.Add(relistenAfter)
	socks, err := listenIn(sb.netns)
	if err != nil {
		return err
	}
	sb.socks = socks
	sb.broken.Store(false)
	sb.serve.Go(func() { sb.serveUDP(socks.udp) })
	sb.serve.Go(func() { sb.serveTCP(socks.tcp) })
	return nil
}

// relisten opens sockets that were lost, or that Start could not open: root in
// the sandbox may destroy a socket or hold the port for a while.
func (sb *sandbox) relisten(now time.Time) {
	if !sb.life.TryLock() {
		return // it begins or ends just now
	}
	defer sb.life.Unlock()
	if sb.socks != nil && !sb.broken.Load() || now.Before(sb.listen) {
		return
	}
	if _, ok := sb.program(); !ok {
		return
	}
	if err := sb.open(now); err != nil {
		sb.cfg.Log.Warn("resolver cannot listen in a sandbox", "sandbox", sb.id, "err", err)
	}
}

// close ends the service and waits for it.
func (sb *sandbox) close() {
	sb.mu.Lock()
	sb.closed = true
	sb.mu.Unlock()
	sb.end()
	sb.life.Lock()
	defer sb.life.Unlock()
	if sb.socks != nil {
		sb.socks.close()
	}
	sb.serve.Wait()
	sb.socks = nil
}

// errGone ends queries of a sandbox that was closed meanwhile.
var errGone = errors.New("the sandbox has ended")
