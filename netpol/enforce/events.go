// SPDX-License-Identifier: Apache-2.0

package enforce

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"

	"github.com/bulkheadhq/bulkhead/bpf"
	"github.com/bulkheadhq/bulkhead/netpol"
)

// ticker tells the programs the time, to the second: they write down when a
// learned address was last used, and send one event a second about each
// counter. It runs while the pins are open.
type ticker struct {
	quit chan struct{} // closed by close; nil if it does not run
	done chan struct{} // closed by the goroutine
}

// start begins to move the tick of state, which must stay mapped until close.
func (t *ticker) start(state *shared[bpf.DatapathBhState]) error {
	tick := &state.values[0].Tick
	now, err := bootSeconds()
	if err != nil {
		return err
	}
	atomic.StoreUint64(tick, now)
	quit, done := make(chan struct{}), make(chan struct{})
	t.quit, t.done = quit, done
	go func() {
		defer close(done)
		every := time.NewTicker(time.Second)
		defer every.Stop()
		for {
			select {
			case <-quit:
				return
			case <-every.C:
			}
			if now, err := bootSeconds(); err == nil { // it was readable before
				atomic.StoreUint64(tick, now)
			}
		}
	}()
	return nil
}

// close stops it.
func (t *ticker) close() {
	if t.quit == nil {
		return
	}
	close(t.quit)
	<-t.done
	t.quit = nil
}

// bootSeconds is CLOCK_BOOTTIME, never 0: that would mean that there is no
// clock.
func bootSeconds() (uint64, error) {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return 0, fmt.Errorf("read boot time: %w", err)
	}
	return max(uint64(now.Sec), 1), nil
}

// Event is the first packet of a sandbox, rule and reason in a second. How many
// were left out shows in the totals: those of this event less those of the last
// one like it, less this packet.
type Event struct {
	ID           string
	Slot         uint32
	Time         time.Time // when it was read
	Tenant, Rule string    // the rule that decided and who set it; "" if none did
	Reason       string    // as in Drop; "allow" if it passed
	Audit        string    // why it would have been denied if its policy did not only watch; "" otherwise
	Inbound      bool      // towards the sandbox
	Proto        netpol.Proto
	Peer         netip.Addr // the other end; invalid if the packet was not understood so far
	LocalPort    uint16
	PeerPort     uint16 // EchoPort of an echo request
	Bytes        uint64 // l3 bytes of this packet, all segments

	// Of all packets of the sandbox that the same rule let pass or denied, when it
	// was read. For any other reason, limits too, which name the rule that they
	// were met under: that were dropped for the same reason, when it was sent.
	TotalPackets, TotalBytes uint64
}

// eventKey is what events have in common of which one a second is told.
type eventKey struct {
	slot, epoch, rule uint32
	reason, audit     uint8
	inbound           bool
}

// Events calls do with the flow log until ctx ends, which is no error, or the
// enforcer is closed: ErrClosed. It begins with what happens after the call.
// While do works, events pile up and then get lost: EventsLost counts them, and
// the totals of later ones make up for them. Of two concurrent calls each gets
// a part.
func (e *Enforcer) Events(ctx context.Context, do func(Event)) error {
	if err := e.use(); err != nil {
		return err
	}
	events, err := e.maps["events"].Clone()
	quit := e.ticker.quit
	e.life.RUnlock()
	if err != nil {
		return fmt.Errorf("open flow log: %w", err)
	}
	defer events.Close()
	rd, err := ringbuf.NewReader(events)
	if err != nil {
		return fmt.Errorf("open flow log: %w", err)
	}
	var stop sync.WaitGroup
	finished := make(chan struct{})
	stop.Go(func() {
		select {
		case <-ctx.Done():
		case <-quit:
		case <-finished:
		}
		_ = rd.Close() // wakes Read; what it fails with, nobody can use
	})
	defer stop.Wait()
	defer close(finished)

	told := map[eventKey]int64{}
	second := int64(0)
	var rec ringbuf.Record
	for stale := rd.AvailableBytes(); ; {
		if err := rd.ReadInto(&rec); errors.Is(err, ringbuf.ErrClosed) {
			break
		} else if err != nil {
			return fmt.Errorf("read flow log: %w", err)
		}
		if stale > 0 {
			stale -= len(rec.RawSample) + ringbufHeader
			continue
		}
		now := time.Now()
		if now.Unix() != second {
			second = now.Unix()
			clear(told)
		}
		if len(rec.RawSample) < int(unsafe.Sizeof(bpf.DatapathBhEvent{})) {
			return fmt.Errorf("read flow log: a record of %d bytes", len(rec.RawSample))
		}
		raw := *(*bpf.DatapathBhEvent)(unsafe.Pointer(&rec.RawSample[0]))
		// Each CPU sends its own first packet.
		key := eventKey{raw.Slot, raw.Epoch, raw.Rule, raw.Reason, raw.Audit, raw.Inbound != 0}
		if _, ok := told[key]; ok {
			continue
		}
		told[key] = second
		ev, ok, err := e.event(raw)
		if errors.Is(err, ErrClosed) {
			break
		}
		if err != nil {
			return fmt.Errorf("read flow log: %w", err)
		}
		if ok {
			ev.Time = now
			do(ev)
		}
	}
	if ctx.Err() != nil {
		return nil
	}
	return ErrClosed
}

// ringbufHeader is what a record of the ring has beside its data.
const ringbufHeader = 8

// allCPUs is BH_ALL_CPUS.
const allCPUs = 0xffffffff

// event names what a record of the kernel numbers. ok is false if it is about a
// sandbox that is gone.
func (e *Enforcer) event(raw bpf.DatapathBhEvent) (ev Event, ok bool, err error) {
	if err := e.use(); err != nil {
		return Event{}, false, err
	}
	defer e.life.RUnlock()
	s, err := e.lockAny(raw.Slot)
	if err != nil {
		return Event{}, false, nil
	}
	defer s.mu.Unlock()
	if e.shm.values[raw.Slot].Epoch != raw.Epoch {
		return Event{}, false, nil
	}
	ev = Event{
		ID: s.id, Slot: raw.Slot, Reason: reasonName(reason(raw.Reason)),
		Inbound: raw.Inbound != 0, Proto: netpol.Proto(raw.Proto), Peer: addrOf(raw.Addr),
		LocalPort: raw.Sport, PeerPort: raw.Dport, Bytes: uint64(raw.Len),
		TotalPackets: raw.Packets, TotalBytes: raw.Bytes,
	}
	if ev.Inbound {
		ev.LocalPort, ev.PeerPort = raw.Dport, raw.Sport
	}
	if raw.Audit != 0 {
		ev.Audit = reasonName(reason(raw.Audit))
	}
	if raw.Rule == cbNoRule {
		return ev, true, nil
	}
	ev.Tenant, ev.Rule = s.ruleOf(raw.Rule)
	if ev.Rule != "" && (raw.Cpu != allCPUs || reason(raw.Reason) == bpf.DatapathBhReasonBH_RULE_DENY) {
		// What came along is the count of one CPU, or of all deny rules.
		if ev.TotalPackets, ev.TotalBytes, err = e.rules.count(raw.Rule); err != nil {
			return Event{}, false, err
		}
	}
	return ev, true, nil
}

// ruleOf answers whose counter index is; "" if it is no rule's of the sandbox.
//
// +checklocks:s.mu
func (s *slot) ruleOf(index uint32) (tenant, name string) {
	for k, i := range s.rules {
		if i == index {
			return k.tenant, k.name
		}
	}
	return "", ""
}

// EventsLost answers how many events found the log full since the pins were
// made, those while nobody called Events among them.
func (e *Enforcer) EventsLost() (uint64, error) {
	if err := e.use(); err != nil {
		return 0, err
	}
	defer e.life.RUnlock()
	var lost uint64
	if err := e.maps["events_lost"].Lookup(uint32(0), &lost); err != nil {
		return 0, fmt.Errorf("read lost events: %w", err)
	}
	return lost, nil
}
